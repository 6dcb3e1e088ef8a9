"""Attention for packed rows on a CPU: document by document, so that none is computed between them, nor a mask made.

On a GPU flash attention does the same where it's installed. A model for which this isn't the same as its usual
that attention is kept; the preflight decides (preflight.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from trainer.options import Options

NAME, USUAL = "documents", "sdpa"
LOGIT_TOLERANCE = 1e-3  # of the logits' spread, by which two ways to compute them may differ in float32
_last: tuple[Any, list[int]] = (None, [])  # every layer asks for the same positions


def lengths_of(positions: torch.Tensor) -> list[int]:
    """Return the lengths of the documents of rows laid end to end, from their positions [rows, width]."""
    global _last
    if _last[0] is not positions:
        starts = (positions.reshape(-1) == 0).nonzero().flatten().tolist()
        _last = positions, [end - start for start, end in zip(starts, [*starts[1:], positions.numel()], strict=True)]
    return _last[1]


def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
           dropout: float = 0.0, scaling: float | None = None, position_ids: torch.Tensor | None = None, **_: Any
           ) -> tuple[torch.Tensor, None]:
    """Return what each token gets of its document, [rows, width, heads, size]; the rest is [rows, heads, width, size].

    Raises ValueError for a model that doesn't tell positions, or that uses a cache.
    """
    rows, heads, width = query.shape[:3]
    if position_ids is None or position_ids.shape != (rows, width) or key.shape[2] != width:
        raise ValueError("attention by documents needs whole rows and their positions")

    def by_document(states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = states.transpose(1, 2).reshape(1, rows * width, states.shape[1], states.shape[3]).transpose(1, 2)
        return flat.split(lengths_of(position_ids), dim=2)

    parts = [scaled_dot_product_attention(*each, dropout_p=dropout, scale=scaling, is_causal=True,
                                          enable_gqa=key.shape[1] != heads)
             for each in zip(by_document(query), by_document(key), by_document(value), strict=True)]
    return torch.cat(parts, dim=2).transpose(1, 2).reshape(rows, width, heads, value.shape[3]), None


def can_use_varlen(model: Any, options: Options, device: str, longest: int) -> bool:
    """Return whether to try it: on a CPU, with nothing else asked for, where all of a document is seen."""
    text = model.config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return device == "cpu" and not options.attn_implementation and not options.torch_compile and \
        model.config._attn_implementation == USUAL and all(not window or window >= longest for window in windows)


def set_attention(model: Any, name: str) -> None:
    """Have a model attend in one way or the other."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(name)


@contextlib.contextmanager
def original_attention(model: Any) -> Iterator[None]:
    """Attend in the usual way for a while: with a cache."""
    before = model.config._attn_implementation
    if before != NAME:
        yield
        return
    set_attention(model, USUAL)
    try:
        yield
    finally:
        set_attention(model, NAME)


def fall_back_unless_equal(model: Any, logits: Any, vocabulary: int, device: Any) -> None:
    """Go back to the usual attention if a model's logits for a packed row differ with it; `logits` as in CausalTrainer.

    Under ZeRO-3 every rank must call it.
    """
    if model.config._attn_implementation != NAME:
        return
    ids = torch.randint(0, vocabulary, (2, 24), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.stack([torch.arange(24), torch.cat([torch.arange(9), torch.arange(15)])]).to(device)
    try:
        found = logits(ids, positions).float()
    except (ValueError, TypeError, RuntimeError):
        found = None
    set_attention(model, USUAL)
    expected = logits(ids, positions).float()
    if found is not None and (found - expected).abs().max().item() <= LOGIT_TOLERANCE * expected.std().item():
        set_attention(model, NAME)
