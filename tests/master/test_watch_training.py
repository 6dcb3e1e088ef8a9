"""`watch_training.py`: what it prints of a run that is active, has ended, or isn't there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from master.diagnosis.run_state import look, state_line, time_left
from master.run.launcher_process import (
    RunningError,
    ensure_not_running,
    is_active,
    started_at,
    write_launcher_record,
)
from master.run.run_folder import find_run
from master.watch_training import host_lines

TOOL = ROOT / "master" / "watch_training.py"


def watch(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *words], cwd=cwd, capture_output=True, text=True, timeout=60)


def make_run(folder: Path, status: str, name: str = "20260101-000000-tiny") -> Path:
    run = folder / "runs" / name
    (run / "logs").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"status": status, "steps": 10, "world_size": 2, "command": (
        "trainer/train.py --local_rank=0 --model_name_or_path tiny --output_dir runs/x --max_steps 10 "
        "--resume_from_checkpoint=auto --dataset_path 'my notes'")}))
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 2.5, "tokens_per_second": 4321.0, '
                                       '"sent_per_step": 69500000}\n{"step": 4, "eval_l')
    (run / "logs" / "gpu1.log").write_text("10:00:00 [0] step 3\x1b[31m\n")
    return run


def test_a_run_that_has_ended_is_summed_up(tmp_path: Path) -> None:
    make_run(tmp_path, "finished")
    done = watch(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "runs/20260101-000000-tiny: finished, step 3/10, loss 2.5000, 4,321 tokens/s, 69.5 MB sent a step"
    assert second.startswith("  gpu1: ") and second.endswith(" s ago: 10:00:00 [0] step 3?[31m")
    state = json.loads(watch("--json", "20260101-000000-tiny", cwd=tmp_path).stdout)
    assert (state["status"], state["step"], state["eval_loss"], state["world_size"]) == ("finished", 3, None, 2)


def test_a_run_whose_launcher_is_gone_does_not_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, "running")
    done = watch(cwd=tmp_path)
    assert done.returncode == 1 and "not running any more" in done.stdout
    write_launcher_record(run)
    assert is_active(run)
    done = watch("--once", cwd=tmp_path)
    assert done.returncode == 0 and ": running, step 3/10" in done.stdout
    record = json.loads((run / "launcher.json").read_text())
    (run / "launcher.json").write_text(json.dumps({**record, "started": "1"}))  # the number was given to another
    assert not is_active(run)


def test_a_run_that_is_resumed_starts_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, "stopped")
    write_launcher_record(run)
    assert ": starting, step 3/10" in watch("--once", cwd=tmp_path).stdout
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "ended": time.time() + 60}))  # the launcher still fetches
    assert ": stopped, step 3/10" in watch("--once", cwd=tmp_path).stdout


def test_a_run_of_another_machine_is_left_to_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, "running")
    write_launcher_record(run)
    record = json.loads((run / "launcher.json").read_text())
    (run / "launcher.json").write_text(json.dumps({**record, "host": "desk2", "boot": "another"}))
    (run / "hostfile.txt").write_text("localhost slots=1 type=CPU\n")
    done = watch("--once", cwd=tmp_path)
    assert done.returncode == 0 and ": running on desk2, step 3/10" in done.stdout
    with pytest.raises(RunningError, match="started on desk2, which may still be training it: invoke stop there"):
        ensure_not_running(run)
    stopped = subprocess.run([sys.executable, ROOT / "master" / "stop_training.py", str(run)], cwd=tmp_path,
                             capture_output=True, text=True)
    assert stopped.returncode == 1 and "it was started on desk2: invoke stop there" in stopped.stderr
    (run / "run.json").write_text(json.dumps({"status": "finished"}))
    ensure_not_running(run)


def test_runs_are_found(tmp_path: Path) -> None:
    make_run(tmp_path, "finished")
    newest = make_run(tmp_path, "failed", "20260102-000000-tiny")
    done = watch("--once", cwd=tmp_path)
    assert done.returncode == 1 and "20260102-000000-tiny: failed" in done.stdout
    assert watch("nothing", cwd=tmp_path).stderr == "error: nothing: no such run: ls runs\n"
    assert find_run(str(newest)) == newest


def test_a_host_is_a_line_with_its_gpus_or_why_it_is_silent() -> None:
    gpu = {"slot": 0, "use_percent": 97, "memory_used_mib": 20480, "memory_total_mib": 24576, "temperature_c": 71,
           "power_w": 343.2}
    busy = {"gpus": [gpu, {**gpu, "slot": 1, "use_percent": None, "temperature_c": None}], "problem": None,
            "nics": [{"name": "eth0", "in": 110_000_000, "out": 5_000, "mbit": 1000}], "cpu_percent": 3, "ram_mib": 1,
            "ram_available_mib": 1}
    state = {"nodes": {"gpu1": busy, "gpu2": {"fault": "TCP: no route"}, "gpu3": {}},
             "hosts": {"gpu2": {"last": "10:00:00 [1] up", "seconds_ago": 9}}}
    assert host_lines(state) == [
        "  gpu1: GPU 0: 97 % 71 °C; GPU 1: ?, 20.0/24 GiB; 20.0/24 GiB, eth0 in 110.0, out 0.0 of 125 MB/s",
        "  gpu2: TCP: no route, 9 s ago: 10:00:00 [1] up", "  gpu3: asked"]


def test_a_launcher_that_nobody_waited_for_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
        assert started_at(ended.pid) is None
    assert started_at(os.getpid())


@pytest.mark.parametrize(("rows", "left"), [
    ("", None), ('{"step": 1, "loss": 2, "time": 100}\n{"step": 3, "loss": 2, "time": 104}\n', 14.0),
    ('{"step": 1, "loss": 2, "time": 100}\n{"step": 3, "loss": 2, "time": 1e308}\n', None),
    ('{"step": 3, "loss": 2, "time": 1}\n{"step": 3, "loss": 2, "time": 2}\n', None),
    ('{"step": 1, "loss": 2}\n{"step": "x", "loss": 2, "time": 2}\n', None)])
def test_the_time_left_is_by_the_last_steps(rows: str, left: float | None, tmp_path: Path) -> None:
    run = make_run(tmp_path, "running")
    (run / "metrics.jsonl").write_text(rows)
    found = look(run)
    assert found["seconds_left"] == left
    assert found["run"] in state_line(found)


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (720, "12 min"), (12000, "3 h 20 min")])
def test_a_time_is_told_as_a_person_says_it(seconds: float, text: str) -> None:
    assert time_left(seconds) == text
