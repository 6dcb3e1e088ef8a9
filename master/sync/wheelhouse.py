"""What nodes are given to install: packages by setup.cfg and constraints.txt, and a folder of wheels where they have
no internet."""

from __future__ import annotations

import configparser
import contextlib
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from master.core.paths import ROOT
from master.sync.file_trees import Tree, TreeError

ERROR_PREFIXES = ("ERROR", "error", "\N{MULTIPLICATION SIGN}")  # how pip's and uv's lines begin that say what is wrong
WHEELS = "~/.lanspeed/wheels"


def requirements(gpu: bool = False) -> list[str]:
    """Return what a node needs, from setup.cfg; `gpu`: the faster kernels for NVIDIA's cards too."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = parser["options.extras_require"]
    lines = parser["options"]["install_requires"] + extras["train"] + extras["dpo"] + (extras["gpu"] if gpu else "")
    return [line for line in lines.split("\n") if line]


def find_uv() -> str:
    """Return the path of uv here; raise TreeError if there is none."""
    with contextlib.suppress(ImportError, FileNotFoundError):
        import uv

        return str(uv.find_uv_bin())
    raise TreeError("uv is missing here: make install")


def wheels(folder: Path) -> Tree:
    """Return a folder of wheels as it goes to the nodes."""
    tree = Tree("wheels", [WHEELS], whole=True)
    for path in sorted(folder.glob("*.whl")):
        tree.add(path.name, str(path), str(folder))
    return tree


def fill_wheelhouse(folder: Path, index_url: str, say: Callable[[str], None]) -> None:
    """Fetch what a folder of wheels lacks, for this machine's kind and Python. Raises TreeError."""
    if not missing_wheels(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    say(f"fetching wheels into {folder}")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "-w", str(folder),
               "--find-links", str(folder), "-c", str(ROOT / "constraints.txt"),
               *requirements(find_spec("liger_kernel") is not None),  # as here
               *(["--index-url", index_url] if index_url else [])]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise TreeError(f"--wheelhouse {folder}: {last_line(done.stderr)}")
    if why := missing_wheels(folder):
        raise TreeError(f"--wheelhouse {folder}: {why}")


def missing_wheels(folder: Path) -> str:
    """Return why a folder of wheels is not enough, "" if it is."""
    command = [find_uv(), "pip", "compile", "--no-config", "--quiet", "--no-index", "--find-links", str(folder),
               "-c", str(ROOT / "constraints.txt"), "--python", sys.executable, "-o", "/dev/null", "-"]
    done = subprocess.run(command, input="\n".join(requirements()), capture_output=True, text=True)
    return last_line(done.stderr) if done.returncode else ""


def last_line(text: str) -> str:
    """Return the error line of a program that failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith(ERROR_PREFIXES)), lines[-1] if lines else "?")[:300]
