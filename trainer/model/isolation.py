"""Whether a model can be trained on packed documents: none sees another, and no token sees those after it.

Which inputs keep documents apart differs by model; `settle` finds those that do, by trying. Families of which it is
known that none does are refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

from trainer.errors import UserError

Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# How a model is told where documents begin. "positions": by positions that start anew, from which transformers makes
# the mask; "varlen": flash attention, by the documents' bounds; "mask": by a mask of every pair of tokens.
Way = Literal["positions", "varlen", "mask"]
STATEFUL = "it carries a state from each token to the next, across documents"
# By model_type: why whole documents can't be packed.
UNPACKABLE = {**dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "bamba", "jamba", "zamba", "zamba2", "rwkv", "xlstm",
                               "recurrent_gemma", "falcon_h1", "granitemoehybrid", "nemotron_h", "lfm2", "lfm2_moe",
                               "qwen3_next", "kimi_linear", "olmo_hybrid"), STATEFUL),
              "bloom": "its positions are counted along the whole sequence", "mpt":
              "its positions are counted along the whole sequence"}
HALF = 12  # tokens of each of the two documents that are tried
# Of the logits' spread, the root mean square by which they may differ where they should be equal: rounding, in 32 and
# in 16 bits. What documents see of each other is 100 times that in the models that leak.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
ALONE = 3  # times as much, since other shapes are rounded otherwise


class Packs(Protocol):
    """What computes the logits, and tells the model in one way or another where documents begin."""

    way: Way

    def logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Return logits [rows, width, vocabulary]."""


def check_family(config: Any) -> None:
    """Raise a UserError for a model whose architecture can't keep packed documents apart."""
    text = config.get_text_config()
    why = UNPACKABLE.get(text.model_type)
    if text.model_type == "falcon" and getattr(text, "alibi", False):
        why = UNPACKABLE["bloom"]
    if why:
        raise UserError(f"{text.model_type} can't be trained on packed documents: {why}. Train it with --no_packing",
                        shared=True)


def document_mask(positions: torch.Tensor) -> torch.Tensor:
    """Return which tokens each token sees [rows, 1, width, width], from positions that start anew in each document."""
    documents = (positions == 0).cumsum(1)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones_like(same[:1]).tril()


def check_causal(logits: Logits, vocabulary: int, device: Any, rows: int, precision: str) -> None:
    """Raise a UserError if a token sees those after it, as in an encoder, or if logits aren't finite.

    `logits` takes input_ids and position_ids ([rows, 24]). On ZeRO-3 every rank must call this.
    """
    first, _, last = samples(vocabulary, rows)
    ids = torch.cat([first, last], 1)
    positions = torch.arange(2 * HALF).repeat(rows, 1).to(device)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % vocabulary
    found, other = (logits(each.to(device), positions)[:, :-1].float() for each in (ids, changed))
    if not found.isfinite().all():
        raise UserError("the model's logits aren't finite before the first step: its weights are damaged"
                        + (", or fp16 is too narrow for it: --precision bf16" if precision == "fp16" else ""),
                        shared=True)
    if difference(found, other) > TOLERANCE[precision]:
        raise UserError("this model sees the tokens that it is to predict (it is an encoder): it can't be trained as a "
                        "causal language model", shared=True)


def leak(logits: Logits, vocabulary: int, device: Any, rows: int) -> tuple[float, float, float]:
    """Return how much a document's logits change with the one packed before it, and against those of it alone; and how
    much those of a first document change against it alone, which is rounding: it sees no other.

    As shares of their spread; `rows` are those of a micro batch, since kernels differ for one and for several.
    """
    first, other, last = samples(vocabulary, rows)
    positions = torch.arange(HALF).repeat(rows, 2).to(device)
    packed = [logits(torch.cat([before, last], 1).to(device), positions).float() for before in (first, other)]
    alone = [logits(each.to(device), positions[:, :HALF]).float() for each in (first, last)]
    return (difference(packed[0][:, HALF:], packed[1][:, HALF:]), difference(packed[0][:, HALF:], alone[1]),
            difference(packed[0][:, :HALF], alone[0]))


def check_isolation(logits: Logits, vocabulary: int, device: Any, rows: int = 1, precision: str = "fp32") -> None:
    """Raise a UserError if a document packed behind another sees it. On ZeRO-3 every rank must call this."""
    change, alone, rounding = leak(logits, vocabulary, device, rows)
    if not (change <= TOLERANCE[precision] and alone <= ALONE * max(TOLERANCE[precision], rounding)):
        raise UserError("this model lets packed documents see each other (their logits change by "
                        f"{max(change, alone):.1%}): train it with --no_packing", shared=True)


def settle(model: Packs, vocabulary: int, device: Any, rows: int, precision: str) -> None:
    """Have the model told in a way that keeps documents apart; raise a UserError if there is none.

    On ZeRO-3 every rank must call this.
    """
    try:
        check_isolation(model.logits, vocabulary, device, rows, precision)
    except UserError as leaks:
        if model.way != "positions":
            raise
        model.way = "mask"
        try:
            check_isolation(model.logits, vocabulary, device, rows, precision)
        except (UserError, TypeError, ValueError, RuntimeError):  # not every model takes one
            model.way = "positions"
            raise leaks from None


def samples(vocabulary: int, rows: int) -> torch.Tensor:
    """Return three different documents for each row, [3, rows, HALF]."""
    return torch.randint(0, vocabulary, (3, rows, HALF), generator=torch.Generator().manual_seed(0))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the root mean square of the difference, as a share of the first one's spread; NaN if it isn't finite."""
    return ((one - other).square().mean().sqrt() / one.std()).item()
