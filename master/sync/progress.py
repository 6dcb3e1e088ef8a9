"""What a person sees while nodes get their files: a bar a host on a terminal, else a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from master.core.terminal import is_terminal, one_line, say

if TYPE_CHECKING:
    from master.ssh.run_on_all import HostKeyPrompt, UnknownHost
    from master.sync.relay import RelayPeer

TOLD_EVERY = 10.0  # seconds between two lines, without a terminal
WINDOW = 5.0  # seconds over which a rate is measured


class SyncProgress:
    """Use as a context manager; its methods may be called from any thread."""

    def __init__(self, removing: bool = False) -> None:
        self._lock = threading.Lock()
        self._told = time.monotonic()
        self._removing = removing
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._marks: dict[str, list[tuple[float, int]]] = {}
        self._said: dict[str, str] = {}

    def __enter__(self) -> SyncProgress:
        if is_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bars = Progress(TextColumn("{task.fields[host]}", markup=False), BarColumn(bar_width=30),
                                  TextColumn("{task.description}", markup=False),
                                  console=Console(stderr=True, highlight=False), transient=True)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def paused(self, ask: HostKeyPrompt | None) -> HostKeyPrompt | None:
        """Return a question that is asked without moving lines in its way."""
        if ask is None or self._bars is None:
            return ask

        def asking(unknown_hosts: Sequence[UnknownHost]) -> bool:
            self._bars.stop()
            try:
                return ask(unknown_hosts)
            finally:
                self._bars.start()

        return asking

    def reading(self, done: int, total: int) -> None:
        """So many bytes of what is here have been read, for their digests."""
        self._show({"here": (done, total, f"reading {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")}, quick=done < total)

    def rows(self, peers: Sequence[RelayPeer]) -> None:
        """Show how far each node is."""
        if "here" in self._tasks:
            self._bars.remove_task(self._tasks.pop("here"))
        self._show({peer.host: (peer.written, peer.total, self._words(peer)) for peer in peers})

    def environment(self, host: str, text: str) -> None:
        """Show the progress of an environment."""
        with self._lock:
            if self._said.get(host) == text:
                return
            self._said[host] = text
        if self._bars:
            self._show({host: (0, None, text)})
        else:
            say(f"{host}: {text}")

    def _show(self, rows: dict[str, tuple[int, int | None, str]], quick: bool = True) -> None:
        with self._lock:
            if self._bars:
                for host, (done, total, words) in rows.items():
                    text = one_line(words)[:300]
                    if host not in self._tasks:
                        self._tasks[host] = self._bars.add_task("", host=host, total=total)
                    self._bars.update(self._tasks[host], completed=done, total=total, description=text)
            elif quick and time.monotonic() - self._told > TOLD_EVERY:
                self._told = time.monotonic()
                say("; ".join(f"{host} {text}" for host, (_, _, text) in rows.items()))

    def _words(self, peer: RelayPeer) -> str:
        if peer.reason:
            return peer.reason
        if peer.same_home:
            return f"shares the home folder of {peer.same_home}"
        if self._removing and "hello" in peer.said:
            return "removed" if "finished" in peer.said else "removing files"
        if "plan" not in peer.said:
            looked = peer.said.get("examining", {}).get("bytes", 0)
            return f"checking existing files ({looked / 1e6:,.0f} MB)" if looked else "being reached"
        if peer.written >= peer.total:
            return f"{peer.total / 1e6:,.1f} MB there"
        now, marks = time.monotonic(), self._marks.setdefault(peer.host, [])
        marks.append((now, peer.written))
        while len(marks) > 2 and now - marks[0][0] > WINDOW:
            del marks[0]
        rate = (peer.written - marks[0][1]) / max(now - marks[0][0], 0.1)
        left = f", {(peer.total - peer.written) / rate:,.0f} s left" if rate else ""
        return f"{peer.written / 1e6:,.0f} of {peer.total / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s{left}"
