"""`invoke train --like RUN`: the flags of an earlier run in a new one, and what differs from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from trainer.flags.run_names import short_name
from trainer.results.likeness import VARIABLE, differences

TOOL = ROOT / "master" / "launch_training.py"


def launch(*words: str, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, TOOL, *words], env=environment, cwd=cwd, capture_output=True, text=True,
                          timeout=200, stdin=subprocess.DEVNULL)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.slow
def test_a_run_is_repeated_and_compared(environment: dict[str, str], tmp_path: Path, texts: Path) -> None:
    words = ("--max_steps", "2", "--sequence_length", "64", "--seed", "7", "--num_samples", "0")
    first = launch("--model", "tiny", "--dataset", str(texts), *words, environment=environment, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (run,) = (tmp_path / "runs").iterdir()
    shutil.copytree(run, tmp_path / "sent")  # the flags are signed, wherever the folder lies
    record = json.loads((tmp_path / "sent" / "run.json").read_text())
    record["versions"]["torch"], record["data_key"] = "0.4", "another"
    (tmp_path / "sent" / "run.json").write_text(json.dumps(record))
    again = launch("--like", "sent", "--max_steps", "3", environment=environment, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "like sent, but torch: 0.4 then, " in again.stdout and "like sent, but the data, or how they" in again.stdout
    new = max((tmp_path / "runs").iterdir())
    found = json.loads((new / "run.json").read_text())
    assert new != run and found["seed"] == 7 and found["steps"] == 3
    command = json.loads((new / "command.json").read_text())["arguments"]
    assert command.count("--seed") == command.count("--dataset_path") == 1
    losses = [json.loads((each / "metrics.jsonl").read_text().splitlines()[1])["loss"] for each in (run, new)]
    assert losses[0] == losses[1]


def test_what_somebody_sent_is_asked_about(environment: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "20260101-000000-tiny"
    run.mkdir(parents=True)
    (run / "command.json").write_text(json.dumps({"arguments": [
        "--model_name_or_path", "tiny", "--max_steps", "3", "--trust_remote_code", "--output_dir", "/etc"]}))
    done = launch("--like", run.name, environment=environment, cwd=tmp_path)
    assert done.returncode == 1 and "no terminal to ask on" in done.stderr
    shown = launch("--like", run.name, "--dry-run", environment=environment, cwd=tmp_path)
    assert "--max_steps 3" in shown.stdout and "/etc" not in shown.stdout and "trust_remote_code" not in shown.stdout


def test_paths_of_another_machine_have_to_be_named_here(environment: dict[str, str], tmp_path: Path, texts: Path
                                                        ) -> None:
    run = tmp_path / "sent"
    run.mkdir()
    (run / "command.json").write_text(json.dumps({"arguments": [
        "--model_name_or_path", "/their/model", "--dataset_path", "/their/data.jsonl", "--max_steps", "3"]}))
    done = launch("--like", "sent", environment=environment, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.endswith(
        "error: sent: paths of another machine aren't taken: invoke train --like sent --model M --dataset D\n")
    done = launch("--like", "sent", "--model", "tiny", environment=environment, cwd=tmp_path)
    assert done.stderr.endswith("aren't taken: invoke train --like sent --dataset D\n"), done.stderr
    shown = launch("--like", "sent", "--model", "tiny", "--dataset", str(texts), "--dry-run", environment=environment,
                   cwd=tmp_path)
    assert shown.returncode == 0 and "--max_steps 3" in shown.stdout and "their" not in shown.stdout + shown.stderr


@pytest.mark.parametrize(("words", "message"), [
    (["--like", "nope"], "nope: no such run"),
    (["--like", "x", "--resume", "y"], "give neither --resume nor --script")])
def test_wrong_usage_is_one_line(words: list[str], message: str, environment: dict[str, str], tmp_path: Path) -> None:
    done = launch(*words, environment=environment, cwd=tmp_path)
    assert done.returncode in (1, 2) and message in done.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"versions": 3, "run": []}', '{"versions": {"a": {}}}'])
def test_what_is_compared_may_be_anything(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert isinstance(differences({"versions": {"torch": "2"}}), list)


@pytest.mark.parametrize(("model", "name"), [
    ("openai-community/gpt2", "gpt2"), ("gpt2/", "gpt2"), ("runs/20260101-000000-gpt2/model", "gpt2"),
    ("/data/llama/model", "llama"), ("20260101-000000-Llama-3.2/adapter", "Llama-3.2"), ("...", "model")])
def test_a_run_is_called_after_what_was_trained(model: str, name: str, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_name(model) == name


def test_runs_are_listed_the_newest_first(tmp_path: Path) -> None:
    for name, status in (("20260101-000000-tiny", "finished"), ("20260102-000000-gpt2", "failed")):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"status": status, "steps": 10, "world_size": 2}))
        (run / "metrics.jsonl").write_text('{"step": 4, "loss": 2.5, "tokens_per_second": 4321.0}\n')
    tool = [sys.executable, str(ROOT / "master" / "list_runs.py")]
    shown = subprocess.run(tool, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[:2] for line in shown] == [
        ["run", "status"], ["runs/20260102-000000-gpt2", "failed"], ["runs/20260101-000000-tiny", "finished"]]
    assert shown[1].split()[2:] == ["4/10", "2.5000", "4,321", "2"]
    found = json.loads(subprocess.run([*tool, "--json"], cwd=tmp_path, capture_output=True, text=True).stdout)
    assert [each["status"] for each in found] == ["failed", "finished"]
    os.chmod(tmp_path / "runs" / "20260102-000000-gpt2", 0o777)
    foreign = subprocess.run(tool, cwd=tmp_path, capture_output=True, text=True)
    assert "gpt2" not in foreign.stdout and "1 more belong to others" in foreign.stderr
