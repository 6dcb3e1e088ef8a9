"""What is kept of a run while it trains: what its launcher said, and how busy its hosts were."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from patience import wait_until

from master.diagnosis import run_history
from master.report.curves import HostCurves
from master.ssh.node_names import parse_node
from master.ssh.route import SshError, SshOptions
from master.ssh.session import LocalSession


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_what_is_said_is_kept_with_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = run_history.noting(tmp_path)
    note("gpu2: connection lost\x1b[31m")
    note("x" * 1000)
    said = capsys.readouterr().err.splitlines()
    found = rows(tmp_path / "events.jsonl")
    assert said[0] == found[0]["text"] == "gpu2: connection lost?[31m" and abs(found[0]["time"] - time.time()) < 5
    assert len(found[1]["text"]) == 500


def test_a_folder_that_is_gone_or_full_costs_nothing(tmp_path: Path) -> None:
    run_history.noting(tmp_path / "gone")("hello")
    assert not (tmp_path / "gone").exists()
    (tmp_path / "events.jsonl").mkdir()
    run_history.noting(tmp_path)("hello")


class Broken(LocalSession):
    """A host that can be reached no more."""

    def open(self, command: str) -> Any:
        raise SshError("gpu3", "connection", "it has ended")


def test_hosts_are_measured_and_those_without_an_answer_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                 ) -> None:
    monkeypatch.setattr(run_history, "FIRST_S", 0.1)
    monkeypatch.setattr(run_history, "OFTEN_S", 0.1)
    here = LocalSession(parse_node("localhost"), SshOptions())
    sessions = {"gpu1": here, "gpu2": None, "gpu3": Broken(parse_node("localhost"), SshOptions())}
    with run_history.measured_hosts(tmp_path, dict.fromkeys(sessions, sys.executable), lambda: sessions):
        wait_until(lambda: len(rows(tmp_path / "hosts.jsonl")) >= 2)
    found = rows(tmp_path / "hosts.jsonl")[0]["hosts"]
    assert set(found) == {"gpu1"} and found["gpu1"]["ram_mib"] > found["gpu1"]["ram_used_mib"] > 0
    curves = HostCurves(tmp_path / "hosts.jsonl")
    curves.newest()
    assert len(curves.points("cpu gpu1")) >= 2 and 0 < curves.points("memory gpu1")[0][1] < 100
    last = len(rows(tmp_path / "hosts.jsonl"))
    time.sleep(3)  # a look that had begun may end
    settled = len(rows(tmp_path / "hosts.jsonl"))
    assert settled <= last + 1
    time.sleep(1)
    assert len(rows(tmp_path / "hosts.jsonl")) == settled
