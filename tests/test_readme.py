"""The README is true: every command in it exists, takes those flags, and every file that it names is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from trainer.options import build_parser

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line]
# Tasks whose flags after -- go to a tool of the master; the others hand on to the trainer.
MASTER_TOOLS = {"setup-keys": "setup_keys", "hostfile": "generate_hostfile", "validate": "validate_ds_config",
                "check": "check_cluster", "sync": "sync_nodes"}


def known_flags(*command: str) -> str:
    return subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True).stdout


def check_trainer_flags(words: list[str]) -> None:
    build_parser().parse(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_exists_and_takes_its_flags(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
        assert words[1] in targets
        assert all(word.split("=")[0] in (ROOT / "Makefile").read_text() for word in words[2:])
    elif words[0] == "invoke":
        cut = words.index("--") if "--" in words else len(words)
        shown = known_flags("-m", "invoke", words[1])
        assert "Docstring:" in shown
        assert all(word in shown for word in words[2:cut] if word.startswith("--"))
        if words[1] in MASTER_TOOLS:
            shown = known_flags(f"master/{MASTER_TOOLS[words[1]]}.py")
            assert all(word in shown for word in words[cut + 1 :] if word.startswith("--"))
        elif cut < len(words) and words[1] != "test":  # whose flags are those of pytest
            check_trainer_flags(["--model_name_or_path", "tiny", *words[cut + 1 :]])
    elif words[0] in ("python", "deepspeed", "torchrun"):
        script = next(number for number, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[script]).is_file()
        check_trainer_flags(words[script + 1 :])
    elif words[0] in ("bash", "python3", "ssh"):
        assert (ROOT / words[-1]).is_file()
    else:
        assert words[0] == "."


def test_each_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"`((?:trainer|master|worker|schemas|benchmarks)/[\w/.]+)`", README))
    assert named
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize("folder", ["master", "worker", "schemas", "trainer"])
def test_the_tree_has_each_source_file_and_no_other(folder: str) -> None:
    tree = README[README.index("## The tree") :]
    block = re.search(rf"^{folder}/.*\n(?: .*\n)*", tree, re.M)
    assert block
    named = set(re.findall(r"[\w.]+\.(?:py|sh|json)\b", block[0]))
    found = [path for path in (ROOT / folder).rglob("*.*")
             if path.parent.name not in ("rules", "configs", "__pycache__")]
    assert named == {path.name for path in found} - {"__init__.py"}


def test_each_preset_stands_in_the_table() -> None:
    for path in (ROOT / "trainer" / "configs").glob("*.json"):
        assert f"`trainer/configs/{path.name}`" in README


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 250
