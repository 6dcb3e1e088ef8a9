"""How many bytes leave this host in each step, by the counter of the network card that the ranks use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

COUNTERS = Path("/proc/net/dev")  # of this process's network namespace, which /sys may not be


def card_of_ranks() -> str:
    """Return the network card by which the ranks reach each other, "" if none is named."""
    named = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME") or ""
    return named.lstrip("=").split(",")[0]


def sent_by(name: str, counters: str) -> int | None:
    """Return the bytes that a card has sent, by /proc/net/dev (proc(5)); None where it isn't there."""
    for line in counters.splitlines():
        card, colon, counts = line.partition(":")
        if colon and card.strip() == name:
            return int(counts.split()[8])
    return None


class SentBytes(TrainerCallback):
    """Adds up what a card sends from the beginning of each step to its end, other programs' bytes among them.

    The first step doesn't count: it opens connections and checks gradients. `total` of `steps`: both stay 0 where there
    is no such card, or it is the machine's own loopback.
    """

    def __init__(self, name: str) -> None:
        self._name = "" if name == "lo" else name
        self._began: int | None = None
        self.total = self.steps = 0
        self._is_first = True
        self._told = 0, 0

    def _read(self) -> int | None:
        try:
            return sent_by(self._name, COUNTERS.read_text()) if self._name else None
        except (OSError, ValueError, IndexError):
            return None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Look at the counter."""
        self._began = self._read()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Look again."""
        now = self._read()
        if now is not None and self._began is not None and now >= self._began and not self._is_first:
            self.total, self.steps = self.total + now - self._began, self.steps + 1
        self._began, self._is_first = None, False

    def lately(self) -> int | None:
        """Return the bytes of a step, the mean of those since the last call; None without any."""
        total, steps = self._told
        self._told = self.total, self.steps
        return round((self.total - total) / (self.steps - steps)) if self.steps > steps else None
