"""Micro batches go through all stages, forward and backward, by a 1F1B schedule (`schedule.py`).

Every rank has the ids, positions and labels of all micro batches; only hidden states and their gradients are sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage

from trainer.split.schedule import schedule_class
from trainer.split.stage import Stage

Summed = Callable[[Stage, "torch.Tensor | None", dict[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class Wire:
    """The dtype of hidden states as they are sent, and as a stage goes on with them; None: as they are."""

    sent: torch.dtype | None
    inside: torch.dtype | None


class MicroBatch(nn.Module):
    """What the schedule calls: received hidden states in; hidden states, or the last stage's summed loss [1], out."""

    def __init__(self, stage: Stage, summed: Summed, wire: Wire) -> None:
        super().__init__()
        self.stage = stage
        self._summed, self._wire = summed, wire

    def forward(self, *received: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Do a stage's part of a micro batch."""
        hidden = received[0].to(self._wire.inside or received[0].dtype) if received else None
        if self.stage.cut.is_last:
            return self._summed(self.stage, hidden, inputs).reshape(1)
        inputs.pop("labels")
        found: torch.Tensor = self.stage(hidden, **inputs)
        return found.to(self._wire.sent or found.dtype)


class Busy:
    """How long a stage computes in training: by the clock, on a GPU by events on its stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds = device, 0.0
        self._open: list[tuple[Any, Any]] = []

    def watch(self, stage: Any, name: str) -> None:
        """Count the time in a method of a stage."""
        method = getattr(stage, name)

        def counted(*words: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():  # an evaluation
                return method(*words, **named)
            before = self._mark()
            result = method(*words, **named)
            self._open.append((before, self._mark()))
            if self._device.type == "cpu":
                self.seconds()
            return result

        setattr(stage, name, counted)

    def _mark(self) -> Any:
        if self._device.type == "cpu":
            return time.monotonic()
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Return all of it."""
        for before, after in self._open:
            if self._device.type == "cpu":
                self._seconds += after - before
            else:
                after.synchronize()
                self._seconds += before.elapsed_time(after) / 1000
        self._open.clear()
        return self._seconds


class Pipeline:
    """The stages' schedule on one rank; all ranks call it with the same batch."""

    def __init__(self, stage: Stage, summed: Summed, rank: int, ranks: int, device: torch.device, micro_batches: int,
                 wire: Wire) -> None:
        self._is_last = stage.cut.is_last
        self._device, self._divisor = device, torch.ones((), device=device)
        made = PipelineStage(MicroBatch(stage, summed, wire), rank, ranks, device)
        self.busy = Busy(device)
        self.busy.watch(made, "forward_one_chunk")
        self.busy.watch(made, "backward_one_chunk")
        self._schedule = schedule_class()(made, micro_batches, loss_fn=self._loss, scale_grads=False)

    def _loss(self, summed: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return summed.sum() / self._divisor

    def train(self, inputs: dict[str, torch.Tensor], divisor: torch.Tensor) -> torch.Tensor:
        """Add a batch's gradients; return its summed loss divided by `divisor`, on the last rank, 0 on the others."""
        self._divisor = divisor
        return self._summed(self._schedule.step, inputs)

    def evaluate(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a batch's summed loss without gradients, on the last rank, 0 on the others."""
        self._divisor = torch.ones((), device=self._device)
        with torch.no_grad():
            return self._summed(self._schedule.eval, inputs)

    def _summed(self, run: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        more = {"target": inputs["labels"], "losses": losses} if self._is_last else {}
        run(**more, **inputs)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self._device)
