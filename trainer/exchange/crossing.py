"""What crosses between hosts in few bits: the part that gradients and weights share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.distributed.ranks import Ranks
from trainer.exchange import residuals
from trainer.exchange.all_reduce import CompressedSum
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
