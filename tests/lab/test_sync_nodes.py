"""`invoke sync` to whole machines: what arrives, what a break costs, and what is never touched."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from patience import wait_until

from lab.bare import WORKER, BareDesk
from lab.hosts import Host, Lab

pytestmark = [pytest.mark.lab, pytest.mark.needs("/usr/bin/python3", "tc", "nft")]
MEGABYTE = 1_000_000


@pytest.fixture
def desk(lab: Lab) -> Iterator[BareDesk]:
    made = BareDesk(lab, ["gpu1", "gpu2", "gpu3"])
    (made.folder / "data").mkdir()
    yield made


def arrived(host: Host, name: str = "data") -> Path:
    """Where a folder of the desk lies on a machine."""
    (found,) = host.home.glob(f"lanspeed-data/*/{name}")
    return found


def same(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same files, links and modes."""
    left, right = ({path.relative_to(top): path for path in top.rglob("*")} for top in (one, other))
    return left.keys() == right.keys() and all(
        left[name].is_dir() or (os.readlink(left[name]) == os.readlink(right[name]) if left[name].is_symlink()
                                else filecmp.cmp(left[name], right[name], shallow=False)
                                and left[name].stat().st_mode == right[name].stat().st_mode) for name in left)


def slow(desk: BareDesk, mbit: int) -> None:
    """Put the desk's card on a slow link."""
    desk.lab.master.network(f"tc qdisc add dev eth0 root tbf rate {mbit}mbit burst 64kb latency 200ms")


def has_part(host: Host, megabytes: float) -> bool:
    """Return whether so much of a file has come to a machine, and not all of it."""
    for path in host.home.glob("lanspeed-data/*/data/.lanspeed-*.part"):
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_size > megabytes * MEGABYTE
    return False


def test_what_is_here_arrives_and_what_changes_follows(desk: BareDesk) -> None:
    data, outside = desk.folder / "data", desk.folder / "elsewhere"
    (data / "deep er").mkdir()
    (data / "deep er" / "ünïcode \N{SNOWMAN}.txt").write_text("snow")
    (data / os.fsdecode(b"not-utf8-\xff")).write_text("bytes")
    (data / "empty").touch()
    (data / "run.sh").write_text("#!/bin/sh\n")
    (data / "run.sh").chmod(0o755)
    (data / "large.bin").write_bytes(os.urandom(9 * MEGABYTE))
    (data / "inside").symlink_to("large.bin")
    outside.write_text("from elsewhere")
    (data / "outward").symlink_to(outside)
    (data / "nowhere").symlink_to("gone")
    os.mkfifo(data / "pipe")
    first = desk.sync("--dataset", "data")
    assert {one["bytes_sent"] > 9 * MEGABYTE for one in first.values()} == {True}
    (data / "pipe").unlink()
    (data / "nowhere").unlink()
    (data / "outward").unlink()
    (data / "outward").write_text("from elsewhere")  # as it arrives
    for name, host in desk.hosts.items():
        assert same(data, arrived(host)), name
        assert first[name]["folder"] == str(host.home / "lanspeed")
        assert filecmp.cmp(host.home / "lanspeed" / "trainer" / "train.py", ROOT / "trainer" / "train.py")
        assert first[name]["paths"] == {str(data): str(arrived(host))}
        assert arrived(host).stat().st_uid == WORKER
    assert {one["bytes_missing"] for one in desk.sync("--dataset", "data").values()} == {0}

    (data / "run.sh").write_text("#!/bin/sh\nexit\n")
    (data / "empty").unlink()
    theirs = arrived(desk.hosts["gpu2"]) / "their own"
    theirs.write_text("stays")
    second = desk.sync("--dataset", "data")
    assert {(one["deleted"], one["bytes_sent"] < MEGABYTE) for one in second.values()} == {(1, True)}
    assert theirs.read_text() == "stays" and same(data, arrived(desk.hosts["gpu1"]))


