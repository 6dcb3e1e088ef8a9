"""`check/consistency.py`, `check_cluster.py`: what is found to differ, what is wrong by itself, and how it is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from master.check.consistency import agreement, content_findings, differences, grouped, node_findings, normalized
from master.check.network_test import Pair, network_findings

GOOD: dict[str, Any] = {
    "code": "c1", "packages": {"torch": "2.13.0+cu130", "deepspeed": "0.19.8"}, "python": "3.11.2", "nccl": "2.28.9",
    "driver": "580.65.06", "glibc": "2.36", "os": "Debian 12", "timezone": "+0000", "hostname": "gpu1", "cores": 8,
    "ram_bytes": 64 << 30, "shm_bytes": 32 << 30, "nofile": 65536, "own_name": ["10.0.0.1"], "missing": [], "jobs": [],
    "names": {"gpu2": ["10.0.0.2"]}, "port": 29500, "busy": {}, "content": {"/data": "d1", "models--gpt2": "m1"},
    "disks": [{"mount": "/", "free_bytes": 500 << 30, "total_bytes": 900 << 30, "rotational": False}],
    "nics": [{"name": "eth0", "addresses": ["10.0.0.1/24"], "mbit": 10000, "mtu": 1500, "kind": "card",
              "driver": "ixgbe"}]}


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
