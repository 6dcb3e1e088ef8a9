"""One job on very many hosts: the CPU time of the process that supervises them.

    python benchmarks/supervisor.py

The hosts are simulated by one process that answers over socket pairs as worker/run_node.py does: it starts, prints a
line a second, reports steps and a heartbeat, and ends. The supervisor is the real one. The ratio is 1,000 hosts to 250;
4 would be as much for each host.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from master.inventory.node_facts import RemoteCheckout  # noqa: E402
from master.ssh.channel import wait_for  # noqa: E402
from master.ssh.node_names import Node  # noqa: E402
from master.ssh.route import SshOptions  # noqa: E402
from master.training import node_link, supervisor  # noqa: E402
from master.training.job import HostAssignment, Supervision  # noqa: E402
from master.training.rank_output import RankOutput  # noqa: E402

SECONDS = 10.0


def answer(sockets: Sequence[socket.socket]) -> None:
    """Be all the hosts: read what comes, say what run_node.py says, for SECONDS."""
    numbers = [0] * len(sockets)

    def say(at: int, /, **event: Any) -> None:
        if event["event"] not in ("beat", "progress", "attached"):
            numbers[at] += 1
            event["n"] = numbers[at]
        sockets[at].sendall(json.dumps(event).encode() + b"\n")

    watched = select.poll()
    for each in sockets:
        watched.register(each, select.POLLIN)
    places = {each.fileno(): number for number, each in enumerate(sockets)}
    for host in range(len(sockets)):
        say(host, event="attached")
        say(host, event="started", pid=1, interface="eth0", host=f"h{host}")
    started, step = time.monotonic(), 0
    while time.monotonic() - started < SECONDS:
        for number, _ in watched.poll(50):
            sockets[places[number]].recv(65536)
        if time.monotonic() - started > step:
            step += 1
            for host in range(len(sockets)):
                say(host, event="line", rank=host, text=f"warning {step}: a line of rank {host}")
                say(host, event="progress", rank=host, text=f"step {step}/100")
                if step % 3 == 0:
                    say(host, event="beat")
    for host in range(len(sockets)):
        say(host, event="rank", rank=host, code=0, asked=False)
        say(host, event="ended", code=0, reason="", ranks={str(host): 0}, checkpoints=[])
    for each in sockets:  # the last confirmation
        while each.recv(65536):
            pass


class SocketChannel:
    """A channel over a socket pair."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, data: bytes) -> None:
        """Write all of it."""
        self._connection.sendall(data)

    def receive(self, seconds: float) -> bytes | None:
        """Wait for output."""
        return self._connection.recv(65536) if wait_for(self._connection.fileno(), select.POLLIN, seconds) else None

    def stderr_tail(self) -> str:
        """There is none."""
        return ""

    def close(self) -> None:
        """Close it."""
        self._connection.close()


class SimulatedSession:
    """A session on a simulated host."""

    way, fingerprint = "socket", None

    def __init__(self, node: Node, connection: socket.socket) -> None:
        self.node, self._connection = node, connection

    def open(self, command: str) -> SocketChannel:
        """Return the channel to the host, which runs already."""
        return SocketChannel(self._connection)

    def close(self) -> None:
        """Nothing to close."""


def measure(count: int) -> tuple[float, float]:
    """Supervise a job on so many hosts; return the CPU and wall seconds of this process."""
    pairs = [socket.socketpair() for _ in range(count)]
    child = os.fork()
    if child == 0:
        for ours, _ in pairs:
            ours.close()
        try:
            answer([theirs for _, theirs in pairs])
        finally:
            os._exit(0)
    for _, theirs in pairs:
        theirs.close()
    nodes = [Node(f"h{number}") for number in range(count)]
    sessions = {node: SimulatedSession(node, ours) for node, (ours, _) in zip(nodes, pairs, strict=True)}

    node_link.connect = lambda node, ssh, may_ask: sessions[node]  # type: ignore[assignment,return-value]
    threading.stack_size(256 << 10)
    with tempfile.TemporaryDirectory() as folder:
        parts = [HostAssignment(node, (0,), RemoteCheckout("/x", "python3")) for node in nodes]
        job = supervisor.ClusterJob(parts, SshOptions(), "job-abcdef", Supervision(60, 0, None, False, 60, False),
                                    Path(folder), RankOutput(Path(folder)), lambda text: None)
        before, started = time.process_time(), time.monotonic()
        result = job.attach(False)
        used, wall = time.process_time() - before, time.monotonic() - started
    os.waitpid(child, 0)
    assert result and len(result.launcher_codes) == count and not result.lost_hosts, result and result.lost_hosts
    return used, wall


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs=2, default=[250, 1000], help="to compare (250 1000)")
    few, many = parser.parse_args().hosts
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    found = {count: measure(count) for count in (few, many)}
    for count, (used, wall) in found.items():
        each = used / wall / count * 1e3
        print(f"{count:5} hosts: {used:6.2f} s of CPU in {wall:5.1f} s, {each:.2f} ms a host and second")
    print(f"{many} hosts take {found[many][0] / found[few][0]:.1f}x the CPU time of {few}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
