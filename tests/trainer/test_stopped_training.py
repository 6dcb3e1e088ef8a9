"""Trainings that are stopped, killed or run out of disk: what is saved, and that they resume from it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TRAINER, WARM, Train
from patience import steps_made, wait_until
from warm_trainer import Job

from trainer.checkpoint.verification import list_checkpoints, step_of
from trainer.distributed.signals import ASKING, Interrupted, SignalWatch

SMALL = ("--sequence_length", "64", "--per_device_train_batch_size", "2", "--eval_fraction", "0.1")


@contextlib.contextmanager
def running(environment: dict[str, str], path: Path, texts: Path, *words: str) -> Iterator[Job]:
    """A trainer that runs: killed at the end whatever happens."""
    told = [str(TRAINER), "--model_name_or_path", "tiny", "--dataset_path", str(texts), "--output_dir", str(path),
            "--logging_steps", "1", *SMALL, *words]
    log = path.parent / "log.txt"
    with Job(os.environ[WARM], told, environment, path.parent, log) as job:
        yield job


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_run_goes_on_later(number: signal.Signals, environment: dict[str, str], tmp_path: Path,
                                                  texts: Path, train: Train) -> None:
    path = tmp_path / "run"
    with running(environment, path, texts, "--max_steps", "2000") as process:
        wait_until(lambda: steps_made(path) >= 3)
        process.send_signal(number)
        assert process.wait(120) == 0
    assert json.loads((path / "run.json").read_text())["status"] == "stopped"
    log = (tmp_path / "log.txt").read_text()
    assert "stopped at step" in log and "--resume_from_checkpoint" in log
    step = max(int(folder.name.split("-")[1]) for folder in (path / "checkpoints").iterdir())
    again = train(*SMALL, "--max_steps", str(step + 2), "--resume_from_checkpoint", str(path), expect=None)
    assert f"resuming after {step}" in again.output


def test_the_processes_that_make_batches_leave_a_request_to_stop_to_the_rank(
        environment: dict[str, str], tmp_path: Path, texts: Path) -> None:
    path = tmp_path / "run"
    with running(environment, path, texts, "--max_steps", "2000", "--dataloader_workers", "2") as process:
        wait_until(lambda: steps_made(path) >= 3)
        workers = Path(f"/proc/{process.pids[0]}/task/{process.pids[0]}/children").read_text().split()
        assert len(workers) >= 2
        for pid in map(int, workers):  # as Ctrl-C in a terminal does, or a signal to the process group
            for number in ASKING:
                os.kill(pid, number)
        made = steps_made(path)
        wait_until(lambda: steps_made(path) > made + 20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    assert json.loads((path / "run.json").read_text())["status"] == "stopped"
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_a_signal_before_the_first_step_says_that_nothing_was_saved(environment: dict[str, str], tmp_path: Path,
                                                                    texts: Path) -> None:
    command = [sys.executable, str(TRAINER), "--model_name_or_path", "tiny", "--dataset_path", str(texts),
               "--output_dir", str(tmp_path / "run"), *SMALL]  # not the warm one, which is soon at its first step
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        assert process.stdout and "loading torch" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "nothing to save" in output


def test_a_signal_that_python_passed_over_is_not_lost() -> None:
    with SignalWatch() as watch:
        with contextlib.suppress(Interrupted):  # as in a __del__
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        with pytest.raises(Interrupted):
            watch.steps_begin(None)  # type: ignore[arg-type]


def kill_while_saving(process: Job, checkpoints: Path) -> tuple[int, int]:
    """Kill a trainer in the middle of a save, whichever it is; return that step and the one before it.

    It is stopped first: what is half-written then stays so, and a save that ended in time is let go for the next.
    """
    seen: set[Path] = set()
    end = time.monotonic() + 90
    while time.monotonic() < end:
        fresh = [folder for folder in list_checkpoints(checkpoints) if folder not in seen]
        if not fresh:
            continue
        process.send_signal(signal.SIGSTOP)
        if seen and not (fresh[-1] / "complete.json").exists():
            process.send_signal(signal.SIGKILL)
            return step_of(fresh[-1]), max(map(step_of, seen.union(fresh[:-1])))
        seen.update(fresh)
        process.send_signal(signal.SIGCONT)
    pytest.fail("no save was met halfway")


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(environment: dict[str, str], tmp_path: Path,
                                                                        texts: Path, train: Train) -> None:
    path = tmp_path / "run"
    with running(environment, path, texts, "--max_steps", "2000", "--save_steps", "3") as process:
        half, before = kill_while_saving(process, path / "checkpoints")
    again = train(*SMALL, "--max_steps", "2000", "--save_steps", "3", "--resume_from_checkpoint", "auto",
                  "--logging_steps", "500", "--precision", "bf16x", expect=2)
    assert "--precision" in again.output
    with running(environment, path, texts, "--max_steps", "2000", "--resume_from_checkpoint", "auto") as process:
        wait_until(lambda: "resuming after" in (tmp_path / "log.txt").read_text())
        process.send_signal(signal.SIGKILL)
    log = (tmp_path / "log.txt").read_text()
    assert f"checkpoint-{half} is half-written" in log
    assert f"resuming after {before}" in log


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.root
def test_a_full_disk_is_told_before_the_run(small_disk: Path, train: Train) -> None:
    run = train(*SMALL, "--max_steps", "30", "--save_steps", "5", "--output_dir", str(small_disk / "run"), expect=1)
    assert "3 checkpoints and the model, and 17 MB are free: --save_total_limit 1" in run.output


@pytest.mark.root
def test_a_disk_that_fills_up_costs_checkpoints_and_nothing_else(
    small_disk: Path, environment: dict[str, str], texts: Path, train: Train, tmp_path: Path
) -> None:
    path, log = small_disk / "run", tmp_path / "log.txt"
    subprocess.run(["mount", "-o", "remount,size=80m", str(small_disk)], check=True)
    words = ("--max_steps", "100000", "--save_steps", "20", "--save_total_limit", "1", "--output_dir", str(path))
    with running(environment, tmp_path / "x", texts, *words) as process:
        wait_until(lambda: list(path.glob("checkpoints/checkpoint-*/complete.json")))
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(1 << 16)):
                pass
        wait_until(lambda: "could not be saved" in log.read_text())
        said = next(line for line in log.read_text().splitlines() if "could not be saved" in line)
        assert "is intact; the training continues" in said and str(path / "checkpoints") in said, said
        good = max(list_checkpoints(path / "checkpoints"), key=step_of)
        assert (good / "complete.json").exists() and f"{good.name} is intact" in said
        (small_disk / "filler").unlink()
        wait_until(lambda: any(step_of(each.parent) > step_of(good) for each in path.glob(
            "checkpoints/checkpoint-*/complete.json")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    assert "; saved " in log.read_text() and "Traceback" not in log.read_text()
    step = json.loads((path / "run.json").read_text())["step"]
    again = train(*SMALL, *words, "--resume_from_checkpoint", "auto", "--max_steps", str(step + 2), expect=0)
    assert f"resuming after {step}" in again.output


def test_a_checkpoint_that_can_not_be_written_is_told_once(environment: dict[str, str], tmp_path: Path, texts: Path,
                                                           train: Train) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "checkpoint-2").write_text("a file in the way")
    run = train(*SMALL, "--max_steps", "5", "--save_steps", "2", "--output_dir", str(tmp_path / "run"), expect=0)
    assert run.output.count("checkpoint-2 could not be saved (") == 1 and "there is no checkpoint yet" in run.output
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "complete.json").exists()
