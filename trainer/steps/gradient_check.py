"""Checks, in the first step, that the gradient which the optimizer is handed is that of all ranks and micro batches.

Engines have had faults that gave wrong gradients without a word (DeepSpeed's issues 7718 and 8224). Hooks take each
rank's own gradient of some weights before the engine touches it; they are summed over micro steps and ranks in 64 bits
by an all-reduce of its own, divided by the trained tokens as counted here, and compared with what the engine made of
them. It only reads: losses, gradients and the order of the data are the same without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from trainer.errors import UserError
from trainer.exchange.crossing import Crossing
from trainer.exchange.gradient_exchange import GradientExchange
from trainer.model.lora import numel
from trainer.sequences.packing import IGNORED

WEIGHTS = 10  # are looked at, evenly spread from the embedding to the head
LARGEST = 1 << 26  # numbers of a weight that is looked at: the whole gradient of it is gathered once
SAMPLE = 1 << 14  # numbers of it that are compared
# Half the distance of two neighbouring numbers: what one sum or product may be wrong by.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ROUNDINGS = 4.0  # of them in a gradient that is right, for each micro step and for the sum over ranks
LEAST = 1e-5  # by which sums in another order may differ
LEFT_OUT = 2**-8  # by which what encoding left out, kept in bf16, may


@dataclass
class Watched:
    """A weight, and this rank's gradient of the summed loss so far, in 64 bits, at `SAMPLE` places."""

    name: str
    weight: Any
    own: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor, factor: torch.Tensor) -> None:
        """Add a micro step's gradient, of a loss that the engine multiplied by `factor`."""
        part = sampled(gradient).double() / factor.double()
        self.own = part if self.own is None else self.own + part


@dataclass(frozen=True)
class Compared:
    """The sum over a `group` of ranks (None: all), times `share`; what `crossed` from other hosts; whether it ends."""

    group: Any = None
    share: float = 1.0
    crossed: GradientExchange | None = None
    ends: bool = True


