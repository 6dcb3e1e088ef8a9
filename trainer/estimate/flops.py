"""What a training step computes."""

from __future__ import annotations

from trainer.estimate.shape import Shape


def flops_per_token(shape: Shape, sequence: int, frozen: bool) -> float:
    """Return the FLOP of a training step per token: 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B).

    N: parameters that a token meets, without the input embedding; H Q: hidden size, T: tokens of a sequence. Of a
    frozen model's 6 N, the 2 N for the gradients of its weights fall away.
    """
    attention = 12 * shape.layers * shape.hidden * sequence
    return (4.0 if frozen else 6.0) * (shape.active - shape.embedding) + attention
