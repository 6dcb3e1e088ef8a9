"""The launcher: what it would run, what it ends, and that nothing runs on after it."""

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

from master.core.run_cli import UsageError
from master.inventory.local_gpus import Gpus, choose_slots
from master.run.run_folder import mark_failed, new_run_path

TOOL = ROOT / "master" / "launch_training.py"
SMALL = ["--", "--sequence_length", "64", "--logging_steps", "1", "--per_device_train_batch_size", "2"]


def launch(*words: str, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *words], env=environment, cwd=cwd, capture_output=True, text=True)


def ranks_of(run: Path) -> list[int]:
    """The processes, launchers included, whose command line names a run folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_model_is_trained_by_two_ranks(environment: dict[str, str], tmp_path: Path, texts: Path) -> None:
    done = launch("--model", "tiny", "--dataset", str(texts), "--slots", "2", *SMALL, "--max_steps", "4",
                  environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training on this machine: 2 CPU slots" in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["world_size"], record["engine"]) == ("finished", 2, "DeepSpeed ZeRO-1")
    assert (run / "model" / "model.safetensors").exists()
    assert list((run / "logs").iterdir())


def test_a_hostfile_of_this_machine_says_the_slots(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "h").write_text("localhost slots=3 type=CPU\n")
    done = launch("--model", "tiny", "--hostfile", "h", "--dry-run", environment=environment, cwd=tmp_path)
    assert done.returncode == 0 and "would run on localhost: slots 0,1,2:" in done.stdout


def test_a_dry_run_for_other_machines_shows_both_commands(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "h").write_text("gpu1 slots=2 type=NVIDIA\ngpu2 slots=2 type=NVIDIA\n# include: gpu1@gpu2:1\n")
    done = launch("--model", "tiny", "--hostfile", "h", "--dry-run", "--", "--max_steps", "3", environment=environment,
                  cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("name lookup") == 2  # what a start would find
    assert "would run on gpu1: slots 0,1; gpu2: slots 1:" in done.stdout
    assert "lanspeed, Python" not in done.stdout  # at the same path there, as far as is known
    assert f"deepspeed --hostfile=h --include=gpu1@gpu2:1 {ROOT}/trainer/train.py" in done.stdout
    assert done.stdout.count(f"--deepspeed_config {ROOT}/trainer/configs/zero1.json --max_steps 3") == 2
    assert not (tmp_path / "runs").exists()


def test_a_detached_run_is_stopped_by_its_name_and_gone_on_with(environment: dict[str, str], tmp_path: Path,
                                                                texts: Path) -> None:
    done = launch("--model", "tiny", "--dataset", str(texts), "--detach", *SMALL, "--max_steps", "100000",
                  environment=environment, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.startswith("detached: runs/")
    (run,) = (tmp_path / "runs").iterdir()
    wait_until(lambda: steps_made(run) >= 2)
    stopped = launch("--stop", environment=environment, cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    assert f"runs/{run.name}: stopped. Resume it: invoke train --resume runs/{run.name}\n" in stopped.stderr
    assert not ranks_of(run) and list(run.glob("checkpoints/checkpoint-*"))
    assert "training on this machine" in (run / "launch.log").read_text()
    assert launch("--stop", environment=environment, cwd=tmp_path).stderr == "error: no run is active here\n"
    again = launch("--resume", run.name, "--", "--max_steps", str(steps_made(run) + 2), environment=environment,
                   cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(("flags", "place"), [
    ([], "--output_dir runs/"), (["--output_dir", "mine"], "--output_dir mine"),
    (["--resume_from_checkpoint", "runs/old"], "--resume_from_checkpoint runs/old"),
])
def test_the_place_of_a_run_is_told_once(flags: list[str], place: str, environment: dict[str, str],
                                         tmp_path: Path) -> None:
    (tmp_path / "h").write_text("gpu1 slots=2 type=CPU\ngpu2 slots=2 type=CPU\n")
    (tmp_path / "tiny").mkdir()  # a folder of that name is not what is meant
    done = launch("--model", "tiny", "--hostfile", "h", "--dry-run", "--", *flags, environment=environment,
                  cwd=tmp_path)
    ours = done.stdout.splitlines()[1]
    assert done.returncode == 1 and place in ours and "--model_name_or_path tiny " in ours
    assert ours.count("--output_dir") + ours.count("--resume_from") == 1


def test_what_lies_here_is_named_by_its_whole_path(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "h").write_text("gpu1 slots=2 type=CPU\ngpu2 slots=2 type=CPU\n")
    for name in ("a.txt", "b.txt", "held.txt"):
        (tmp_path / name).write_text("words")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    done = launch("--model", "tiny", "--hostfile", "h", "--dataset", "a.txt:0.3", "b.txt", "--dry-run", "--",
                  "--eval_dataset", "held.txt", "--adapter=adapter", environment=environment, cwd=tmp_path)
    assert done.returncode == 1, done.stderr  # the hosts aren't there
    ours = done.stdout.splitlines()[1]
    assert f"--dataset_path {tmp_path}/a.txt:0.3 {tmp_path}/b.txt --eval_dataset {tmp_path}/held.txt " in ours
    assert f"--adapter={tmp_path}/adapter " in ours


@pytest.mark.parametrize(("words", "message"), [
    (["--model", "tiny", "--dataset", "nowhere.jsonl"], "--dataset nowhere.jsonl: no such file or folder"),
    (["--resume", "runs/none", "--model", "tiny"], "runs/none: no such run"), (["--stop", "none"], "none: no such run"),
    ([], "which model?"), (["--model", "tiny", "--include", "gpu1"], "need --hostfile or --nodes"),
])
def test_runs_and_hosts_that_are_not_there_are_told(words: list[str], message: str, environment: dict[str, str],
                                                    tmp_path: Path) -> None:
    done = launch(*words, environment=environment, cwd=tmp_path)
    assert done.returncode in (1, 2) and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("word", ["1X=2", "NOT_SET_HERE", "=3"])
def test_a_variable_must_have_a_name_and_a_value(word: str, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "h").write_text("gpu1 slots=2 type=CPU\n")
    done = launch("--model", "tiny", "--hostfile", "h", "--env", word, environment=environment, cwd=tmp_path)
    assert done.returncode == 2 and f"--env {word}: NAME=VALUE" in done.stderr


@pytest.mark.parametrize(("hosts", "words"), [("", []), ("gpu1 slots=2 type=CPU\n", ["--hostfile", "h"])])
def test_a_config_that_would_be_refused_starts_nothing(hosts: str, words: list[str], environment: dict[str, str],
                                                       tmp_path: Path) -> None:
    (tmp_path / "h").write_text(hosts)
    (tmp_path / "c.json").write_text('{"train_batch_size": 1,\n "gradient_cliping": 1,\n "fp16": {"opt_level": 1}}')
    done = launch("--model", "tiny", "--config", "c.json", *words, environment=environment, cwd=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "runs").exists()
    assert "c.json:2: warning $.gradient_cliping" in done.stderr and "c.json:3: error $.fp16.opt_level" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: c.json has ")
    assert "invoke validate --fix c.json" in done.stderr


@pytest.mark.parametrize(("text", "words", "code", "message"), [
    (None, [], 1, "error: h: No such file"), ("gpu1 slots=two\n", [], 1, "error: h:1: not 'HOST slots=N'"),
    ("gpu1 slots=2\n", ["--slots", "2"], 2, "the hostfile has slots of its own"),
    ("gpu1 slots=2\n", ["--config", "nowhere.json"], 2, "--config nowhere.json: no such file")])
def test_a_hostfile_that_does_not_serve_is_told(text: str | None, words: list[str], code: int, message: str,
                                                environment: dict[str, str], tmp_path: Path) -> None:
    if text:
        (tmp_path / "h").write_text(text)
    done = launch("--model", "tiny", "--hostfile", "h", *words, environment=environment, cwd=tmp_path)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_nothing_is_compiled_nor_a_compiler_needed(environment: dict[str, str], tmp_path: Path, texts: Path) -> None:
    environment["PATH"] = str(tmp_path / "empty")
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
    for config in ("cpu", "zero2_offload"):
        done = launch("--model", "tiny", "--dataset", str(texts), "--config",
                      str(ROOT / "trainer" / "configs" / f"{config}.json"), *SMALL, "--max_steps", "2",
                      environment=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "extensions").exists()


def test_a_dry_run_prints_both_commands_and_starts_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    done = launch("--model", "tiny", "--dry-run", "--slots", "2", environment=environment, cwd=tmp_path)
    assert done.returncode == 0
    assert "would run on localhost: slots 0,1:" in done.stdout
    assert "deepspeed --include localhost:0,1" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("words", "message"), [
    (["--slots", "0"], "--slots 0: at least 1"),
    (["--min-hosts", "0"], "--min-hosts 0: at least 1"),
    (["--min-hosts", "3"], "--min-hosts 3: there is only 1"),
    (["--config", "nowhere.json"], "nowhere.json: no such file. Presets: "),
    (["--dataset", "notez/"], "error: --dataset notez/: no such file or folder: did you mean notes?\n"),
    (["--dataset", "./nothing.txt"], "--dataset ./nothing.txt: no such file or folder\n"),
    (["--slots", "x"], "invalid int value")])
def test_wrong_usage_is_one_line(words: list[str], message: str, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    done = launch("--model", "tiny", *words, environment=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_wrong_flag_of_the_trainer_is_told_once(environment: dict[str, str], tmp_path: Path) -> None:
    done = launch("--model", "tiny", "--slots", "2", "--", "--max_stepz", "3", environment=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: unknown argument --max_stepz: did you mean --max_steps?\n"
    assert "Traceback" not in done.stdout + done.stderr and "training failed" not in done.stderr


def test_bad_data_is_told_once_by_two_ranks(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    done = launch("--model", "tiny", "--dataset", "bad.jsonl", "--slots", "2", environment=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1 and "error: --dataset bad.jsonl:1: not JSON" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@contextmanager
def launched(environment: dict[str, str], run: Path, texts: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A two-rank training that runs until it is stopped."""
    command = [sys.executable, str(TOOL), "--model", "tiny", "--dataset", str(texts), "--slots", "2", *words, *SMALL,
               "--max_steps", "100000", "--output_dir", str(run)]
    with (run.parent / "log.txt").open("wb") as log, subprocess.Popen(
            command, env=environment, cwd=run.parent, stdout=log, stderr=log, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_saves_on_all_ranks_and_leaves_nothing(number: signal.Signals, environment: dict[str, str],
                                                        tmp_path: Path, texts: Path) -> None:
    run = tmp_path / "run"
    with launched(environment, run, texts) as process:
        wait_until(lambda: steps_made(run) >= 3)
        process.send_signal(number)
        assert process.wait(120) == 0
    assert ranks_of(run) == []
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    assert "stopped at step" in (tmp_path / "log.txt").read_text()


def test_twice_ends_at_once(environment: dict[str, str], tmp_path: Path, texts: Path) -> None:
    run = tmp_path / "run"
    with launched(environment, run, texts) as process:
        wait_until(lambda: steps_made(run) >= 2)
        for pid in ranks_of(run):
            if "trainer/train.py" in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split(" -m ")[0]:
                os.kill(pid, signal.SIGSTOP)  # a rank that can't save
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(45) == 1  # the grace is 60 s
    assert ranks_of(run) == []


def test_a_rank_that_dies_ends_the_job(environment: dict[str, str], tmp_path: Path, texts: Path) -> None:
    run = tmp_path / "run"
    with launched(environment, run, texts) as process:
        wait_until(lambda: steps_made(run) >= 2)
        os.kill(max(ranks_of(run)), signal.SIGKILL)
        assert process.wait(120) == 1
    assert ranks_of(run) == []
    assert re.search(r"localhost, rank \d: killed by SIGKILL", (tmp_path / "log.txt").read_text())


def test_ranks_don_t_outlive_deepspeeds_launcher(environment: dict[str, str], tmp_path: Path, texts: Path) -> None:
    run = tmp_path / "run"
    with launched(environment, run, texts) as process:
        wait_until(lambda: steps_made(run) >= 2)
        launcher = min(pid for pid in ranks_of(run) if pid != process.pid)
        os.kill(launcher, signal.SIGKILL)
        wait_until(lambda: not set(ranks_of(run)) - {process.pid})
        assert process.wait(60) != 0


def test_a_record_of_a_killed_run_is_completed(tmp_path: Path) -> None:
    mark_failed(tmp_path, 9)
    assert not (tmp_path / "run.json").exists()
    for odd in ("[]", "5", "{" * 100_000):  # a host may send anything as its record
        (tmp_path / "run.json").write_text(odd)
        mark_failed(tmp_path, 9)
        assert (tmp_path / "run.json").read_text() == odd
    (tmp_path / "run.json").write_text('{"status": "running"}')
    mark_failed(tmp_path, 9)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["exit"]) == ("failed", 9)
    (tmp_path / "run.json").write_text('{"status": "finished", "exit": 0}')
    mark_failed(tmp_path, 9)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(("wanted", "gpus", "visible", "expected"), [
    (None, 0, None, [0]), (3, 0, None, [0, 1, 2]), (None, 4, None, [0, 1, 2, 3]), (2, 4, None, [0, 1]),
    (None, 2, "2,5", [2, 5]), (1, 2, "2,5", [2])])
