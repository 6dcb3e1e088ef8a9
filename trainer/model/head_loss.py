"""The loss of a language model computed where its head is, some tokens at a time, so that all logits are never held.

The head (the last linear layer) is given what the next tokens are, and returns the summed loss in place of logits:

    head_loss = HeadLoss(model.get_output_embeddings())
    with head_loss.of(labels, trained):
        summed = model(**inputs).logits.sum()

The gradients are computed in the same pass, while a chunk's logits are there; the backward pass only scales them.
Tokens that carry no loss are left out. With Liger's kernels each chunk is one of theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU_TOKENS = 256  # of a chunk: more is no faster there (measured with 49,152 tokens in the vocabulary)
GPU_LOGITS = 1 << 26  # numbers of a chunk's logits: 256 MiB in 32 bits
FP16_SCALE = 16.0  # of the logits' gradients, many of which fp16 would round to 0; more, and their sums overflow
# What computes it: (hidden, weight, targets, bias) -> the sum
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class HeadLoss:
    """A head that returns its tokens' summed loss [1, 1, 1] within `of`, and logits as before outside of it."""

    def __init__(self, head: torch.nn.Linear, kernel: Kernel | None = None) -> None:
        """Take a head over. `kernel`: what computes the loss of all tokens, instead of chunks of plain torch."""
        self._head, self._logits_of, self.kernel = head, head.forward, kernel
        self._targets: tuple[torch.Tensor, torch.Tensor] | None = None
        head.forward = self._forward  # type: ignore[assignment, method-assign]

    def remove(self) -> None:
        """Give the head its own way back."""
        self._head.forward = self._logits_of  # type: ignore[method-assign]

    @contextlib.contextmanager
    def of(self, labels: torch.Tensor, trained: torch.Tensor) -> Iterator[None]:
        """Return losses for a while: `labels` [rows, width], of which token n predicts n + 1; `trained`: the numbers
        of the tokens, counted over all rows, that have a label to predict (`packing.Collator` counts them).
        """
        self._targets = trained, labels.flatten().index_select(0, trained + 1)
        try:
            yield
        finally:
            self._targets = None

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._targets is None:
            return self._logits_of(hidden)
        trained, targets = self._targets
        flat, weight, bias = hidden.flatten(0, -2), self._head.weight, self._head.bias
        if self.kernel is not None:
            kind = compute_dtype(weight)
            summed = self.kernel(flat.index_select(0, trained).to(kind), weight.to(kind), targets, bias)
        else:
            summed = ChunkedLoss.apply(flat, weight, bias, trained, targets)
        return summed.reshape(1, 1, 1)


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return what products are computed in: autocast's, or the weights' own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def chunk_tokens(vocabulary: int, on_cpu: bool) -> int:
    """Return the tokens of a chunk."""
    return CPU_TOKENS if on_cpu else max(CPU_TOKENS, GPU_LOGITS // vocabulary // 64 * 64)


class ChunkedLoss(torch.autograd.Function):
    """Summed cross entropy of the logits `hidden[trained] @ weight.T + bias` for `targets`, in 32 bits."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                trained: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum; keep the gradients of hidden [tokens, size], weight [vocabulary, size] and bias."""
        wants = ctx.needs_input_grad
        kind = compute_dtype(weight)
        fixed = FP16_SCALE if kind == torch.float16 else 1.0
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.to(kind)
            grads = [torch.zeros_like(hidden, dtype=kind) if wants[0] else None,
                     torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None,
                     torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants[2] else None]
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            size = chunk_tokens(len(weight), weight.device.type == "cpu")
            for numbers, wanted in zip(trained.split(size), targets.split(size), strict=True):
                part = hidden.index_select(0, numbers).to(kind)
                logits = (part @ matrix.t()).float()
                if bias is not None:
                    logits += bias
                normalizer = logits.logsumexp(-1, keepdim=True)
                total += (normalizer - logits.gather(-1, wanted[:, None])).sum()
                if any(wants):
                    add_gradients(grads, logits.sub_(normalizer).exp_(), numbers, wanted, part, matrix, fixed)
        ctx.grads, ctx.fixed, ctx.kinds = grads, fixed, (hidden.dtype, weight.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *factors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients, multiplied by that of the sum; they are made once, for one backward pass."""
        factor = factors[0] / ctx.fixed
        found = [None if grad is None else grad.float().mul_(factor).to(kind)
                 for grad, kind in zip(ctx.grads, ctx.kinds, strict=True)]
        ctx.grads = None
        return (*found, None, None)


def add_gradients(grads: list[torch.Tensor | None], shares: torch.Tensor, numbers: torch.Tensor, wanted: torch.Tensor,
                  part: torch.Tensor, matrix: torch.Tensor, fixed: float) -> None:
    """Add a chunk's gradients of hidden, weight and bias, times `fixed`; its probabilities `shares` are overwritten."""
    shares.scatter_add_(1, wanted[:, None], torch.full_like(wanted[:, None], -1, dtype=shares.dtype))
    slopes = (shares.mul_(fixed) if fixed != 1 else shares).to(part.dtype)
    hidden, weight, bias = grads
    if hidden is not None:
        hidden.index_copy_(0, numbers, slopes @ matrix)
    if weight is not None and part.dtype == weight.dtype:
        weight.addmm_(slopes.t(), part)
    elif weight is not None:
        found = slopes.t() @ part
        limit = torch.finfo(torch.float16).max
        weight.add_(found.clamp_(-limit, limit) if part.dtype == torch.float16 else found)  # no scale could cure inf
    if bias is not None:
        bias.add_(slopes.sum(0, dtype=torch.float32))


def liger_kernel() -> Kernel:
    """Return Liger's fused linear cross entropy, summed."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return lambda hidden, weight, targets, bias: loss(weight, hidden, targets, bias)
