"""How fast the tools answer: `invoke --list` against an empty tasks.py, every --help against `deepspeed --help`.

    python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LIST = [str(BIN / "invoke"), "--list"]
COMMANDS = {
    "invoke --list": LIST,
    "invoke train --help": [str(BIN / "invoke"), "train", "--help"],
    "launch_training.py --help": [sys.executable, "master/launch_training.py", "--help"],
    "train.py --help": [sys.executable, "trainer/train.py", "--help"],
}
PEER = [str(BIN / "deepspeed"), "--help"]
ROUNDS, LIST_ROUNDS = 7, 9


def seconds(command: list[str], folder: Path = ROOT) -> float:
    """Return the wall time of one run of a command."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def compare_list() -> None:
    """Print what `invoke --list` takes here and with one empty task; 1.2 times as much is the limit."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tasks.py").write_text("from invoke import task\n\n\n@task\ndef nothing(c):\n    pass\n")
        pairs = [(seconds(LIST), seconds(LIST, Path(folder))) for _ in range(LIST_ROUNDS)]
    own, empty = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"invoke --list: {own * 1000:.0f} ms, an empty tasks.py {empty * 1000:.0f} ms: {own / empty:.2f} times\n")


def main() -> int:
    """Print each command's median time, the peer's, and the median of their ratios, taken pair by pair."""
    compare_list()
    seconds(PEER)  # once, to fill the disk cache
    print(f"{'command':28} {'ms':>6} {'deepspeed --help':>18} {'times faster':>14}")
    for name, command in COMMANDS.items():
        pairs = [(seconds(command), seconds(PEER)) for _ in range(ROUNDS)]
        own, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(theirs / ours for ours, theirs in pairs)
        print(f"{name:28} {own * 1000:6.0f} {peer * 1000:15.0f} ms {ratio:14.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
