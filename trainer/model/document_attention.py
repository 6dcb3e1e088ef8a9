"""Attention for packed rows document by document, so that none is computed between them, nor a mask made.

On a CPU ("documents") each document is computed by itself. On a GPU ("varlen") torch's own flash attention kernel gets
their bounds; nothing has to be installed for it. A model for which the result isn't the same as that of its usual
attention keeps that one; the preflight decides (preflight.py).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from trainer.errors import is_out_of_memory
from trainer.model.head_loss import compute_dtype
from trainer.model.isolation import ALONE, TOLERANCE, Logits, difference
from trainer.options import Options

DOCUMENTS, VARLEN, USUAL = "documents", "varlen", "sdpa"
TOLD_BOUNDS = ("flash", VARLEN)  # in the names of those that are told where documents begin and end
_last: tuple[Any, list[int]] = (None, [])  # every layer asks for the same positions


def lengths_of(positions: torch.Tensor) -> list[int]:
    """Return the lengths of the documents of rows laid end to end, from their positions [rows, width]."""
    global _last
    if _last[0] is not positions:
        starts = (positions.reshape(-1) == 0).nonzero().flatten().tolist()
        _last = positions, [end - start for start, end in zip(starts, [*starts[1:], positions.numel()], strict=True)]
    return _last[1]


def laid_end_to_end(states: torch.Tensor) -> torch.Tensor:
    """Return states [rows, heads, width, size] as [rows * width, heads, size]."""
    return states.transpose(1, 2).flatten(0, 1)


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
        return laid_end_to_end(states)[None].transpose(1, 2).split(lengths_of(position_ids), dim=2)

    parts = [scaled_dot_product_attention(*each, dropout_p=dropout, scale=scaling, is_causal=True,
                                          enable_gqa=key.shape[1] != heads)
             for each in zip(by_document(query), by_document(key), by_document(value), strict=True)]
    return torch.cat(parts, dim=2).transpose(1, 2).reshape(rows, width, heads, value.shape[3]), None


def attend_varlen(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
                  dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
                  cu_seq_lens_q: torch.Tensor | None = None, **more: Any) -> tuple[torch.Tensor, None]:
    """Return the same by torch's varlen kernel; `cu_seq_lens_q` as in `packing.varlen_bounds`.

    Raises ValueError for a model that doesn't pass the bounds on, uses a cache, or asks for what the kernel can't do.
    """
    rows, heads, width = query.shape[:3]
    if cu_seq_lens_q is None or key.shape[2] != width or not getattr(module, "is_causal", True):
        raise ValueError("varlen attention needs whole rows and the bounds of their documents")
    if dropout or any(more.get(name) is not None for name in ("s_aux", "softcap")):
        raise ValueError("varlen attention has no dropout, sinks or capped logits")
    kind = compute_dtype(query) if query.dtype == torch.float32 else query.dtype
    q, k, v = (laid_end_to_end(each).to(kind) for each in (query, key, value))
    # The longest that a document can be, not the longest of this batch: one number, for which torch compiles once.
    found = varlen_kernel(q, k, v, cu_seq_lens_q, width, scaling, sliding_window)
    return found.reshape(rows, width, heads, -1), None


@torch.compiler.disable  # a layer is compiled around it
def varlen_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
                  scale: float | None, window: int | None) -> torch.Tensor:
    """Call torch's varlen_attn on states [tokens, heads, size], causally; `window`: tokens that one sees, itself too.

    It knows grouped heads since torch 2.13, and scales and windows not much longer. Raises ValueError for a window
    where it doesn't.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    more: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            more["enable_gqa"] = True
        else:
            key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    if "scale" in known:
        more["scale"] = scale
    elif scale is not None:
        query = query * (scale * query.shape[-1] ** 0.5)
    if "window_size" in known:
        more["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None or window >= longest:
        more["is_causal"] = True
    else:
        raise ValueError("this torch's varlen attention has no windows")
    found: Any = varlen_attn(query, key, value, bounds, bounds, longest, longest, **more)
    return torch.as_tensor(found)


for _name, _function in ((DOCUMENTS, attend), (VARLEN, attend_varlen)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, lambda *_, **__: None)


def choose(model: Any, options: Options, device: str, precision: str, modern: bool, longest: int) -> str | None:
    """Return which of the two to try, None for neither: with nothing else asked for, where the model's usual attention
    is torch's, and all that a token sees can be told.

    `modern`: the GPU can run flash attention; `longest`: tokens of the longest document.
    """
    text = model.config.get_text_config()
    cut_off = {name: getattr(text, name, None) or longest for name in ("sliding_window", "attention_chunk_size")}
    if options.attn_implementation or model.config._attn_implementation != USUAL or \
            cut_off["attention_chunk_size"] < longest:
        return None
    if device == "cpu":
        return None if options.torch_compile or cut_off["sliding_window"] < longest else DOCUMENTS
    if device != "cuda" or not modern or precision == "fp32" or options.no_packing:
        return None
    return VARLEN if runs_here(text, torch.device(device), torch.float16 if precision == "fp16" else torch.bfloat16) \
        else None


def runs_here(config: Any, device: torch.device, kind: torch.dtype) -> bool:
    """Return whether the varlen kernel runs for a model's heads on a device, forward and backward."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    try:
        query, key, value = (
            torch.ones(16, number, size, device=device, dtype=kind, requires_grad=True)
            for number in (heads, *[getattr(config, "num_key_value_heads", None) or heads] * 2))
        bounds = torch.tensor([0, 6, 16], device=device, dtype=torch.int32)
        varlen_kernel(query, key, value, bounds, 16, None, getattr(config, "sliding_window", None)).sum().backward()
    except (ImportError, TypeError, ValueError, RuntimeError, AttributeError) as error:  # in many words by each card
        if is_out_of_memory(error):
            raise
        return False
    return True


@contextlib.contextmanager
def original_attention(model: Any) -> Iterator[None]:
    """Attend in the usual way for a while: with a cache."""
    before = model.config._attn_implementation
    if before not in (DOCUMENTS, VARLEN):
        yield
        return
    model.set_attn_implementation(USUAL)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def fall_back_unless_equal(model: Any, attend_by: Callable[[str], None], logits: Logits, vocabulary: int, device: Any,
                           precision: str) -> None:
    """Go back to the usual attention if a model's logits for a packed row differ with it; `logits` as in CausalTrainer.

    `attend_by` sets the attention by its name. Under ZeRO-3 every rank must call it.
    """
    name = model.config._attn_implementation
    if name not in (DOCUMENTS, VARLEN):
        return
    ids = torch.randint(0, vocabulary, (2, 24), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.stack([torch.arange(24), torch.cat([torch.arange(9), torch.arange(15)])]).to(device)
    try:
        found = logits(ids, positions).float()
    except (ValueError, TypeError, RuntimeError):
        found = None
    attend_by(USUAL)
    expected = logits(ids, positions).float()
    if found is not None and difference(expected, found) <= ALONE * TOLERANCE[precision]:
        attend_by(name)
