"""A new launcher comes where the old one has gone, over a network that may be down: it ends no healthy training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from patience import wait_until

from lab.desk import SMALL, Desk, assert_nothing_left, job_processes, launchers, wait_for_steps
from lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]


def attach(desk: Desk) -> subprocess.CompletedProcess[str]:
    """Supervise the desk's run again."""
    where = desk.words()
    command = [*where[: where.index(sys.executable)], sys.executable, str(ROOT / "master" / "launch_training.py"),
               "--attach", str(desk.run_folder), "--connect-timeout", "3"]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200)


def test_a_launcher_that_reaches_nobody_ends_nothing(lab: Lab, texts: Path, cache: Path) -> None:
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    words = ("--on-lost-master", "continue", "--patience", "8")
    job = desk.start(*words, *SMALL, "--max_steps", "100000", "--save_steps", "100000")
    wait_for_steps(desk, job)
    for pid in launchers(desk):
        os.kill(pid, signal.SIGKILL)
    job.communicate(timeout=60)
    ranks = len(job_processes(desk))
    record = json.loads((desk.run_folder / "job.json").read_text())
    text = json.loads(record["record"])
    assert text["supervision"]["survives_master"] and text["supervision"]["patience"] == 8
    desk.lab.master.network("ip link set eth0 down")
    lost = subprocess.Popen([*desk.words()[: desk.words().index(sys.executable)], sys.executable,
                             str(ROOT / "master" / "launch_training.py"), "--attach", str(desk.run_folder),
                             "--connect-timeout", "3"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)
    assert lost.stdout and any("connection lost" in lost.stdout.readline() for _ in range(3))
    assert len(job_processes(desk)) == ranks
    for pid in launchers(desk):  # whoever watched gives up
        os.kill(pid, signal.SIGKILL)
    lost.communicate(timeout=60)
    desk.lab.master.network("ip link set eth0 up")
    assert len(job_processes(desk)) == ranks  # they go on, and are stopped by somebody who reaches them
    stopped = subprocess.run([*desk.words()[: desk.words().index(sys.executable)], sys.executable,
                              str(ROOT / "master" / "stop_training.py"), str(desk.run_folder)], capture_output=True,
                             text=True, timeout=120)
    assert stopped.returncode == 0 and "gpu2: 2 processes ended" in stopped.stderr, stopped.stderr
    assert list(desk.run_folder.glob("checkpoints/checkpoint-*/complete.json"))
    found = attach(desk)
    assert found.returncode == 0 and "stopped while there was no connection to gpu1, gpu2" in found.stderr, found.stderr
    wait_until(lambda: not job_processes(desk))
    assert_nothing_left(desk)


def test_without_contact_to_any_host_nothing_is_said_to_have_failed(lab: Lab, texts: Path, cache: Path) -> None:
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    job = desk.start("--patience", "15", *SMALL, "--max_steps", "100000", "--save_steps", "100000")
    wait_for_steps(desk, job)
    desk.lab.master.network("ip link set eth0 down")
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 1 and "no contact to gpu1, gpu2: the ranks there save and end" in output, output
    assert "training failed" not in output and "invoke watch runs/" in output
    wait_until(lambda: not job_processes(desk))
    desk.lab.master.network("ip link set eth0 up")
    found = attach(desk)
    assert found.returncode == 0 and "stopped while there was no connection to gpu1, gpu2" in found.stderr, found.stderr
    assert list(desk.run_folder.glob("checkpoints/checkpoint-*/complete.json"))
    assert_nothing_left(desk)
