"""--lan_average: each host trains by itself, and every so many steps its weights become the average of all hosts'.

What crosses is by how much the weights have changed since the last average, in few bits. The average is taken as it is
(an outer step of SGD with a learning rate of 1, no momentum); each host keeps its own states of the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from trainer.exchange.crossing import Crossing
from trainer.exchange.flat_stream import spread
from trainer.exchange.hosts import Hosts


class WeightAverage(Crossing):
    """Averages the hosts' weights after every `period` steps of an engine, and whenever it is to `settle`."""

    def __init__(self, engine: Any, hosts: Hosts, bits: int, period: int) -> None:
        super().__init__(engine, hosts, bits)
        self._steps = 0  # since the last average
        self._last = [weight_of(weight).clone() for weight in self.weights]  # in fp32, as they were averaged
        step = engine.step

        def averaging_step(*words: Any, **named: Any) -> Any:
            result = step(*words, **named)
            self._steps += 1
            if self._steps >= period:
                self.settle()
            return result

        engine.step = averaging_step

    def settle(self) -> None:
        """Average the weights of all hosts, if they have made a step since."""
        if not self._steps:
            return
        with self._exchanging("weights"):
            codes, _ = self._reduce(self._changes())
            spread(self.sum.gather(codes), self.shapes, self._set)
            if hasattr(self.engine.optimizer, "update_lp_params"):
                self.engine.optimizer.update_lp_params()
        self._steps = 0

    def _changes(self) -> Iterator[torch.Tensor]:
        for weight, last in zip(self.weights, self._last, strict=True):
            yield weight_of(weight) - last

    def _set(self, number: int, change: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        weight, last = self.weights[number], self._last[number]
        last.add_(change)
        if hasattr(weight, "_hp_mapping"):
            safe_set_full_fp32_param(weight, last)
        else:
            weight.data.copy_(last)


def weight_of(weight: torch.nn.Parameter) -> torch.Tensor:
    """Return a weight in fp32, whole; all ranks of the host call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    found: torch.Tensor | None = safe_get_full_fp32_param(weight)
    return weight.detach().float() if found is None else found
