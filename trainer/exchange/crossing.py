"""What crosses between hosts in few bits: the part that gradients and weights share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.distributed import heartbeat
from trainer.distributed.ranks import Ranks
from trainer.exchange import residuals
from trainer.exchange.all_reduce import CompressedSum
from trainer.exchange.flat_stream import buckets_of
from trainer.exchange.hosts import Hosts


class Crossing:
    """The weights that are trained by a host's engine, and a sum over hosts for as many numbers.

    `seconds`: spent on `exchanges` so far.
    """

    def __init__(self, engine: Any, hosts: Hosts, bits: int) -> None:
        self.engine, self.hosts = engine, hosts
        self.weights = [weight for weight in engine.module.parameters() if weight.requires_grad]
        self.shapes = [weight.shape for weight in self.weights]
        self.device = self.weights[0].device
        self.sum = CompressedSum(sum(weight.numel() for weight in self.weights), bits, hosts, self.device)
        self.seconds, self.exchanges = 0.0, 0

    @contextlib.contextmanager
    def _exchanging(self, what: str) -> Iterator[None]:
        """Say that this crosses, and count the exchange and its time."""
        heartbeat.report(f"{what} cross between hosts", often=True)
        began = time.monotonic()
        with torch.no_grad():
            yield
        self.seconds += time.monotonic() - began
        self.exchanges += 1

    def _reduce(self, tensors: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
        """Sum this host's tensors, by its weight, with those of the others; return the codes, and the sums' norm."""
        return self.sum.reduce(buckets_of(tensors, self.sum.sizes, self.hosts.weight, self.device))

    def settle(self) -> None:
        """Make all hosts' weights the same, where they aren't; every rank calls it."""

    def save(self, folder: Path) -> None:
        """Write what encoding has left out into a checkpoint. Raises OSError."""
        residuals.save(self.sum, folder)

    def load(self, folder: Path, ranks: Ranks) -> str:
        """Take what encoding had left out at a checkpoint; return what is to be said about it, "" for nothing."""
        return residuals.load(self.sum, folder, ranks)

    def place_of(self, weight: torch.nn.Parameter) -> int:
        """Return where a weight's numbers begin in the row of all."""
        number = next(number for number, each in enumerate(self.weights) if each is weight)
        return sum(shape.numel() for shape in self.shapes[:number])
