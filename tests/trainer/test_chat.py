"""`invoke chat`: a model answers by its template and ends by itself, continues a text, is compared with its base."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Run, Train
from terminal import Shell

TOOL = ROOT / "master" / "chat_with_run.py"
SHORT = ("--sequence_length", "64", "--eval_fraction", "0", "--num_samples", "0", "--save_steps", "0")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled by the first test: a folder with a run of conversations and an adapter of it."""
    return {}


@pytest.fixture
def desk(kept: dict[str, Path], train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose runs know one question; the newer one is an adapter that knows another."""
    if "desk" not in kept:
        folder = tmp_path_factory.mktemp("desk")
        (folder / "runs").mkdir()
        for name, answer, words in (("20260101-000000-tiny", "My name is Ada.", ("--max_steps", "80")),
                                    ("20260102-000000-tiny", "It is Bob.", ("--max_steps", "120", "--lora", "16",
                                                                            "--learning_rate", "5e-3"))):
            data = folder / f"{answer[:2]}.jsonl"
            turns = [{"role": "user", "content": "Your name?"}, {"role": "assistant", "content": answer}]
            data.write_text(f"{json.dumps({'messages': turns})}\n" * 64)
            model = "tiny" if "--lora" not in words else str(folder / "runs" / "20260101-000000-tiny" / "model")
            made: Run = train(*SHORT, *words, data=data, model=model, name=str(folder / "runs" / name))
            assert made.path.name == name
        kept["desk"] = folder
    return kept["desk"]


def chat(desk: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, TOOL, *words], cwd=desk, capture_output=True, text=True, input=stdin,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.slow
def test_a_run_of_conversations_answers_and_ends_by_itself(desk: Path) -> None:
    done = chat(desk, "20260101-000000-tiny", "--prompt", "Your name?", "--temperature", "0")
    assert (done.returncode, done.stdout) == (0, "My name is Ada.\n"), done.stderr


@pytest.mark.slow
def test_an_adapter_is_compared_with_its_base(desk: Path) -> None:
    done = chat(desk, "--compare", "--prompt", "-", "--temperature", "0", stdin="Your name?")
    assert done.stdout == "[base] My name is Ada.\n[trained] It is Bob.\n", done.stderr


@pytest.mark.slow
def test_plain_continues_the_text(desk: Path) -> None:
    done = chat(desk, "runs/20260101-000000-tiny", "--plain", "--prompt", "My name", "--temperature", "0",
                "--max-new-tokens", "20")
    assert done.stdout.startswith(" is Ada."), done.stdout


@pytest.mark.slow
def test_an_adapter_without_its_base_says_where_it_was(desk: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    shutil.copytree(desk / "runs" / "20260102-000000-tiny" / "model", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(desk / "runs" / "20260101-000000-tiny" / "model")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/model"}))
    lost = chat(desk, str(folder), "--prompt", "x")
    assert lost.returncode == 1 and "is an adapter of /gone/model, which is not here: --base FOLDER" in lost.stderr
    base = str(desk / "runs" / "20260101-000000-tiny" / "model")
    found = chat(desk, str(folder), "--prompt", "Your name?", "--temperature", "0", "--base", base)
    assert found.stdout == "It is Bob.\n"


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), [
    (("nowhere",), "nowhere: no such run"), (("20260103-000000-new",), "has no model yet: invoke train --resume runs/"),
    (("20260101-000000-tiny", "--compare"), "--compare needs a base, and this one was made from scratch")])
def test_what_cannot_be_talked_with_is_told(words: tuple[str, ...], message: str, desk: Path) -> None:
    (desk / "runs" / "20260103-000000-new").mkdir(exist_ok=True)
    done = chat(desk, *words, "--prompt", "x")
    assert done.returncode == 1 and message in done.stderr, done.stderr


def test_without_runs_it_says_how_to_make_one(tmp_path: Path) -> None:
    done = chat(tmp_path, "--prompt", "x")
    assert done.returncode == 1 and "no run here has a model yet: invoke train --model tiny" in done.stderr


@pytest.mark.slow
@pytest.mark.needs("bash")
def test_ctrl_c_ends_an_answer_and_not_the_chat(desk: Path) -> None:
    endless = desk / "endless"  # no token ends its answers but one that it never says
    shutil.copytree(desk / "runs" / "20260101-000000-tiny" / "model", endless)
    for name, key, value in (("tokenizer_config.json", "eos_token", "<|begin|>"), ("config.json", "eos_token_id", 0),
                             ("generation_config.json", "eos_token_id", 0)):
        told = json.loads((endless / name).read_text())
        (endless / name).write_text(json.dumps({**told, key: value}))
    with Shell(["env", "-C", str(desk), "OMP_NUM_THREADS=1"]) as terminal:
        terminal.type(f"{sys.executable} {TOOL} endless --plain --temperature 0 --max-new-tokens 100000")
        terminal.wait_for("\n> ", 60)
        terminal.type("My")
        terminal.during(1)
        terminal.press_ctrl_c()
        terminal.wait_for("[...]", 30)
        terminal.during(1)
        terminal.press_ctrl_c()
        terminal.wait_for("(Ctrl-D ends the chat)")
        terminal.type("/quit")
        terminal.end_of_command()


@pytest.mark.slow
def test_the_card_of_a_model_says_what_it_is(desk: Path) -> None:
    whole = (desk / "runs" / "20260101-000000-tiny" / "model" / "README.md").read_text()
    adapter = (desk / "runs" / "20260102-000000-tiny" / "model" / "README.md").read_text()
    assert "Made from scratch: `tiny`" in whole and "library_name: transformers" in whole
    assert "A LoRA adapter of" in adapter and "library_name: peft" in adapter and "LoRA of rank 16" in adapter
    for text in (whole, adapter):
        assert "More Information Needed" not in text and "training loss" in text and "--max_steps" in text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config", "message"), [
    ("adapter_config.json", {"base_model_name_or_path": "someone/else", "peft_type": "LORA"},
     "has an adapter of someone/else beside its weights"),
    ("config.json", {"model_type": "llama", "text_config": {"experts_implementation": "someone/kernel"}},
     "names code of somebody else (experts_implementation: someone/kernel)")])
def test_what_would_load_or_run_something_else_is_refused(name: str, config: dict[str, object], message: str,
                                                          desk: Path, tmp_path: Path) -> None:
    folder = tmp_path / "planted"
    shutil.copytree(desk / "runs" / "20260101-000000-tiny" / "model", folder)
    (folder / name).write_text(json.dumps(config))
    done = chat(desk, str(folder), "--prompt", "x")
    assert done.returncode == 1 and message in done.stderr, done.stderr
