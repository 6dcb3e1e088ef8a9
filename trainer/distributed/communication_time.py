"""How much of the steps' time goes by in waiting: for the network, and for the slowest rank.

Each rank adds up the time that its steps spend in collectives. The slowest rank spends least: the others are there
before it. So the least of these times is the network's, and what the others spend above it is spent waiting for that
rank. On a GPU it is time of its streams: what DeepSpeed overlaps with computing counts as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import wraps
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter",
               "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "barrier")


class CommunicationTimer(TrainerCallback):
    """Measures one rank; `device_type` is cuda, xpu or cpu. Install it before DeepSpeed looks for the collectives."""

    def __init__(self, device_type: str) -> None:
        self.waited_s = self.steps_s = 0.0
        self._device = device_type
        self._began: float | None = None  # when this step did
        self._open: list[tuple[Any, Any]] = []  # events on a GPU's stream, before and after, not yet read

    def install(self) -> None:
        """Measure torch.distributed's collectives from now on, in steps."""
        for name in COLLECTIVES:
            setattr(dist, name, self._measured(getattr(dist, name)))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it; read what the GPU has got behind it."""
        if self._began is not None:
            self.steps_s += time.monotonic() - self._began
            self._began = None
        while self._open and self._open[0][1].query():
            before, after = self._open.pop(0)
            self.waited_s += before.elapsed_time(after) / 1000

    def _mark(self) -> Any:
        if self._device == "cpu":
            return time.monotonic()
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        return event

    def timed(self, call: Callable[..., Any], *words: Any, **named: Any) -> Any:
        """Call a function and count the time until it, or the stream that it holds up, continues."""
        if self._began is None:
            return call(*words, **named)
        before = self._mark()
        result = call(*words, **named)
        if self._device == "cpu":
            self.waited_s += time.monotonic() - before
        else:
            self._open.append((before, self._mark()))
        return result

    def _measured(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def measured(*words: Any, **named: Any) -> Any:
            result = self.timed(collective, *words, **named)
            return _Work(result, self) if isinstance(result, dist.Work) else result

        return measured


class _Work:
    """A collective under way, whose `wait` is measured."""

    def __init__(self, work: dist.Work, waiting: CommunicationTimer) -> None:
        self._work, self._waiting = work, waiting

    def wait(self, *words: Any, **named: Any) -> Any:
        return self._waiting.timed(self._work.wait, *words, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def time_shares(waited: Sequence[float], steps: Sequence[float], hosts: Sequence[str]) -> dict[str, Any] | None:
    """Return the shares of the steps' time that went by in waiting, from each rank's seconds; None without steps.

    "network": for the network; "slowest": for `slowest_rank` on `slowest_host`, by the mean of the others; "hosts":
    for both, by the mean of each host's ranks.
    """
    parts = [seconds / total for seconds, total in zip(waited, steps, strict=True) if total > 0]
    if len(parts) < 2 or len(parts) < len(steps):
        return None
    slowest = min(range(len(parts)), key=parts.__getitem__)
    others = (sum(parts) - parts[slowest]) / (len(parts) - 1)
    return {"network": round(parts[slowest], 3), "slowest": round(others - parts[slowest], 3),
            "slowest_rank": slowest, "slowest_host": hosts[slowest],
            "hosts": {host: round(fmean(part for part, own in zip(parts, hosts, strict=True) if own == host), 3)
                      for host in dict.fromkeys(hosts)}}
