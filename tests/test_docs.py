"""The docs are true: every command in them exists and takes those flags; every file, link and message is there."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from trainer.options import build_parser

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT): page.read_text() for page in PAGES}
README = TEXTS[Path("README.md")]
COMMANDS = sorted({line for text in TEXTS.values() for block in re.findall(r"```sh\n(.*?)```", text, re.S)
                   for line in block.splitlines() if line})
LINKS = [(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)
         if "://" not in link]


@functools.cache
def known_flags(*command: str) -> str:
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_trainer_flags(words: list[str]) -> None:
    build_parser().parse(words)


def is_known(flag: str, shown: str) -> bool:
    return bool(re.search(rf"{re.escape(flag.split('=')[0])}(?![\w-])", shown))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_exists_and_takes_its_flags(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert words[1] in set(re.findall(r"^([a-z]+):", makefile, re.M))
        assert all(word.split("=")[0] in makefile for word in words[2:])
    elif words[0] == "invoke":
        cut = words.index("--") if "--" in words else len(words)
        shown = known_flags("-m", "invoke", words[1])
        assert shown.lower().startswith("usage: inv")
        unknown = [number for number, word in enumerate(words[2:cut], 2)
                   if word.startswith("--") and not is_known(word, shown)]
        if words[1] == "train" and unknown:  # the trainer's own, or those of --script
            others = words[unknown[0] : cut]
            if "--script" not in words:
                check_trainer_flags(["--model_name_or_path", "tiny", *others])
        else:
            assert not unknown
        assert cut == len(words) or words[1] == "test"  # whose flags are those of pytest
    elif words[0] in ("python", "deepspeed", "torchrun"):
        script = next(number for number, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[script]).is_file()
        if words[script].startswith("trainer/") and "--help" not in words:
            check_trainer_flags(words[script + 1 :])
        elif words[script].startswith("master/"):
            assert all(is_known(word, known_flags(words[script])) for word in words if word.startswith("--"))
    elif words[0] in ("bash", "python3", "ssh"):
        assert (ROOT / words[-1]).is_file()
    else:
        assert words[0] == "."


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_each_link_leads_somewhere(page: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path
    assert target.is_file()
    lines = target.read_text().splitlines() if target.suffix == ".md" else []
    headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines
                if line.startswith("#")]
    assert not anchor or anchor in headings


def test_each_page_is_linked() -> None:
    assert all(f"({page})" in README for page in TEXTS if page != Path("README.md"))


@pytest.mark.parametrize("page", TEXTS, ids=str)
def test_each_file_that_is_named_is_there(page: Path) -> None:
    named = set(re.findall(r"`((?:trainer|master|worker|schemas|benchmarks|tests)/[\w/.]+)`", TEXTS[page]))
    assert all((ROOT / name).exists() for name in named), named


@pytest.mark.parametrize("folder", ["master", "worker", "schemas", "trainer"])
def test_the_tree_has_each_source_file_and_no_other(folder: str) -> None:
    text = TEXTS[Path("CONTRIBUTING.md")]
    block = re.search(rf"^{folder}/.*\n(?: .*\n)*", text[text.index("## The tree") :], re.M)
    assert block
    named = set(re.findall(r"[\w.]+\.(?:py|sh|json)\b", block[0]))
    found = [path for path in (ROOT / folder).rglob("*.*")
             if path.parent.name not in ("rules", "configs", "__pycache__")]
    assert named == {path.name for path in found} - {"__init__.py"}


def test_each_message_that_is_explained_exists() -> None:
    """Of each row of the table, every quoted message stands in the source, whose strings may go over several lines."""
    source = "".join(path.read_text() for folder in ("master", "trainer", "worker")
                     for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".sh"))
    source += (ROOT / "tasks.py").read_text()
    joined = re.sub(r"\"\s*\n\s*f?\"", "", source)
    rows = re.findall(r"^\| (`.*?) \|", TEXTS[Path("docs/troubleshooting.md")], re.M)
    from_elsewhere = {"No route to host", "No space left on device", "killed by SIGKILL"}
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(rows) >= 30
    assert [message for message in messages if message not in joined and message not in from_elsewhere] == []


def test_each_preset_stands_in_the_table() -> None:
    for path in (ROOT / "trainer" / "configs").glob("*.json"):
        assert f"`trainer/configs/{path.name}`" in README


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 250