@dataclass
class GradientCheck:
    """The check of one training. `ranks`: which average their gradients; `precision`: of the training; `engine`:
    DeepSpeed's, None without it; `scaler`: torch's, in fp16 without it; `crossing`: between hosts, in few bits.

    `error` is what it found: the largest root mean square difference, as a share of the gradient's own; None before.
    """

    model: Any
    ranks: int
    precision: str
    engine: Any = None
    scaler: Any = None
    crossing: Crossing | None = None
    error: float | None = None
    tokens: torch.Tensor | None = None
    _watched: list[Watched] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)
    _factor: torch.Tensor | None = None
    _micro_steps: int = 0
    _left: list[torch.Tensor] = field(default_factory=list)

    def begin(self) -> None:
        """Set the hooks, before the first micro step; under DeepSpeed look just before its optimizer's first step."""
        self._watched = [Watched(name, weight) for name, weight in chosen(self.model)]
        for each in self._watched:
            self._handles.append(each.weight.register_hook(self._taker(each)))
        if isinstance(self.crossing, GradientExchange):
            self.crossing.before, self.crossing.after = self._compare_host, self._compare_sum
        elif self.engine is not None:
            step = self.engine.step

            def checked_step(*arguments: Any, **more: Any) -> Any:
                self._compare_host()  # nothing, once it has compared
                return step(*arguments, **more)

            self.engine.step = checked_step

    @property
    def pending(self) -> bool:
        """True until a gradient was compared."""
        return bool(self._handles)

    def note_loss(self, summed: torch.Tensor, labels: torch.Tensor) -> None:
        """Take a micro step's summed loss before anything scales it, and its labels; call it before backward."""
        count = (labels != IGNORED).sum()
        self.tokens = count if self.tokens is None else self.tokens + count
        self._micro_steps += 1
        if summed.requires_grad:
            summed.register_hook(self._note_factor)

    def _note_factor(self, gradient: torch.Tensor) -> None:
        self._factor = gradient.detach()

    def _taker(self, watched: Watched) -> Callable[[torch.Tensor], None]:
        def take(gradient: torch.Tensor) -> None:
            if self._factor is not None:
                watched.add(gradient.detach(), self._factor)

        return take

    def _compare_host(self) -> None:
        """Compare an engine's gradients with the sum of its own ranks', before anything crosses to other hosts."""
        if self.crossing is None:
            return self.compare()
        hosts, crosses = self.crossing.hosts, isinstance(self.crossing, GradientExchange)
        if crosses:
            self._left = [self._left_out(each) for each in self._watched]
        return self.compare(Compared(hosts.within, 1 / hosts.weight, ends=not crosses))  # scaled for the mean of all

    def _compare_sum(self) -> None:
        """Compare what has crossed, and what encoding left out of it, with the sum of all ranks'."""
        self.compare(Compared(crossed=cast(GradientExchange, self.crossing)))

    def _left_out(self, watched: Watched) -> torch.Tensor:
        """Return what encoding has left out so far of a weight's gradients, at the places that are compared."""
        assert self.crossing is not None
        size = numel(watched.weight)
        places = torch.arange(0, size, max(1, size // SAMPLE), device=watched.weight.device)
        left = self.crossing.sum.left_out(self.crossing.place_of(watched.weight) + places)
        return all_reduced(left.double())

    def _error(self, number: int, total: torch.Tensor, what: Compared) -> float:
        """Return by how much the gradient of a weight differs, as a share of its root mean square.

        Of what has crossed in few bits, as a share of that and of what was left out of it.
        """
        each = self._watched[number]
        own = each.own if each.own is not None else torch.zeros(
            sampled(each.weight).shape, dtype=torch.float64, device=total.device)
        truth = all_reduced(own, group=what.group) * what.share / total.clamp(min=1)
        given = self._handed(each.weight)
        given = torch.zeros_like(truth) if given is None else sampled(given).double() / self._loss_scale()
        squares = truth.square()
        if what.crossed:
            before, after = self._left[number], self._left_out(each)
            given = given / what.crossed.factor + after - before
            squares = squares + before.square() + after.square()
        spread = squares.mean().sqrt()
        if not spread and not given.any():
            return 0.0
        return ((truth - given).square().mean().sqrt() / spread.clamp(min=1e-30)).item()

    def compare(self, what: Compared | None = None) -> None:
        """Compare; all ranks must call it, after the last micro step of a step. Raises UserError if they differ.

        A step whose gradients overflow in fp16 is passed over: the next one is looked at.
        """
        if not self.pending or self.tokens is None:
            return
        what, total = what or Compared(), all_reduced(self.tokens.double())
        errors = {each.name: self._error(number, total, what) for number, each in enumerate(self._watched)}
        found = all_reduced(torch.tensor(list(errors.values()), device=total.device), torch.distributed.ReduceOp.MAX)
        if not found.isfinite().all():
            if what.ends:
                self._forget()
            return  # fp16's loss scale is still too high: the engine skips the step; else FiniteCheck stops it
        worst, error = list(errors)[int(found.argmax())], found.max().item()
        if what.ends:
            self._end()
            self.error = error
        allowed = max(self.tolerance, LEFT_OUT) if what.crossed else self.tolerance
        if error > allowed:
            fault = ("--lan_compress. Leave it out" if what.crossed else
                     "DeepSpeed with this configuration. Take another ZeRO stage (trainer/configs/)" if self.engine else
                     "PyTorch with this model. Take DeepSpeed (trainer/configs/)")
            raise UserError(
                f"the gradient of {worst} that the optimizer is handed isn't that of all ranks and micro batches (it "
                f"differs by {error:.1%}; {allowed:.1%} is rounding): a fault of this {fault}, or --no_gradient_check "
                "if you know better", shared=True)

    @property
    def tolerance(self) -> float:
        """The difference that rounding may make."""
        kinds = {each.weight.dtype for each in self._watched} | {getattr(self.engine, "communication_data_type", None)}
        rounding = max(ROUNDING[kind] for kind in kinds if kind in ROUNDING)
        return max(LEAST, ROUNDINGS * rounding * (self._micro_steps + self.ranks) ** 0.5)

    def _handed(self, weight: Any) -> torch.Tensor | None:
        """Return the gradient that the optimizer is handed for a weight, whole."""
        if self.engine is None:
            given: torch.Tensor | None = weight.grad
        else:
            from deepspeed.utils import safe_get_full_grad

            given = safe_get_full_grad(weight)
        return given

    def _loss_scale(self) -> float:
        """Return what the gradients are multiplied by in fp16, so that they don't vanish."""
        if self.precision != "fp16":
            return 1.0
        holder = self.engine.optimizer if self.engine is not None else self.scaler
        return float(holder.get_scale() if hasattr(holder, "get_scale") else holder.loss_scale)

    def _forget(self) -> None:
        """Begin anew with the next step."""
        self.tokens, self._factor, self._micro_steps = None, None, 0
        for each in self._watched:
            each.own = None

    def _end(self) -> None:
        """Remove the hooks; the numbers of micro steps and weights stay, for `tolerance`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if isinstance(self.crossing, GradientExchange):
            self.crossing.before = self.crossing.after = None
        for each in self._watched:
            each.own = None


def chosen(model: Any) -> list[tuple[str, Any]]:
    """Return weights that are trained, evenly spread over the model, by name: those whose gradients ZeRO hands on."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad
               and numel(weight) <= LARGEST and not getattr(weight, "use_muon", False)]  # it gets updates instead
    step = max(1.0, (len(trained) - 1) / (WEIGHTS - 1)) if trained else 1.0
    numbers = sorted({min(round(number * step), len(trained) - 1) for number in range(min(WEIGHTS, len(trained)))})
    return [trained[number] for number in numbers]


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """Return at most SAMPLE numbers of a tensor, evenly spread."""
    size = numel(tensor)
    flat = tensor.reshape(-1) if tensor.numel() == size else tensor.new_empty(size, device="meta")
    return flat[:: max(1, size // SAMPLE)]


def all_reduced(tensor: torch.Tensor, by: Any = torch.distributed.ReduceOp.SUM, group: Any = None) -> torch.Tensor:
    """Return the sum (or what `by` says) of all ranks' tensors, or of a group's, each unchanged."""
    found = tensor.clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found, by, group=group)
    return found
