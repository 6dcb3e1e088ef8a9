"""Seconds from the command to the first step, over two machines: `invoke train`, against the plain command it prints.

    sudo .venv/bin/python benchmarks/first_step.py

Two machines of the tests' lab, a CPU rank each; data is tokenized before. Both start the same trainer; ours looks at
the hosts first. In turns, five rounds each; the ratio of the medians is ours to plain DeepSpeed's over pdsh.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
ROUNDS = 5
LIMIT = 120.0
if TYPE_CHECKING:
    from lab.desk import Desk


def first_step(desk: Desk, command: list[str], metrics: Path) -> float:
    """Start a command, return the seconds until the first step's loss is written; end everything."""
    from lab.desk import assert_nothing_left, job_processes

    metrics.unlink(missing_ok=True)
    began = time.monotonic()
    job = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        if time.monotonic() - began > LIMIT or job.poll() is not None:
            raise SystemExit(f"first_step.py: it makes no step: {' '.join(command)}")
        time.sleep(0.02)
    seconds = time.monotonic() - began
    job.send_signal(signal.SIGKILL)
    job.wait()
    end = time.monotonic() + 30
    while time.monotonic() < end and (left := [*job_processes(desk), *ranks(desk)]):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    assert_nothing_left(desk)
    time.sleep(1)
    return seconds


def ranks(desk: Desk) -> list[int]:
    """Return the processes on the desk's machines that have a rank: plain DeepSpeed's have no job's name."""
    spaces = {os.readlink(f"/proc/{host.pid}/ns/pid") for host in desk.lab.hosts}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"\0RANK=" in (path / "environ").read_bytes() and os.readlink(path / "ns" / "pid") in spaces:
                found.append(int(path.name))
        except OSError:
            continue
    return found


def main() -> int:
    """Print the medians and their ratio."""
    if os.geteuid():
        print("needs root, for machines in namespaces: sudo .venv/bin/python benchmarks/first_step.py")
        return 0
    if not shutil.which("pdsh"):
        print("needs pdsh: apt install pdsh")
        return 0
    from lab.desk import Desk
    from lab.hosts import Lab

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lab").mkdir()
        (Path(folder) / "texts").mkdir()
        text = "\n\n".join(path.read_text() for path in sorted((ROOT / "master").glob("*.py")))
        (Path(folder) / "texts" / "code.txt").write_text(text)
        lab = Lab(Path(folder) / "lab")
        try:
            desk = Desk(lab, Path(folder) / "texts", Path(folder) / "cache", {"gpu1": 1, "gpu2": 1})
            run = desk.folder / "run"
            settings = ["--", "--sequence_length", "64", "--logging_steps", "1", "--max_steps", "100000",
                        "--output_dir", str(run)]
            ours = desk.words(*settings)
            shown = subprocess.run(desk.words("--dry-run", *settings), capture_output=True, text=True,
                                   stdin=subprocess.DEVNULL)
            command = "exec env " + shown.stdout.splitlines()[-1].strip()
            plain = [*ours[: ours.index(sys.executable)], "sh", "-c", command]
            found: dict[str, list[float]] = {"ours": [], "deepspeed over pdsh": []}
            for number in range(ROUNDS + 1):  # the first round warms caches
                for name, words in zip(found, (ours, plain), strict=True):
                    seconds = first_step(desk, words, run / "metrics.jsonl")
                    if number:
                        found[name].append(seconds)
        finally:
            lab.end()
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    for name, times in found.items():
        print(f"  {name:20s} {middle[name]:5.1f} s ({min(times):.1f} to {max(times):.1f})")
    print(f"  ours takes {middle['ours'] / middle['deepspeed over pdsh']:.2f}x of plain DeepSpeed's time")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
