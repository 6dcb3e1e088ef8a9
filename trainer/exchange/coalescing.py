"""ZeRO-2's gradients cross between hosts once a step, instead of at every micro step: DeepSpeed's own way to wait.

Until then each rank keeps its gradients whole, as with ZeRO-1: it takes memory for traffic.
"""

from __future__ import annotations

import contextlib
from typing import Any


class Coalescing:
    """Has an engine reduce gradients at the end of a step; `begin` comes before each micro step's backward pass."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._open: contextlib.ExitStack | None = None
        step = engine.step

        def reducing_step(*words: Any, **named: Any) -> Any:
            if self._open is not None:
                self._open.close()
                self._open = None
                engine.set_gradient_accumulation_boundary(True)  # which closing has put back to what it was before
            return step(*words, **named)

        engine.step = reducing_step

    def begin(self) -> None:
        """Have gradients wait from now on, until the next step."""
        if self._open is None:
            self._open = contextlib.ExitStack()
            self._open.enter_context(self._engine.coalesce_grad_reduction())
