"""What a walk begins with: a bare clone, some notes, a folder of wheels in the place of a network."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from filelock import FileLock

NOT_CLONED = (".venv", ".git", "__pycache__", ".*_cache", "runs", "*.egg-info", ".hypothesis", "hostfile.txt")
WORDS = "the pump of the west well was open and its valve shut while the east well rested".split()  # noqa: SIM905


def bare_clone(folder: Path) -> Path:
    """Return a copy of what a clone of the project has, beside a folder of notes in it."""
    clone = folder / "lanspeed"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*NOT_CLONED), symlinks=True)
    (clone / "notes").mkdir()
    for number in range(60):
        text = " ".join(WORDS[(number * step + step) % len(WORDS)] for step in range(1, 90))
        (clone / "notes" / f"{number:02d}.md").write_text(f"Day {number}\n\n{text}.\n")
    return clone


def steps_logged(clone: Path, runs: int = 1) -> int:
    """Return how many lines of losses the newest of so many runs has."""
    files = sorted(clone.glob("runs/*/metrics.jsonl"))
    return files[-1].read_text().count('"loss"') if len(files) == runs else 0


def packages() -> list[str]:
    """Return what `make install` installs, and what builds the project."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = parser["options.extras_require"]
    lines = parser["options"]["install_requires"] + extras["train"] + extras["dpo"] + extras["dev"]
    return [*filter(None, lines.split("\n")), "setuptools", "wheel"]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all wheels, fetched where there is a network; all processes of the tests share it."""
    folder = tmp_path_factory.getbasetemp().parent / "wheels"
    with FileLock(f"{folder}.lock"):
        if not (folder / ".complete").exists():
            done = subprocess.run([
                sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "-w", str(folder),
                "-c", str(ROOT / "constraints.txt"), *packages()], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            (folder / ".complete").touch()
    return folder
