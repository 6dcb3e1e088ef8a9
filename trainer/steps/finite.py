"""Stops a training whose loss is no longer a number, before a checkpoint of it could replace a good one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import verification
from trainer.distributed.ranks import Ranks
from trainer.errors import UserError

NEVER = 2**31 - 1


class FiniteCheck:
    """Notes on the device, without waiting for it, at which step something wasn't finite first; `check` looks.

    `precision`: fp16 is allowed gradients that overflow: the loss scaler skips such a step.
    """

    def __init__(self, ranks: Ranks, precision: str, learning_rate: float) -> None:
        self._ranks, self._precision, self._rate = ranks, precision, learning_rate
        self._first: dict[str, torch.Tensor] = {}

    def note_loss(self, loss: torch.Tensor, step: int) -> None:
        """Note a micro batch's loss."""
        self._note("training loss", loss, step)

    def note_gradients(self, norm: Any, skipped: bool, step: int) -> None:
        """Note the gradients' norm (None if unknown), and whether the engine skipped the step because of them."""
        if self._precision != "fp16" and norm is not None:
            self._note("gradients' norm", torch.as_tensor(math.nan if skipped else norm), step)

    def _note(self, what: str, value: torch.Tensor, step: int) -> None:
        value = value.detach()
        before = self._first.get(what)
        before = torch.full_like(value, NEVER, dtype=torch.int64) if before is None else before.to(value.device)
        self._first[what] = torch.where(value.isfinite(), before, before.clamp(max=step))

    def check(self, folder: Path, weights: Iterable[torch.Tensor] = ()) -> None:
        """Raise a UserError on all ranks, which all must call this, if anything wasn't finite on one of them.

        `weights` are looked at now; `folder` has the checkpoints.
        """
        steps = {what: int(step) for what, step in self._first.items()}
        found = {what: step for what, step in steps.items() if step < NEVER}
        damaged = any(not bool(weight.isfinite().all()) for weight in weights)
        if not self._ranks.all_reduce_sum(bool(found) or damaged)[0]:
            return
        first = min(found, key=lambda what: found[what]) if found else "weights"
        mine = {"step": found.get(first, NEVER), "what": first} if found or damaged else None
        told = [(each["step"], rank, each["what"]) for rank, each in enumerate(
            self._ranks.all_gather_json("not-finite", mine)) if each]
        step, rank, what = min(told)
        where = f"the {what} of rank {rank} ({self._ranks.hosts[rank]})"
        raise UserError(self.explained(where, step if step < NEVER else None, folder), shared=True)

    def explained(self, what: str, step: int | None, folder: Path) -> str:
        """Return what a person reads: what isn't finite since when, what is left, what it may come from."""
        good = [path for path in verification.list_checkpoints(folder) if (path / verification.MANIFEST).exists()]
        left = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was saved before"
        narrow = " fp16 too narrow for this model (--precision bf16)," if self._precision == "fp16" else ""
        again = " --resume_from_checkpoint auto" if good else ""
        return (f"{what} stopped being finite{f' at step {step}' if step is not None else ''}; {left}. Likely: a "
                f"learning rate too high, too little warm-up,{narrow} or a damaged row of data. Try: --learning_rate "
                f"{self._rate / 3:.1g}{again}")


def local_parts(model: torch.nn.Module) -> Iterable[torch.Tensor]:
    """Yield the trained weights that this rank has: its part of each under ZeRO-3. Others can't have changed."""
    for weight in model.parameters():
        if weight.requires_grad:
            yield getattr(weight, "ds_tensor", weight).detach()
