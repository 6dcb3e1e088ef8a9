"""How fast the tools answer: `invoke --list` and every --help against `deepspeed --help`, in turns, in one run.

    python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
COMMANDS = {
    "invoke --list": [str(BIN / "invoke"), "--list"],
    "invoke train --help": [str(BIN / "invoke"), "train", "--help"],
    "launch_training.py --help": [sys.executable, "master/launch_training.py", "--help"],
    "train.py --help": [sys.executable, "trainer/train.py", "--help"],
}
PEER = [str(BIN / "deepspeed"), "--help"]
ROUNDS = 7


def seconds(command: list[str]) -> float:
    """Return the wall time of one run of a command."""
    started = time.perf_counter()
    subprocess.run(command, cwd=HOME, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> int:
    """Print each command's median time, the peer's, and the median of their ratios, taken pair by pair."""
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
