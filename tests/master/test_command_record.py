"""The flags that a run is resumed with: this machine's own are repeated, a folder from elsewhere is not obeyed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from master.run.command_record import NEEDED, CommandError, flags_to_repeat, own_command, write_command

LAUNCH = Path(__file__).resolve().parents[2] / "master" / "launch_training.py"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder below the folder that a command is typed in."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs") / "20260101-000000-tiny"
    folder.mkdir(parents=True)
    (folder / "hostfile.txt").write_text("localhost slots=1\n")
    return folder


def test_own_flags_are_repeated_without_those_of_the_place(run: Path) -> None:
    words = ["--model_name_or_path", "m", "--dataset_path", "my notes/", "--report_to", "wandb", "tensorboard",
             "--output_dir", "x", "--resume-from-checkpoint=auto", "--max_steps", "-1"]
    words[2:2] = ["--max_steps", "7"]  # of an earlier time
    write_command(run, words)
    assert own_command(run) == words
    assert flags_to_repeat(run, [], ask=True) == ["--model_name_or_path", "m", "--max_steps", "-1", "--dataset_path",
                                                  "my notes/", "--report_to", "wandb", "tensorboard"]


@pytest.mark.parametrize("flag", ["--trust_remote_code", "--allow_pickle"])
def test_what_runs_code_is_typed_in_every_command(flag: str, run: Path) -> None:
    write_command(run, ["--model_name_or_path", "m", flag])
    with pytest.raises(CommandError, match=f"type it again: invoke train --resume {run} {flag}"):
        flags_to_repeat(run, [], ask=True)
    assert flags_to_repeat(run, [flag.replace("_", "-").replace("--", "--")], ask=True) == ["--model_name_or_path", "m"]


def test_flags_with_several_values_are_repeated_whole(run: Path) -> None:
    write_command(run, ["--dataset_path", "a:0.3", "b", "--set", "data_seed=1", "--set", "run_name=x", "--max_steps",
                        "3", "--set", "data_seed=1", "--max_steps", "5"])
    assert flags_to_repeat(run, [], ask=True) == ["--dataset_path", "a:0.3", "b", "--max_steps", "5",
                                                  "--set", "data_seed=1", "--set", "run_name=x"]


@pytest.mark.parametrize("change", ["arguments", "signature", "hostfile.txt", "cluster.json"])
def test_a_changed_record_is_not_ours(change: str, run: Path) -> None:
    write_command(run, ["--model_name_or_path", "m"])
    record = json.loads((run / "command.json").read_text())
    if change in record:
        record[change] = ["--model_name_or_path", "x"] if change == "arguments" else "0" * 64
        (run / "command.json").write_text(json.dumps(record))
    else:
        (run / change).write_text("localhost slots=2\n")
    assert own_command(run) is None


HARMLESS = ["--model_name_or_path", "someone/model", "--max_steps", "10", "--lora", "--learning_rate", "1e-4",
            "--precision", "bf16", "--deepspeed", "--dataset_path", "org/a:0.3", "org/b", "--optim", "adamw_8bit",
            "--lora_targets", "q_proj", "v_proj"]
HARMFUL = [["--trust_remote_code"], ["--allow_pickle"], ["--report_to", "wandb"], ["--cache_dir", "/x"],
           ["--deepspeed_config", "/x.json"], ["--chat_template", "x"], ["--dataset_path", "../.ssh"],
           ["--dataset_path", "/etc"], ["--dataset_path", "notes"], ["--attn_implementation", "someone/kernel"],
           ["--dataset_path", "org/a", "notes:0.5"], ["--set", "debug=underflow_overflow"], ["--optim", "a b"],
           ["--config_overrides", "a=b"], ["--unknown"], ["--trust-remote-code"], ["--max_steps", "$(id)"],
           ["--text_column", "a b"], ["--eval_dataset", "C:\\x"], ["--model_name_or_path", "~/m"]]


@pytest.mark.parametrize("harmful", HARMFUL, ids=" ".join)
def test_a_run_from_elsewhere_gives_names_and_numbers(harmful: list[str], run: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes").mkdir()
    (run / "model").mkdir()
    words = [*HARMLESS, "--eval_dataset", f"{run}/model", *harmful]
    (run / "run.json").write_text(json.dumps({"command": " ".join(f"'{word}'" for word in ["train.py", *words])}))
    if harmful[0] in NEEDED:  # what it trained, or on what, can't be left out without a word
        with pytest.raises(CommandError, match="paths of another machine aren't taken: invoke train --resume "):
            flags_to_repeat(run, [], ask=False)
    typed = [harmful[0], "mine"] if harmful[0] in NEEDED else []
    assert flags_to_repeat(run, typed, ask=False) == [*HARMLESS, "--eval_dataset", f"{run}/model"]
    shown = capsys.readouterr().err
    assert "was not started by lanspeed on this machine" in shown and "left out, type again" in shown
    with pytest.raises(CommandError, match="no terminal to ask on"):
        flags_to_repeat(run, typed, ask=True)


@pytest.mark.parametrize("record", ["{}", "[]", '{"command": 5}', '{"command": "a \'b"}', "{" * 100000])
def test_a_record_that_makes_no_sense_is_one_line(record: str, run: Path) -> None:
    (run / "run.json").write_text(record)
    with pytest.raises(CommandError, match="doesn't say how it was started"):
        flags_to_repeat(run, [], ask=True)


def test_planted_code_does_not_run(run: Path) -> None:
    """A run folder whose model brings Python code, and whose command asks for it."""
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {
        "AutoConfig": "configuration_x.C"}}))
    (run / "model" / "configuration_x.py").write_text("open('planted', 'w')\n")
    command = f"train.py --model_name_or_path {run}/model --trust_remote_code"
    (run / "run.json").write_text(json.dumps({"command": command}))
    (run / "command.json").write_text(json.dumps({"arguments": command.split()[1:], "signature": "0" * 64}))
    done = subprocess.run([sys.executable, str(LAUNCH), "--resume", str(run)], capture_output=True, text=True)
    assert done.returncode == 1 and "left out, type again what you want: --trust_remote_code" in done.stderr
    assert not Path("planted").exists()
