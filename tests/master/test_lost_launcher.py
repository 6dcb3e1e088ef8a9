"""The launcher is closed, stopped, put to sleep or killed: the training on this machine goes on, or saves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from patience import steps_made, wait_until

TOOL = ROOT / "master" / "launch_training.py"
SMALL = ["--", "--sequence_length", "64", "--logging_steps", "1", "--per_device_train_batch_size", "2", "--max_steps",
         "100000"]


@contextmanager
def training(environment: dict[str, str], folder: Path, texts: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A training that runs until it is stopped, in folder/run, and what its launcher prints, in folder/log.txt."""
    command = [sys.executable, str(TOOL), "--model", "tiny", "--dataset", str(texts), "--slots", "1", *words, *SMALL,
               "--output_dir", "run"]
    with (folder / "log.txt").open("wb") as log, subprocess.Popen(
            command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True) as process:
        try:
            wait_until(lambda: steps_made(folder / "run") >= 2)
            yield process
        finally:
            subprocess.run([sys.executable, TOOL, "--stop", "run"], cwd=folder, env=environment, capture_output=True)
            process.kill()


def steps_logged(folder: Path) -> list[int]:
    """The steps that rank 0 has printed, as they are kept in the log."""
    text = (folder / "run" / "logs" / "localhost.log").read_text()
    return [int(step) for step in re.findall(r"\[0\] step +(\d+)/", text)]


def record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "run" / "run.json").read_text())
    return found


def test_a_closed_terminal_stops_nothing(environment: dict[str, str], tmp_path: Path, texts: Path) -> None:
    with training(environment, tmp_path, texts) as process:
        process.send_signal(signal.SIGHUP)
        before = steps_made(tmp_path / "run")
        wait_until(lambda: steps_made(tmp_path / "run") > before + 20)
        assert process.poll() is None and "step" in (tmp_path / "run" / "launch.log").read_text()
        assert subprocess.run([sys.executable, TOOL, "--stop", "run"], cwd=tmp_path, env=environment).returncode == 0
        assert process.wait(60) == 0
    assert record(tmp_path)["status"] == "stopped"
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*/complete.json"))


@pytest.mark.slow
def test_a_launcher_that_sleeps_misses_nothing(environment: dict[str, str], tmp_path: Path, texts: Path) -> None:
    with training(environment, tmp_path, texts) as process:
        process.send_signal(signal.SIGSTOP)  # Ctrl-Z, for longer than a silent connection is believed in
        time.sleep(20)
        process.send_signal(signal.SIGCONT)
        before = steps_made(tmp_path / "run")
        wait_until(lambda: steps_made(tmp_path / "run") > before + 5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    steps = steps_logged(tmp_path)
    assert len(steps) > 10 and steps == list(range(1, len(steps) + 1))
    assert record(tmp_path)["status"] == "stopped"


def test_a_launcher_that_is_killed_is_replaced_by_watching(environment: dict[str, str], tmp_path: Path, texts: Path
                                                           ) -> None:
    with training(environment, tmp_path, texts) as process:
        process.kill()
        process.wait()
        words = [sys.executable, str(ROOT / "master" / "watch_training.py"), "run"]
        with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True) as watch:
            launcher = json.loads((tmp_path / "run" / "launcher.json").read_text())
            wait_until(lambda: json.loads((tmp_path / "run" / "launcher.json").read_text()) != launcher)
            before = len(steps_logged(tmp_path))
            wait_until(lambda: len(steps_logged(tmp_path)) > before + 5)
            stopped = subprocess.run([sys.executable, TOOL, "--stop", "run"], cwd=tmp_path, env=environment,
                                     capture_output=True, text=True)
            assert stopped.returncode == 0, stopped.stderr
            seen, _ = watch.communicate(timeout=60)
        assert "its launcher has ended; connecting to its hosts" in seen and "run: stopped, step " in seen, seen
    steps = sorted(set(steps_logged(tmp_path)))  # a few lines that the first launcher had not confirmed come twice
    assert len(steps) > 5 and steps == list(range(1, len(steps) + 1))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics if '"loss"' in line] == steps
    assert not (tmp_path / "run" / "job.json").exists()


def test_without_a_launcher_for_long_the_ranks_save(environment: dict[str, str], tmp_path: Path, texts: Path) -> None:
    with training(environment, tmp_path, texts, "--patience", "6") as process:
        process.kill()
        process.wait()
        wait_until(lambda: record(tmp_path)["status"] == "stopped")
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*/complete.json"))
    log = (tmp_path / "run" / "logs" / "localhost.log").read_text()
    assert "no contact with the master for 6 s: the ranks save and end" in log
    done = subprocess.run([sys.executable, TOOL, "--attach", "run"], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "run: stopped while there was no connection to localhost" in done.stderr
    assert "invoke train --resume run" in done.stderr
    again = subprocess.run([sys.executable, TOOL, "--attach", "run"], cwd=tmp_path, env=environment,
                           capture_output=True, text=True)
    assert again.returncode == 1 and "no job to connect to" in again.stderr, again.stderr


def test_only_a_job_of_this_user_is_taken_over(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    text = json.dumps({"job": "x-abcdef", "folders": {}, "is_here": True, "is_ours": True, "follows": False,
                       "supervision": {}})
    (tmp_path / "run" / "job.json").write_text(json.dumps({"record": text, "signature": "0" * 64}))
    done = subprocess.run([sys.executable, TOOL, "--attach", "run"], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 1 and "was not started by lanspeed on this machine" in done.stderr
    assert os.listdir(tmp_path / "run") == ["job.json"]