def test_what_somebody_else_put_there_is_never_touched(desk: BareDesk) -> None:
    data = desk.folder / "data"
    (data / "a.txt").write_text("one")
    desk.sync("--dataset", "data")
    mine = arrived(desk.hosts["gpu1"]) / "a.txt"
    mine.write_text("edited by hand")
    (data / "a.txt").write_text("two")
    found = desk.sync("--dataset", "data", expect=1)
    assert f"{mine} exists there with different content, and lanspeed did not put it there" in found["gpu1"]["error"]
    assert mine.read_text() == "edited by hand" and not found["gpu2"]["error"]
    assert (arrived(desk.hosts["gpu2"]) / "a.txt").read_text() == "two"
    gone = subprocess.run(desk.words("--remove"), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert gone.returncode == 0 and mine.read_text() == "edited by hand" and str(mine) in gone.stdout, gone.stderr
    assert sorted(path.name for path in desk.hosts["gpu2"].home.iterdir()) == [".ssh"]
    assert not desk.sync("--dataset", "data", "--overwrite")["gpu1"]["error"] and mine.read_text() == "two"


def test_dry_run_sends_nothing(desk: BareDesk) -> None:
    (desk.folder / "data" / "a.bin").write_bytes(os.urandom(3 * MEGABYTE))
    found = desk.sync("--dataset", "data", "--dry-run")
    assert {one["bytes_missing"] > 3 * MEGABYTE for one in found.values()} == {True}
    assert sorted(path.name for path in desk.hosts["gpu2"].home.iterdir()) == [".lanspeed", ".ssh"]


def test_after_a_kill_it_goes_on_where_it_was(desk: BareDesk) -> None:
    data = desk.folder / "data"
    (data / "large.bin").write_bytes(os.urandom(40 * MEGABYTE))
    slow(desk, 80)
    job = subprocess.Popen(desk.words("--dataset", "data"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: all(has_part(host, 12) for host in desk.hosts.values()))
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*") if is_tool(path, desk)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    job.wait()
    assert pids and not list(desk.hosts["gpu1"].home.glob("lanspeed-data/*/data/large.bin"))
    time.sleep(1)
    found = desk.sync("--dataset", "data")
    assert all(one["bytes_missing"] < 33 * MEGABYTE for one in found.values()), found
    assert all(same(data, arrived(host)) and not list(host.home.rglob("*.part")) for host in desk.hosts.values())


def is_tool(path: Path, desk: BareDesk) -> bool:
    """Return whether a process is the desk's sync_nodes.py."""
    try:
        space = os.readlink(path / "ns" / "pid") == os.readlink(f"/proc/{desk.lab.master.pid}/ns/pid")
        return space and b"sync_nodes.py" in (path / "cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize("lost", ["gpu1", "gpu2"])
def test_a_node_that_dies_in_the_middle_costs_the_others_nothing(desk: BareDesk, lost: str) -> None:
    data = desk.folder / "data"
    (data / "large.bin").write_bytes(os.urandom(40 * MEGABYTE))
    slow(desk, 80)
    words = [*desk.words("--dataset", "data"), "--json"]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: has_part(desk.hosts["gpu3"], 8))
    desk.hosts[lost].end()  # as a power cut
    out, err = job.communicate(timeout=150)
    assert job.returncode == 1, err
    found = {one["host"]: one for one in json.loads(out)["hosts"]}
    assert [name for name, one in found.items() if one["error"]] == [lost], found
    for name in {"gpu1", "gpu2", "gpu3"} - {lost}:
        assert same(data, arrived(desk.hosts[name]))


def test_nodes_that_do_not_reach_each_other_are_served_from_here(desk: BareDesk) -> None:
    (desk.folder / "data" / "a.bin").write_bytes(os.urandom(6 * MEGABYTE))
    rules = ("table inet wall {\nchain input {\ntype filter hook input priority 0\nct state established accept\n"
             "tcp dport != 22 reject with tcp reset\n}\n}\n")
    for host in desk.hosts.values():
        subprocess.run(host.words("nft", rules), check=True)
    found = desk.sync("--dataset", "data")
    assert not any(one["error"] for one in found.values())
    assert all(same(desk.folder / "data", arrived(host)) for host in desk.hosts.values())


def test_a_full_disk_is_told_of_before_and_after(desk: BareDesk) -> None:
    data, odd = desk.folder / "data", desk.hosts["gpu2"]
    (data / "large.bin").write_bytes(os.urandom(40 * MEGABYTE))
    place = odd.home / "lanspeed-data"
    place.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", f"uid={WORKER},size=320m", "none", str(place))
    subprocess.run(odd.words(*mount), check=True)
    subprocess.run(odd.words("fallocate", "-l", "40m", str(place / "filler")), check=True)
    found = desk.sync("--dataset", "data", expect=1)
    assert f"0.04 GB are needed on the disk of {place}" in found["gpu2"]["error"], found["gpu2"]
    assert not found["gpu1"]["error"] and not found["gpu3"]["error"]

    for name in ("gpu1", "gpu3"):
        shutil.rmtree(arrived(desk.hosts[name]))
    subprocess.run(odd.words("rm", str(place / "filler")), check=True)
    slow(desk, 80)
    words = [*desk.words("--dataset", "data"), "--json"]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: has_part(desk.hosts["gpu1"], 0))
    subprocess.run(odd.words("sh", "-c", f"cat /dev/zero > {place}/filler"), stderr=subprocess.DEVNULL)
    out, err = job.communicate(timeout=150)
    found = {one["host"]: one for one in json.loads(out)["hosts"]}
    assert "No space left on device" in found["gpu2"]["error"], (found, err)
    assert not found["gpu1"]["error"] and not found["gpu3"]["error"]
    subprocess.run(odd.words("rm", str(place / "filler")), check=True)
    assert not desk.sync("--dataset", "data")["gpu2"]["error"]


def test_machines_that_share_a_home_get_one_copy(desk: BareDesk) -> None:
    one, other = desk.hosts["gpu1"], desk.hosts["gpu2"]
    subprocess.run(other.words("mount", "--bind", str(one.home), str(other.home)), check=True)
    (desk.folder / "data" / "a.bin").write_bytes(os.urandom(MEGABYTE))
    found = desk.sync("--dataset", "data")
    assert found["gpu2"]["shares_home_of"] == "gpu1" and not found["gpu2"]["bytes_sent"]
    assert found["gpu1"]["folder"] == found["gpu2"]["folder"]
    assert same(desk.folder / "data", arrived(one))


@pytest.mark.slow
def test_many_small_files_and_a_large_one(desk: BareDesk) -> None:
    data = desk.folder / "data"
    for number in range(40_000):
        if number % 1000 == 0:
            (data / f"{number // 1000:03d}").mkdir()
        (data / f"{number // 1000:03d}" / f"{number}.txt").write_text(f"document {number}\n")
    with (data / "large.bin").open("wb") as file:
        for number in range(1500):
            file.write(number.to_bytes(8, "big") * (MEGABYTE // 8))
    desk.hosts = {name: desk.hosts[name] for name in ("gpu1", "gpu2")}
    began = time.monotonic()
    found = desk.sync("--dataset", "data")
    assert all(one["bytes_sent"] > 1500 * MEGABYTE and not one["error"] for one in found.values())
    print(f"{time.monotonic() - began:.0f} s")
    assert same(data, arrived(desk.hosts["gpu2"]))
    again = time.monotonic()
    assert {one["bytes_missing"] for one in desk.sync("--dataset", "data").values()} == {0}
    print(f"{time.monotonic() - again:.0f} s")


def test_each_host_gets_the_files_of_its_layers(desk: BareDesk) -> None:
    model = desk.folder / "model"
    model.mkdir()
    places = {"model.embed_tokens.weight": "a", "model.layers.0.mlp.weight": "a", "model.layers.1.mlp.weight": "b",
              "model.layers.2.mlp.weight": "b", "model.layers.3.mlp.weight": "c"}
    for name in set(places.values()):
        (model / name).write_text(name)
    (model / "config.json").write_text("{}")
    words = [*desk.words("--model", str(model), "--split-layers", "1,2,1")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "its weights are in one file" in done.stderr
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    both = {"config.json", "model.safetensors.index.json", "a"}
    assert [{path.name for path in arrived(host, "model").iterdir()} for host in desk.hosts.values()] == [
        both, both | {"b"}, both | {"c"}]
