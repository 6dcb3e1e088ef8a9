"""--lan_compress: the hosts' gradients are summed in few bits before each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from trainer.exchange.crossing import Crossing
from trainer.exchange.flat_stream import spread
from trainer.exchange.hosts import Hosts

MARGIN = 1e-6  # as in torch's clip_grad_norm_


class GradientExchange(Crossing):
    """Sums the hosts' gradients before each step of an engine, and clips them to `max_norm` (0: not) by their norm.

    The norm is the same to the last bit on every rank, which that of an engine wouldn't be: hosts with other numbers of
    ranks add in another order. `before` is called with the host's own gradients in place, `after` with the sum, which
    was multiplied by `factor`.
    """

    def __init__(self, engine: Any, hosts: Hosts, bits: int, max_norm: float) -> None:
        super().__init__(engine, hosts, bits)
        self._max_norm = max_norm
        self.norm, self.factor = math.nan, 1.0
        self.before: Callable[[], None] | None = None
        self.after: Callable[[], None] | None = None
        step = engine.step

        def exchanging_step(*words: Any, **named: Any) -> Any:
            if self.before:
                self.before()
            self.exchange()
            if self.after:
                self.after()
            return step(*words, **named)

        engine.step = exchanging_step
        engine.get_global_grad_norm = lambda: self.norm

    def exchange(self) -> None:
        """Put the sum of all hosts' gradients in the place of this host's."""
        with self._exchanging("gradients"):
            codes, self.norm = self._reduce(map(gradient_of, self.weights))
            if self._max_norm > 0:
                self.factor = min(1.0, self._max_norm / (self.norm + MARGIN))
            spread((bucket.mul_(self.factor) for bucket in self.sum.gather(codes)), self.shapes, self._set)

    def _set(self, number: int, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_grad

        weight = self.weights[number]
        if getattr(weight, "_hp_grad", None) is not None:  # of 16 bits without ZeRO; beside it `grad` is a leftover
            weight.set_full_hp_grad(value)
        elif weight.grad is None and not hasattr(weight, "_hp_mapping"):  # no token of this host has used it
            weight.grad = value.to(weight.dtype)
        else:
            safe_set_full_grad(weight, value)


def gradient_of(weight: torch.nn.Parameter) -> torch.Tensor:
    """Return the mean of the host's gradients of a weight, whole; all ranks of the host call it."""
    from deepspeed.utils import safe_get_full_grad

    found: torch.Tensor | None = safe_get_full_grad(weight)
    return torch.zeros_like(weight) if found is None else found
