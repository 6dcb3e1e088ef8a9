"""What a training step computes."""

from __future__ import annotations

from typing import Any


def flops_per_token(config: Any, parameters: int, sequence_length: int, frozen: bool) -> float:
    """Return the FLOP of a training step per token: 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B).

    N: `parameters` that a token meets, without the input embedding, L: layers, H Q: hidden size, T: sequence length. Of
    a frozen model's 6 N, the 2 N for the gradients of its weights fall away.
    """
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.hidden_size * sequence_length
    return (4.0 if frozen else 6.0) * (parameters - embedding) + attention
