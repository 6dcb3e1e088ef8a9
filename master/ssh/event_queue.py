"""What many hosts say, for one thread: a host that says too much waits, and with it the SSH window of its session."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
WAITING = 1000  # events of one host that may wait to be handled; a line has 64 KiB at most
TICK_S = 0.5


class EventQueue(Generic[T]):
    """Put from the hosts' threads, got by one. `close` lets those that wait go on, and forgets what they put."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self._items: queue.SimpleQueue[tuple[str, T]] = queue.SimpleQueue()
        self._room = {host: threading.Semaphore(WAITING) for host in hosts}
        self._closed = threading.Event()

    def put(self, host: str, item: T, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Add what a host said, as soon as there is room for it; until then do something now and then."""
        while not self._closed.is_set():
            if self._room[host].acquire(timeout=TICK_S):
                self._items.put((host, item))
                return
            meanwhile()

    def get(self, timeout: float) -> tuple[str, T]:
        """Return the next host and what it said. Raises queue.Empty."""
        host, item = self._items.get(timeout=timeout)
        self._room[host].release()
        return host, item

    def close(self) -> None:
        """Nobody gets any more."""
        self._closed.set()
