"""What many hosts say, for one thread: a host that says too much waits, and with it the SSH window of its session."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
WAITING = 1000  # events of one host that may wait to be handled; a line has 64 KiB at most
TICK_S = 0.1  # seconds between two looks for room


class EventQueue(Generic[T]):
    """Put from the hosts' threads, one each, got by one. `close` lets those that wait go on, and forgets what they put.

    Each count has one writer, so that a thousand threads share no lock.
    """

    def __init__(self, hosts: Iterable[str]) -> None:
        self._items: queue.SimpleQueue[tuple[str, T]] = queue.SimpleQueue()
        self._put = dict.fromkeys(hosts, 0)
        self._got = dict.fromkeys(self._put, 0)
        self._closed = threading.Event()

    def put(self, host: str, item: T, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Add what a host said, as soon as there is room for it; until then do something now and then."""
        while self._put[host] - self._got[host] >= WAITING:
            if self._closed.wait(TICK_S):
                return
            meanwhile()
        if not self._closed.is_set():
            self._put[host] += 1
            self._items.put((host, item))

    def get(self, timeout: float) -> tuple[str, T]:
        """Return the next host and what it said. Raises queue.Empty."""
        host, item = self._items.get(timeout=timeout)
        self._got[host] += 1
        return host, item

    def close(self) -> None:
        """Nobody gets any more."""
        self._closed.set()
