"""Make lanspeed's Python environment, with pip, and show what is being fetched; `make install` calls it.

    python3 master/make_environment.py .venv --extras train,dpo,dev

Needs nothing but Python. Where no GPU is found, PyTorch comes without CUDA if PyTorch's own index answers. Other flags
go to pip.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # wheels of 0.2 GB, on PyPI those with CUDA take 3
INDEX_LIMIT_S = 10
INDEX_FLAGS = ("--index-url", "-i", "--extra-index-url", "--no-index")  # who names one of these has chosen
INDEX_VARIABLES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX")
OFTEN_S, SELDOM_S = 0.5, 30.0  # between two lines of progress, on a terminal and elsewhere
UNREACHABLE = re.compile("Retrying|ConnectionError|Temporary failure|Network is unreachable")
FETCHED = re.compile(r"Downloading (\S+?)-([0-9][^-]*)\S*(?: \(([0-9.]+ [kMG]B)\))?")


def has_gpu() -> bool:
    """Return whether this machine has a GPU; True where that can't be told."""
    script = ROOT / "worker" / "detect_gpus.sh"
    done = subprocess.run(["bash", str(script), "--json"], capture_output=True, text=True)
    return '"vendor": "NONE"' not in done.stdout


def index_flags(words: Sequence[str]) -> list[str]:
    """Return the flags for PyTorch's index of CPU wheels, [] where it isn't wanted or doesn't answer."""
    chosen = any(word.partition("=")[0] in INDEX_FLAGS for word in words) or any(map(os.environ.get, INDEX_VARIABLES))
    if chosen or has_gpu():
        return []
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=INDEX_LIMIT_S):  # noqa: S310, a fixed address
            return ["--extra-index-url", CPU_INDEX]
    except OSError:
        print("no GPU here; PyTorch's own index doesn't answer, and PyPI's wheels bring 3 GB of CUDA", flush=True)
        return []


def show_progress(lines: Iterator[str], log: Path) -> None:
    """Keep pip's lines in a log, and show what it is doing: on a terminal in one line that changes."""
    started, said, count, doing = time.monotonic(), 0.0, 0, "looking for packages"
    terminal = sys.stdout.isatty()
    with log.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            file.flush()
            if line.startswith("Collecting "):
                count += 1
            elif found := FETCHED.search(line):
                doing = f"downloading {found[1]} {found[2]}" + (f", {found[3]}" if found[3] else "")
            elif line.startswith("Installing collected packages"):
                doing = "unpacking"
            now = time.monotonic()
            if now - said > (OFTEN_S if terminal else SELDOM_S):
                said, text = now, f"{now - started:.0f} s, {count} packages: {doing}"
                print(f"\r{text[:78]:78}" if terminal else text, end="" if terminal else "\n", flush=True)
    if terminal:
        print(f"\r{'':78}\r", end="", flush=True)


def what_failed(log: Path) -> str:
    """Return why pip failed, in a line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if "No space left" in text:
        return "no space left on the disk of the environment: make VENV=/elsewhere"
    if UNREACHABLE.search(text):
        return "the package index cannot be reached: is there a network? (proxy: export HTTPS_PROXY=...)"
    errors = [line for line in text.splitlines() if line.startswith("ERROR")]
    return f"installing failed: {errors[0] if errors else 'pip ended without a word'} (all of it: {log})"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the environment; return 0, 1 if something failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    extras = words.pop(words.index("--extras") + 1) if "--extras" in words else "train"
    place, *more = [word for word in words if word != "--extras"]
    venv = Path(place)
    log, python = venv / "install.log", venv / "bin" / "python"
    if subprocess.run([sys.executable, "-m", "venv", str(venv)]).returncode:
        return 1
    log.write_text("")
    print(f"installing into {venv}, a few minutes the first time (what pip says: {log})", flush=True)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off",
               *index_flags(more), *more, "-e", f"{ROOT}[{extras}]", "-c", str(ROOT / "constraints.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout
        show_progress(iter(pip.stdout.readline, ""), log)
    if pip.returncode:
        print(f"make: {what_failed(log)}")
        return 1
    own = "" if venv.resolve() == ROOT / ".venv" else f"LANSPEED_VENV={venv} "
    print(f"installed. Next: {own}./lanspeed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
