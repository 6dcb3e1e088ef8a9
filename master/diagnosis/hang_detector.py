"""Detects a hang: for too long there was no step, evaluation, checkpoint, tokenization or output."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection
from statistics import median

LEAST = 300.0  # seconds
STEPS = 10  # median steps without a sign, where those take longer
ALL_REDUCE_TEST, TEST_S = "the all-reduce test", 30.0  # the ranks give it up after 60 s (trainer/distributed/ranks.py)
KEPT = 20  # steps whose time is remembered
STEP = re.compile(r"^step (\d+)/")


class HangDetector:
    """Tracks every host's activity. `limit` in seconds: 0 never reports, None is the larger of LEAST and STEPS steps.

    For ranks that report what they do, output alone doesn't count as activity.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._signs: dict[str, tuple[float, str]] = {}  # host -> when, what
        self._telling = False
        self._step: tuple[float, int] | None = None
        self._seconds: deque[float] = deque(maxlen=KEPT)
        self._warned = 0.0

    def line(self, host: str, at: float) -> None:
        """Note that a rank of a host has printed a line, `at` seconds after the start."""
        if not self._telling:
            self._signs[host] = at, "a line"

    def progress(self, host: str, rank: int, at: float, what: str) -> None:
        """Note what a rank reports that it does."""
        self._telling = True
        self._signs[host] = at, what
        found = STEP.match(what)
        if rank == 0 and found:
            step = int(found[1])
            if self._step and step > self._step[1]:
                self._seconds.append((at - self._step[0]) / (step - self._step[1]))
            self._step = at, step

    @property
    def limit(self) -> float:
        """The seconds without activity after which a hang is reported."""
        if self._limit is not None:
            return self._limit
        return max(LEAST, STEPS * self.a_step)

    @property
    def a_step(self) -> float:
        """Seconds of a step, 0 where that isn't known."""
        return median(self._seconds) if self._seconds else 0.0

    def active_since(self, at: float, hosts: Collection[str]) -> bool:
        """Return whether one of these hosts has shown activity after a time."""
        return any(last > at for host, (last, _) in self._signs.items() if host in hosts)

    def overdue(self, now: float) -> str | None:
        """Return the message for a hang, once for each."""
        latest, what = max(self._signs.values(), default=(0.0, ""))
        limit = min(self.limit, TEST_S) if what == ALL_REDUCE_TEST else self.limit
        if not limit or now - max(latest, self._warned) <= limit:
            return None
        self._warned = now
        last = "; ".join(f"{host}: {what}, {now - at:.0f} s ago" for host, (at, what) in sorted(self._signs.items()))
        return (f"NO PROGRESS for {now - latest:.0f} s: no step, evaluation, checkpoint or output. Last activity: "
                f"{last or 'none'}. Ctrl-C stops")
