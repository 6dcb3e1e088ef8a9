"""How busy a run's hosts are now: worker/measure_node.py, streamed to each over SSH, tells it every few seconds."""

from __future__ import annotations

import contextlib
import shlex
import threading
import time
from collections.abc import Sequence
from typing import Any

from master.inventory.node_facts import RemoteCheckout
from master.inventory.worker_script import open_worker
from master.ssh.json_channel import SILENCE_LIMIT_S, JsonChannel
from master.ssh.node_names import Node
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import HostKeyPrompt, run_on_all
from master.ssh.session import Session

MARK = b"@@MEASURED "
HEARTBEAT_S = 5.0  # seconds between two heartbeats to the host
ONE_LOOK_S = 2.5  # seconds in which nvidia-smi answers, where it does


def measure_once(session: Session, python: str) -> dict[str, Any]:
    """Return how busy a host is. Raises SshError."""
    host, measured = str(session.node), dict[str, Any]()
    with contextlib.closing(open_worker(session, "measure_node.py", shlex.quote(python), "1")) as channel:
        messages, end = JsonChannel(channel, host, "measured", "gpus", MARK), time.monotonic() + ONE_LOOK_S
        while time.monotonic() < end and not (messages.ended or measured.get("gpus") or measured.get("problem")):
            measured = (messages.receive(0.2) or [measured])[-1]  # the first comes before nvidia-smi's answer
    return measured


class HostMetrics:
    """Asks hosts until it is closed; `latest` may be read at any time."""

    def __init__(self, places: dict[Node, RemoteCheckout], ssh: SshOptions, every: float) -> None:
        self._places, self._ssh, self._every = places, ssh, every
        self._closed = threading.Event()
        self._latest: dict[str, dict[str, Any]] = {str(node): {} for node in places}
        self._thread: threading.Thread | None = None

    def start(self, host_key_prompt: HostKeyPrompt | None) -> HostMetrics:
        """Begin; `host_key_prompt` decides on unknown host keys."""
        def lost(node: Node, result: object) -> None:
            if isinstance(result, SshError):
                self._latest[str(node)] = {"fault": f"{result.stage}: {result.reason}"}

        nodes: Sequence[Node] = list(self._places)
        self._thread = threading.Thread(
            target=lambda: run_on_all(nodes, self._ssh, self._work, host_key_prompt, lost, at_once=len(nodes)),
            daemon=True)
        self._thread.start()
        return self

    def latest(self) -> dict[str, dict[str, Any]]:
        """Return each host's newest measurement, {} before the first, {"fault": why} if it can't be asked."""
        return dict(self._latest)

    def wait(self, seconds: float) -> None:
        """Wait until every host has reported, at most so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not all(self._latest.values()):
            time.sleep(0.05)

    def close(self) -> None:
        """Disconnect from the hosts."""
        self._closed.set()
        if self._thread:
            self._thread.join(timeout=5)

    def _work(self, session: Session) -> None:
        host, python = str(session.node), shlex.quote(self._places[session.node].python)
        with contextlib.closing(open_worker(session, "measure_node.py", python, str(self._every))) as channel:
            messages, spoken = JsonChannel(channel, host, "measured", "gpus", MARK), time.monotonic()
            while not self._closed.is_set():
                for measured in messages.receive(0.2):
                    self._latest[host] = measured
                now = time.monotonic()
                if messages.ended:
                    raise SshError(host, "connection", f"it exited: {messages.last_words()}")
                if now - messages.last_heard > SILENCE_LIMIT_S:
                    raise SshError(host, "connection", f"no answer for {SILENCE_LIMIT_S:.0f} s")
                if now - spoken > HEARTBEAT_S:
                    messages.send({})
                    spoken = now
