"""One gigabyte to many hosts: `invoke sync` against rsync to one after the other, and to all side by side.

    sudo .venv/bin/python benchmarks/fanout.py [--megabytes 1000] [--hosts 2 4 8] [--rounds 1]

Machines of the tests' lab, each behind a link of 200 Mbit/s in both directions, this one too. Ratios are to the time of
rsync to a single host, which is what the link itself allows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MBIT = 200
MEMORY = Path("/dev/shm")  # noqa: S108, so that no disk is measured
if TYPE_CHECKING:
    from lab.bare import BareDesk

SHAPE = f"root tbf rate {MBIT}mbit burst 256kb latency 200ms"


def fresh(desk: BareDesk) -> None:
    """Take away what the hosts have got."""
    for host in desk.hosts.values():
        for path in host.home.iterdir():
            if path.name != ".ssh":
                shutil.rmtree(path)


def ours(desk: BareDesk, data: Path) -> float:
    """Return the seconds of a sync of the data (and lanspeed's own two megabytes)."""
    began = time.monotonic()
    desk.sync("--dataset", str(data))
    return time.monotonic() - began


def rsync(desk: BareDesk, data: Path, together: bool, hosts: int | None = None) -> float:
    """Return the seconds of rsync to the hosts, over OpenSSH with its default cipher."""
    where = desk.words()
    shell = "ssh -o StrictHostKeyChecking=accept-new -o BatchMode=yes"
    began = time.monotonic()
    running = []
    for name in list(desk.hosts)[:hosts]:
        words = [*where[: where.index(sys.executable)], "rsync", "-a", "-e", shell, str(data), f"{name}:"]
        running.append(subprocess.Popen(words, stdin=subprocess.DEVNULL))
        if not together:
            running[-1].wait()
    if any(process.wait() for process in running):
        raise SystemExit("fanout.py: rsync failed")
    return time.monotonic() - began


def main() -> None:
    """Print a line for each number of hosts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    for name in ("rsync", "tc"):
        if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
            raise SystemExit(f"fanout.py: needs {name}: sudo apt install rsync iproute2")
    from lab.bare import BareDesk
    from lab.hosts import Lab

    folder = Path(tempfile.mkdtemp(prefix="lanspeed-fanout-", dir=MEMORY))
    lab = Lab(folder)
    try:
        desk = BareDesk(lab, [f"gpu{number}" for number in range(1, max(options.hosts) + 1)])
        every = dict(desk.hosts)
        for host in lab.hosts:
            host.network(f"tc qdisc add dev eth0 {SHAPE}")
            lab.switch.network(f"tc qdisc add dev port{host.address.rpartition('.')[2]} {SHAPE}")
        data = desk.folder / "data"
        data.mkdir()
        block = os.urandom(1 << 20)
        with (data / "weights.bin").open("wb") as file:
            for number in range(options.megabytes * 1_000_000 >> 20):
                file.write(number.to_bytes(8, "big") + block[8:])
        for _ in range(options.rounds):
            single = rsync(desk, data, together=False, hosts=1)
            fresh(desk)
            print(f"rsync to one host: {single:.1f} s ({options.megabytes / single:.1f} MB/s)", flush=True)
            for count in options.hosts:
                desk.hosts = dict(list(every.items())[:count])
                took = {"sync": ours(desk, data)}
                fresh(desk)
                took["rsync side by side"] = rsync(desk, data, together=True)
                fresh(desk)
                took["rsync one by one"] = rsync(desk, data, together=False)
                fresh(desk)
                print(f"{count} hosts: " + ", ".join(f"{name} {seconds:.1f} s ({seconds / single:.2f}x)"
                                                     for name, seconds in took.items()), flush=True)
    finally:
        lab.end()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