def test_slots_are_devices(wanted: int | None, gpus: int, visible: str | None, expected: list[int]) -> None:
    found = choose_slots(wanted, Gpus(gpus, "NVIDIA" if gpus else "CPU"), {"CUDA_VISIBLE_DEVICES": visible or ""})
    assert list(found.use) == expected


def test_slots_that_are_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="--slots 3: this machine has 2 usable GPUs"):
        choose_slots(3, Gpus(2, "NVIDIA"), {})
    with pytest.raises(UsageError, match="takes numbers only"):
        choose_slots(None, Gpus(1, "NVIDIA"), {"CUDA_VISIBLE_DEVICES": "GPU-1234"})


def test_a_failed_training_on_this_machine_is_restarted(environment: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text("import os, sys\nprint('rank', os.environ['RANK'])\n"
                      "sys.exit(0 if os.path.exists('tried') else open('tried', 'w').close() or 3)\n")
    done = launch("--script", "own.py", "--no-local-rank", "--restarts", "1", environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "localhost, rank 0: exited with code 3" in done.stderr and "restart 1 of 1" in done.stderr
    assert done.stdout == "rank 0\nrank 0\n"


def test_a_training_that_hangs_on_this_machine_is_reported(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(4)\n")
    done = launch("--script", "own.py", "--no-local-rank", "--stall-timeout", "1", environment=environment,
                  cwd=tmp_path)
    assert done.returncode == 0 and "NO PROGRESS" in done.stderr, done.stderr


def test_a_run_is_named_after_time_and_model() -> None:
    assert new_run_path("meta-llama/Llama 3.2!").name.endswith("-Llama-3.2")
