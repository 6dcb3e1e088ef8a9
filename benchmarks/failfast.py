"""Seconds from the death of one rank to the end of all others: ours, plain `deepspeed` over pdsh, torchrun.

    sudo .venv/bin/python benchmarks/failfast.py

Two machines of the tests' lab, a rank each; the second's is killed, once while both add up numbers all the time (the
other then loses its connection and ends by itself), once while they don't speak (as in an evaluation or a long read).
Each is given 60 seconds, and what is left then is ended. Figures are medians of three; the ratio is the peer's to ours.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LIMIT = 60.0
PROGRAM = """
import time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
while True:
    value = torch.ones(1)
    dist.all_reduce(value)
    time.sleep(0.1 if "speaking" in __file__ else 600)
"""


def running(program: Path) -> list[int]:
    """Return the processes whose command line names the program, but for those that only start it elsewhere."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if str(program).encode() in words and b"RANK=" in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def measure(start: Callable[[], list[subprocess.Popen[bytes]]], program: Path, victim: str) -> float:
    """Start a job, kill the rank in the victim's process id namespace, return the seconds until all have ended."""
    started = start()
    end = time.monotonic() + LIMIT
    while len(running(program)) < 2:
        if time.monotonic() > end:
            raise SystemExit("failfast.py: the ranks never came up")
        time.sleep(0.1)
    time.sleep(3)
    for pid in running(program):
        if os.readlink(f"/proc/{pid}/ns/pid") == victim:
            os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    while (running(program) or any(job.poll() is None for job in started)) and time.monotonic() - killed < LIMIT:
        time.sleep(0.05)
    seconds = time.monotonic() - killed
    for job in started:
        job.kill()
        job.wait()
    for pid in running(program):
        os.kill(pid, signal.SIGKILL)
    return seconds


def rounds(start: Callable[[], list[subprocess.Popen[bytes]]], program: Path, victim: str) -> list[float]:
    """Return three measurements; one where the bound is reached."""
    first = measure(start, program, victim)
    return [first] if first >= LIMIT else [first, *(measure(start, program, victim) for _ in range(2))]


def report(found: dict[str, list[float]]) -> None:
    """Print the medians and their ratios."""
    ours = statistics.median(found["ours"])
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        bound = " or more" if middle >= LIMIT else ""
        print(f"  {name:20s} {middle:5.1f} s{bound}   {middle / ours:.1f}x of ours{bound}", flush=True)


def main() -> int:
    """Print the table."""
    if os.geteuid():
        print("needs root, for machines in namespaces: sudo .venv/bin/python benchmarks/failfast.py")
        return 0
    from lab.hosts import Lab
    from ssh_server import make_key

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lab").mkdir()
        lab = Lab(Path(folder) / "lab")
        try:
            home, desk = lab.master.homes / "root", lab.folder / "desk"
            desk.mkdir()
            (home / ".ssh").mkdir(mode=0o700)
            key = make_key(home / ".ssh" / "id_ed25519").with_suffix(".pub").read_text()
            hosts = [lab.add(name) for name in ("gpu1", "gpu2")]
            for host in hosts:
                (host.homes / "root" / ".ssh").mkdir(mode=0o700)
                (host.homes / "root" / ".ssh" / "authorized_keys").write_text(key)
                host.serve()
            lab.master.resolve(*hosts)
            (desk / "hostfile.txt").write_text("gpu1 slots=1 type=CPU\ngpu2 slots=1 type=CPU\n")
            settings = ["env", "-C", str(desk), f"ROOT={home}", "DS_ACCELERATOR=cpu", "GLOO_SOCKET_IFNAME=eth0",
                        f"PATH={Path(sys.executable).parent}:/usr/bin:/bin"]
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

            def tools(program: Path) -> dict[str, Callable[[], list[subprocess.Popen[bytes]]]]:
                def at_desk(*words: str) -> Callable[[], list[subprocess.Popen[bytes]]]:
                    line = lab.master.words(*settings, *words)
                    return lambda: [subprocess.Popen(line, **quiet)]  # type: ignore[call-overload]

                def torchrun() -> list[subprocess.Popen[bytes]]:
                    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                             f"--master-addr={hosts[0].address}", "--master-port=29555"]
                    return [subprocess.Popen(host.words(*settings, *words, f"--node-rank={rank}", str(program)),
                                             **quiet)  # type: ignore[call-overload]
                            for rank, host in enumerate(hosts)]

                found = {"ours": at_desk(sys.executable, str(ROOT / "master" / "launch_training.py"), "--hostfile",
                                         "hostfile.txt", "--host-keys", "accept-new", "--script", str(program)),
                         "torchrun": torchrun}
                if shutil.which("pdsh"):
                    found["deepspeed over pdsh"] = at_desk(
                        "deepspeed", "--hostfile=hostfile.txt", "--no_local_rank",
                        f"--master_addr={hosts[0].address}", str(program))
                return found

            victim = os.readlink(f"/proc/{hosts[1].pid}/ns/pid")
            for kind in ("speaking", "silent"):
                program = desk / f"{kind}.py"
                program.write_text(PROGRAM)
                print(f"a rank is killed, the other is {kind}", flush=True)
                report({name: rounds(start, program, victim) for name, start in tools(program).items()})
        finally:
            lab.end()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
