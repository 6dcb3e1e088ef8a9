"""`invoke check` over whole machines: each planted fault is reported with its fix, and nothing else is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from programs import program

from lab.desk import Desk
from lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.needs("tc", "nft", "faketime")]


@pytest.fixture
def desk(lab: Lab, tmp_path: Path) -> Iterator[Desk]:
    made = Desk(lab, tmp_path, tmp_path / "cache", {"gpu1": 1, "gpu2": 1, "gpu3": 1})
    lab.master.resolve(*made.hosts.values())
    yield made


def check(desk: Desk, *words: str, variables: tuple[str, ...] = ()) -> tuple[int, str, dict[str, Any]]:
    """Run the tool with --json; return exit code, stderr, what it found."""
    where = desk.words()
    tool = [sys.executable, str(ROOT / "master" / "check_cluster.py"), "--host-keys", "accept-new"]
    command = [*where[: where.index(sys.executable)], *variables, *tool, "--connect-timeout", "3", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.stdout, done.stderr
    return done.returncode, done.stderr, json.loads(done.stdout)


def texts(found: dict[str, Any], level: str) -> list[str]:
    return [f"{', '.join(each['hosts'])}: {each['what']}" for each in found["findings"] if each["level"] == level]


def test_machines_that_are_alike_pass(desk: Desk) -> None:
    code, said, found = check(desk)
    assert code == 0 and texts(found, "error") == texts(found, "warning") == [], (said, found["findings"])
    assert found["sum"].startswith("3 ranks joined the all-reduce test on cpu: ")
    assert [pair["faults"] for pair in found["pairs"]] == [[]] * 6
    assert all(0 < pair["latency_s"] < 1 for pair in found["pairs"])
    # Debian's installer gives each machine's name to its loopback address.
    assert any("gpu1, gpu2, gpu3: its own name leads to itself (127.0.1.1)" in text for text in texts(found, "info"))


def test_what_is_odd_on_one_machine_is_named(desk: Desk) -> None:
    odd = desk.hosts["gpu2"]
    other = desk.lab.folder / "other"  # another state of the checkout, with torch of another version
    shutil.copytree(ROOT / "trainer", other / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "trainer" / "train.py").open("a") as file:
        file.write("# changed\n")
    subprocess.run(odd.words("mount", "--bind", str(other / "trainer"), str(ROOT / "trainer")), check=True)
    info = next(Path(sys.prefix).glob("lib/python*/site-packages/deepspeed-*.dist-info"))
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.2\n")
    subprocess.run(odd.words("mount", "--bind", str(other / "METADATA"), str(info / "METADATA")), check=True)
    subprocess.run(odd.words("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", "/dev/shm"), check=True)
    odd.network("ip link set dev eth0 mtu 1400")
    rules = "table inet wall {\nchain input {\ntype filter hook input priority 0\ntcp dport 29500 drop\n}\n}\n"
    subprocess.run(desk.hosts["gpu3"].words("nft", rules), check=True)
    code, said, found = check(desk)
    errors, warnings = texts(found, "error"), texts(found, "warning")
    assert code == 1, said
    assert "gpu2: deepspeed 0.18.2, the others have 0.19.8" in errors
    assert any(text.startswith("gpu2: lanspeed's code ") for text in errors)
    assert {"gpu1: gpu3 port 29500: no answer", "gpu2: gpu3 port 29500: no answer"} <= set(errors) and len(errors) == 4
    assert "gpu2: its shared memory has 67 MB" in warnings
    assert "gpu2: MTU of the training's network card 1400, the others have 1500" in warnings and len(warnings) == 2


def test_a_clock_a_name_and_data_that_are_wrong_are_named(desk: Desk, tmp_path: Path) -> None:
    (library,) = Path(program("faketime")).parent.parent.glob("lib/*/faketime/libfaketime.so.1")
    late = desk.lab.add("gpu4")
    desk.admit(late, LD_PRELOAD=str(library), FAKETIME="-90s", HF_HUB_OFFLINE="1")
    with (late.etc / "hosts").open("a") as file:
        file.write("127.0.0.1 gpu1\n")
    notes, others = tmp_path / "notes", tmp_path / "others"
    for folder, text in ((notes, "as here"), (others, "another")):
        folder.mkdir()
        (folder / "a.txt").write_text(text)
    subprocess.run(late.words("mount", "--bind", str(others), str(notes)), check=True)
    code, said, found = check(desk, "--fast", "--nodes", "gpu1,gpu4", "--dataset", str(notes))
    assert code == 1 and texts(found, "error") == [f"gpu4: its {notes} differs from this machine's"], said
    name, clock = sorted(texts(found, "warning"))
    assert re.fullmatch(r"gpu4: its clock is (8[5-9]|9[0-5]) s behind", clock)
    assert name == "gpu4: it knows gpu1 as 127.0.0.1, which is itself"


def test_a_slow_link_is_measured_and_named(desk: Desk) -> None:
    (desk.folder / "cluster.json").unlink(missing_ok=True)
    desk.hosts["gpu3"].network("tc qdisc add dev eth0 root tbf rate 80mbit burst 64kb latency 50ms")
    code, said, found = check(desk, "--network")
    rates = {(pair["source"], pair["target"]): pair["alone"] for pair in found["pairs"]}
    assert code == 0, said
    for target in ("gpu1", "gpu2"):
        assert rates["gpu3", target] == pytest.approx(10e6, rel=0.15)
        assert any(text.startswith(f"gpu3, {target}: ") and "the usual pair has" in text
                   for text in texts(found, "warning"))
    assert rates["gpu1", "gpu2"] > 50e6
    assert all(pair["together"] for pair in found["pairs"] if (pair["source"], pair["target"]) in {
        ("gpu1", "gpu2"), ("gpu2", "gpu3"), ("gpu3", "gpu1")})


def test_a_firewall_is_found_in_its_direction(desk: Desk) -> None:
    rules = ("table inet wall {\nchain input {\ntype filter hook input priority 0\nct state established accept\n"
             "tcp dport != { 22, 29500 } drop\n}\n}\n")
    subprocess.run(desk.hosts["gpu1"].words("nft", rules), check=True)
    code, _, found = check(desk, "--nodes", "gpu1,gpu2")
    (error,) = texts(found, "error")
    assert code == 1 and error.startswith("gpu2: gpu1 port ") and error.endswith(": no answer")
    (finding,) = [each for each in found["findings"] if each["level"] == "error"]
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert finding["fix"] == ("open gpu1's firewall for 10.77.0.12, as by sudo ufw allow from 10.77.0.12 to any port "
                              f"{first}:{last} proto tcp there")


def test_ranks_that_do_not_add_up_are_told_of(desk: Desk) -> None:
    code, _, found = check(desk, variables=("GLOO_SOCKET_IFNAME=lo",))
    (error,) = texts(found, "error")
    assert code == 1 and "the all-reduce test failed: " in error and "did not join the all-reduce test" in error


def test_a_machine_that_is_off_costs_the_others_nothing(desk: Desk) -> None:
    desk.hosts["gpu2"].network("ip link set eth0 down")
    code, _, found = check(desk, "--nodes", "gpu[1-3]")
    assert code == 1 and [text for text in texts(found, "error") if text.startswith("gpu2: TCP: ")]
    assert sorted((pair["source"], pair["target"]) for pair in found["pairs"]) == [("gpu1", "gpu3"), ("gpu3", "gpu1")]
