"""`check/consistency.py`, `check_cluster.py`: what is found to differ, what is wrong by itself, and how it is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from master.check.consistency import agreement, content_findings, differences, grouped, node_findings, normalized
from master.check.network_test import Pair, network_findings, rounds
from master.check.slot_tests import read_speeds, speed_findings, speed_lines

GOOD: dict[str, Any] = {
    "code": "c1", "packages": {"torch": "2.13.0+cu130", "deepspeed": "0.19.8"}, "python": "3.11.2", "nccl": "2.28.9",
    "driver": "580.65.06", "glibc": "2.36", "os": "Debian 12", "timezone": "+0000", "hostname": "gpu1", "cores": 8,
    "ram_bytes": 64 << 30, "shm_bytes": 32 << 30, "nofile": 65536, "own_name": ["10.0.0.1"], "missing": [], "jobs": [],
    "names": {"gpu2": ["10.0.0.2"]}, "port": 29500, "busy": {}, "content": {"/data": "d1", "models--gpt2": "m1"},
    "disks": [{"mount": "/", "free_bytes": 500 << 30, "total_bytes": 900 << 30, "rotational": False}],
    "nics": [{"name": "eth0", "addresses": ["10.0.0.1/24"], "mbit": 10000, "mtu": 1500, "kind": "card",
              "driver": "ixgbe"}], "kernel": "6.1.0-44-amd64", "gpu_health": [
        {"slot": 0, "slowed": 0x5, "lanes": 16, "lanes_max": 16}], "kernel_faults": [], "port_range": [32768, 60999]}


def node(**changes: Any) -> dict[str, Any]:
    return normalized({**GOOD, **changes}, "10.0.0.1")


def said(changes: dict[str, Any], skew: float = 0.0) -> list[str]:
    return [f"{found.level}: {found.what}" for found in node_findings("gpu1", node(**changes), skew)]


def test_the_odd_one_stands_against_the_majority() -> None:
    nodes = {"gpu1": node(), "gpu2": node(nccl=None, python="3.12.1"), "gpu3": node(packages={
        "torch": "2.13.0+cpu", "deepspeed": "0.18.0"}), "gpu4": node()}
    assert [found.line() for found in differences(nodes)] == [
        "gpu3: error: deepspeed 0.18.0, the others have 0.19.8: ranks of different versions hang or compute different "
        "things. invoke sync",
        "gpu2: error: Python 3.12, the others have 3.11: packages differ with it. install the same minor release there",
        "gpu2: error: no NCCL, the others have 2.28.9: its ranks can't communicate with the others. invoke sync"]
    assert agreement({"gpu1": node(), "gpu2": node()}) == [
        "gpu1, gpu2: Debian 12, Python 3.11, torch 2.13.0, deepspeed 0.19.8, driver 580.65.06, 8 cores, 64 GiB"]


@pytest.mark.parametrize(("changes", "words"), [
    ({}, []),
    ({"disks": [{"mount": "/", "free_bytes": 10**9}]}, ["error: 1.0 GB are free on /"]),
    ({"disks": [{"mount": "/", "free_bytes": 9 * 10**9}]}, ["warning: 9.0 GB are free on /"]),
    ({"shm_bytes": 64 * 10**6}, ["warning: its shared memory has 64 MB"]),
    ({"nofile": 1024}, ["warning: 1024 open files are allowed"]),
    ({"own_name": ["127.0.1.1"]}, ["info: its own name leads to itself (127.0.1.1)"]),
    ({"names": {"gpu2": ["127.0.1.1"], "gpu1": ["127.0.1.1"], "gpu3": []}},
     ["warning: it knows gpu2 as 127.0.1.1, which is itself"]),
    ({"port": None}, ["info: another program listens on port 29500 there"]),
    ({"busy": {"1": 12288}}, ["warning: other programs hold 12.0 GiB on slot 1"]),
    ({"missing": ["/data"]}, ["error: /data is not there"]),
    ({"jobs": ["20260101-tiny"]}, ["warning: 20260101-tiny runs there"]),
    ({"nics": [{**GOOD["nics"][0], "mbit": 100}]}, ["warning: eth0 runs at 100 Mbit/s"]),
    ({"nics": [{**GOOD["nics"][0], "kind": "wifi"}]}, ["warning: its network is Wi-Fi (eth0)"]),
    ({"nics": [{**GOOD["nics"][0], "mbit": 1000}, {**GOOD["nics"][0], "name": "eth1", "addresses": ["10.1.0.1/24"]}]},
     ["warning: eth0 (1000 Mbit/s) is used, and eth1 has 10000"]),
    ({"nics": [*GOOD["nics"], {**GOOD["nics"][0], "name": "eth1", "addresses": ["10.0.0.7/24"]}]},
     ["warning: eth0 and eth1 are both in 10.0.0.0/24"]),
    ({"nics": []}, []),
    ({"gpu_health": [{"slot": 1, "slowed": 0xC0, "lanes": 4, "lanes_max": 16}]},
     ["warning: slot 1 is slowed down: heat (hardware), its power supply", "warning: slot 1 has 4 of 16 PCIe lanes"]),
    ({"gpu_health": [{"slot": 1, "slowed": None, "lanes": None, "lanes_max": 16}]}, []),
    ({"kernel_faults": ["[1] NVRM: Xid (PCI:0000:01:00): 79, pid=1"]},
     ["warning: its kernel reports GPU faults: [1] NVRM: Xid (PCI:0000:01:00): 79, pid=1"]),
    ({"nics": [{**GOOD["nics"][0], "name": "docker0", "kind": "bridge"}]},
     ["error: docker0, the bridge of its containers or virtual machines, is its network"]),
    ({"nics": [{**GOOD["nics"][0], "name": "br0", "kind": "bridge"}]}, []),
])
def test_what_is_wrong_with_a_node_is_told(changes: dict[str, Any], words: list[str]) -> None:
    assert said(changes) == words


def test_data_that_is_another_than_here_is_named() -> None:
    other = {"/data": "d2", "models--gpt2": None}
    nodes = {"gpu1": node(), "gpu2": node(content=other), "gpu3": node(content=other)}
    assert [found.line() for found in grouped(content_findings(nodes, {"/data": "d1", "models--gpt2": "m1"}))] == [
        "gpu2, gpu3: error: its /data differs from this machine's: ranks would start from different weights, or learn "
        "different text. invoke sync with the same --model and --dataset (or does it have more files than here?)",
        "gpu2, gpu3: warning: models--gpt2 is not in its Hugging Face cache: it would be downloaded there, if there is "
        "internet. invoke sync with the same --model and --dataset (or does it have more files than here?)"]
    assert not content_findings({"gpu1": node(missing=["/data"], content={"/data": None})}, {"/data": "d1"})
    assert [found.hosts for found in content_findings(nodes, {"/data": None})] == [("gpu1",)]


def test_clocks_that_differ_are_told_of() -> None:
    assert said({}, 1.0) == [] and said({}, -90.0) == ["warning: its clock is 90 s behind"]


def test_a_host_behind_windows_address_translation_is_told_of() -> None:
    facts = normalized({**GOOD, "kernel": "5.15.153.1-microsoft-standard-WSL2", "nics": [
        {**GOOD["nics"][0], "addresses": ["172.29.1.5/20"]}]}, "172.29.1.5")
    found = [finding for finding in node_findings("gpu1", facts, 0.0) if finding.level == "error"]
    assert [finding.what for finding in found] == ["it is WSL2 behind Windows' address translation (172.29.1.5/20)"]
    assert "networkingMode=mirrored" in found[0].fix


def test_a_closed_port_range_is_opened_by_its_numbers() -> None:
    pair = Pair("gpu1", "gpu2", None, faults=["port 41000: no answer"])
    (finding,) = network_findings([pair], {}, {"gpu2": node()}, {"gpu1": "10.0.0.1", "gpu2": "10.0.0.2"})
    assert "sudo ufw allow from 10.0.0.1 to any port 32768:60999 proto tcp there" in finding.fix
    pair.faults.append("port 29500: no answer")
    assert "sudo ufw allow from 10.0.0.1 there" in network_findings([pair], {}, {"gpu2": node()}, {
        "gpu1": "10.0.0.1", "gpu2": "10.0.0.2"})[0].fix


def test_pairs_send_in_rounds_in_which_no_host_is_twice() -> None:
    for count in (2, 3, 8, 16):
        peers = [f"gpu{number}" for number in range(count)]
        groups = list(rounds(peers))  # type: ignore[arg-type]
        assert len(groups) == 2 * (count - 1 + count % 2)
        assert all(len({host for pair in group for host in pair}) == 2 * len(group) for group in groups)
        assert sorted(pair for group in groups for pair in group) == sorted(
            (one, other) for one in peers for other in peers if one != other)


def test_a_slow_slot_is_named_among_its_like() -> None:
    line = '@@SPEED ' + json.dumps([{"host": "gpu1", "slot": slot, "device": "RTX 3090", "tflops": rate}
                                    for slot, rate in enumerate([60.0, 61.0, 40.0])]
                                   + [{"host": "gpu2", "slot": 0, "device": "T4", "tflops": 20.0}])
    speeds = read_speeds(["noise", line])
    assert [finding.line() for finding in speed_findings(speeds)] == [
        "gpu1: warning: slot 2 does 40 TFLOP/s, a usual RTX 3090 here 60: every step waits for the slowest slot. look "
        "at its temperature, power and other programs: invoke watch"]
    assert speed_lines(speeds) == ["speed: RTX 3090: 40 to 61 TFLOP/s on 3 slots",
                                   "speed: T4: 20 to 20 TFLOP/s on 1 slots"]
    assert read_speeds(["@@SPEED [5, {}]"]) == read_speeds(["@@SPEED {"]) == read_speeds([]) == []


def test_a_pair_that_is_slower_than_its_cards_is_named() -> None:
    facts = {"gpu1": node(), "gpu2": node(nics=[{**GOOD["nics"][0], "mbit": 1000}])}
    pairs = [Pair("gpu1", "gpu2", 0.0002, alone=30e6), Pair("gpu2", "gpu1", 0.0002, alone=117e6)]
    assert [found.what for found in network_findings(pairs, {}, facts, {})] == [
        "30.0 MB/s, the usual pair has 117.0"]
    assert [found.what for found in network_findings([Pair("gpu1", "gpu2", 0.0002, alone=70e6)], {}, facts, {})] == [
        "70.0 MB/s of the 125 that their cards could"]


@pytest.mark.parametrize(("words", "code", "text"), [
    (["--fast", "--network"], 2, "give one of them"), ([], 1, "hostfile.txt: No such file"),
    (["--nodes", "a,a"], 2, "twice"),
])
def test_wrong_usage_is_told(words: list[str], code: int, text: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "master" / "check_cluster.py", *words], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == code and text in done.stderr and "Traceback" not in done.stderr
