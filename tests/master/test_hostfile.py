"""hostfile.txt: what is written, DeepSpeed's own parser reads; what DeepSpeed refuses, is refused with its line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from master.inventory.hostfile import (
    HostfileError,
    Slots,
    differences,
    include_filter,
    read_hostfile,
    render_hostfile,
    select,
    write_hostfile,
)

LAB = [Slots("gpu1", 4, (0, 1, 2, 3), "NVIDIA"), Slots("10.0.0.2", 2, (1,), "NVIDIA")]
NOTES = {"gpu1": "4x RTX 3090", "10.0.0.2": "slot 0 unusable\n", "gpu3": "no answer\x1b[31m"}


def test_a_hostfile_is_readable_and_goes_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "hostfile.txt"
    path.write_text(render_hostfile(LAB, NOTES, now=0))
    assert path.read_text().splitlines()[1:] == [
        "# gpu1: 4x RTX 3090", "gpu1 slots=4 type=NVIDIA",
        "# 10.0.0.2: slot 0 unusable?", "10.0.0.2 slots=2 type=NVIDIA",
        "# gpu3: no answer?[31m", "# include: gpu1@10.0.0.2:1"]
    assert path.read_text().startswith("# written by lanspeed 19") and "; 2 hosts, 5 slots in use" in path.read_text()
    assert read_hostfile(path) == LAB


def test_deepspeeds_own_parser_reads_it() -> None:
    from deepspeed.launcher.runner import _parse_hostfile, parse_inclusion_exclusion

    pool = _parse_hostfile(render_hostfile(LAB, NOTES).splitlines())
    assert dict(pool) == {"gpu1": 4, "10.0.0.2": 2}
    assert dict(parse_inclusion_exclusion(pool, include_filter(LAB), "")) == {"gpu1": [0, 1, 2, 3], "10.0.0.2": [1]}


@pytest.mark.parametrize(("text", "message"), [
    ("gpu1 slots=2\ngpu1 slots=1\n", r":2: gpu1 stands here twice"),
    ("gpu1 slots=2\n\n# x\ngpu2 4\n", r":4: not 'HOST slots=N': 'gpu2 4'"),
    ("gpu1 slots=0\n", r":1: gpu1 has no slots"),
    ("gpu1 slots=99999999999\n", r":1: gpu1 has 99999999999 slots: at most 1,024"),
    (f"gpu1 slots={'9' * 5000}\n", r":1: gpu1 has 9{20} slots: at most 1,024"),
    ("gpu1 slots=\u0661\n", r":1: not 'HOST slots=N'"),
    ("-oProxyCommand=id slots=1\n", r":1: .*is no host name"),
    ("gpu\x1b[2J slots=1\n", r":1: .*is no host name"),
    ("# nothing\n", r"no hosts"),
    ("gpu1 slots=2\n# include: gpu2\n", r"'gpu2' has no line"),
    ("gpu1 slots=2\n# include: gpu1:2\n", r"slot 2 of gpu1, which has 2"),
    ("gpu1 slots=2\n# include: gpu1:x\n", r"write HOST or HOST:0,1"),
])
def test_what_is_wrong_is_told_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hostfile.txt"
    path.write_text(text)
    with pytest.raises(HostfileError, match=message):
        read_hostfile(path)


def test_a_missing_hostfile_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(HostfileError, match="No such file or directory: write one with invoke hostfile"):
        read_hostfile(tmp_path / "hostfile.txt")


@given(st.lists(st.text("gpu12 #=slots\t0x", max_size=20), max_size=5))
def test_it_refuses_what_deepspeed_refuses(lines: list[str]) -> None:
    import tempfile

    from deepspeed.launcher.runner import _parse_hostfile

    try:
        theirs = dict(_parse_hostfile(lines))
    except ValueError:
        theirs = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hostfile.txt"
        path.write_text("\n".join(lines))
        try:
            ours = {host.host: host.total for host in read_hostfile(path)}
        except HostfileError:
            ours = {}
    assert ours == theirs or 0 in theirs.values()  # a host without slots is refused here


def test_it_is_written_only_when_more_than_its_date_changes(tmp_path: Path) -> None:
    path = tmp_path / "hostfile.txt"
    assert write_hostfile(path, render_hostfile(LAB, NOTES, now=0))
    before = path.stat()
    assert not write_hostfile(path, render_hostfile(LAB, NOTES, now=10**9))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert write_hostfile(path, render_hostfile(LAB[:1], NOTES, now=0))
    assert os.listdir(tmp_path) == ["hostfile.txt"]


def test_what_changed_is_told() -> None:
    after = [Slots("gpu1", 4, (0, 1, 3), "NVIDIA"), Slots("gpu9", 1, (0,), "NVIDIA")]
    assert differences(LAB, after) == ["gpu1: 4 -> 3 slots", "10.0.0.2: gone, had 1 slots", "gpu9: new, 1 slots"]
    assert differences(LAB, [LAB[0], Slots("10.0.0.2", 2, (0,), "NVIDIA")]) == ["10.0.0.2: 1 -> 1 slots (1 -> 0)"]
    assert differences(LAB, LAB) == []
    assert differences(LAB, LAB[::-1]) == ["the order of hosts, and so their ranks"]


@pytest.mark.parametrize(("include", "exclude"), [
    ("gpu1", ""), ("10.0.0.2@gpu1:0,2", ""), ("gpu1:1@gpu1:3", ""), ("", "gpu1"), ("", "gpu1:0,1@10.0.0.2"), ("", ""),
])
def test_a_choice_of_hosts_is_deepspeeds(include: str, exclude: str) -> None:
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    hosts = [Slots("gpu1", 4, (0, 1, 2, 3)), Slots("10.0.0.2", 2, (0, 1))]
    theirs = parse_inclusion_exclusion({"gpu1": 4, "10.0.0.2": 2}, include, exclude)
    assert {host.host: list(host.use) for host in select(hosts, include, exclude)} == dict(theirs)


@pytest.mark.parametrize(("include", "exclude", "message"), [
    ("gpu9", "", "--include: 'gpu9' has no line"), ("gpu1:7", "", "--include: slot 7 of gpu1, which has 4"),
    ("", "gpu1@10.0.0.2", "no slots are left"), ("gpu1", "gpu1", "give one"), ("gpu1:x", "", "write HOST or HOST:0,1"),
])
def test_a_choice_that_is_not_there_is_told(include: str, exclude: str, message: str) -> None:
    with pytest.raises(HostfileError, match=message):
        select(LAB, include, exclude)
