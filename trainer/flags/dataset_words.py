"""The datasets of --dataset_path, with how much of a training each of them is.

    python trainer/train.py --model_name_or_path tiny --dataset_path chat.jsonl:0.3 notes/
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import usage_error

WEIGHT = re.compile(r"[0-9]*\.?[0-9]+")


@dataclass(frozen=True)
class DatasetPart:
    """A dataset by its path or name; `share` of the tokens that are trained, None: it is read once in an epoch."""

    name: str
    share: float | None = None


def name_and_weight(word: str) -> tuple[str, float | None]:
    """Split D:0.3; what lies under the whole name has no weight."""
    name, colon, weight = word.rpartition(":")
    if colon and name and WEIGHT.fullmatch(weight) and not Path(word).expanduser().exists():
        return name, float(weight)
    return word, None


def parts_of(words: Iterable[str]) -> tuple[DatasetPart, ...]:
    """Return what D, D:WEIGHT, ... name. Where some have a weight, the others have equal parts of what is left to 1.

    Raises UserError where that is nothing, or a dataset is named twice.
    """
    found = [name_and_weight(word) for word in words]
    names, weights = [name for name, _ in found], [weight for _, weight in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise usage_error(f"--dataset_path names {twice} twice: {twice}:2 gives it more weight")
    given = [weight for weight in weights if weight is not None]
    if not given or len(found) == 1:
        return tuple(DatasetPart(name) for name in names)
    if not all(given):
        raise usage_error("--dataset_path: a weight is above 0")
    rest = len(found) - len(given)
    if rest and sum(given) >= 1:
        raise usage_error(f"--dataset_path: weights of {sum(given):g} leave nothing for {names[weights.index(None)]}: "
                          "give it one too")
    whole = 1.0 if rest else sum(given)
    each = (1 - sum(given)) / rest if rest else 0.0
    return tuple(DatasetPart(name, (each if weight is None else weight) / whole) for name, weight in found)


def described(parts: Iterable[DatasetPart]) -> str | None:
    """Return the shares as text, to tell them from others; None where there are none."""
    return " ".join(f"{part.share:.4g}" for part in parts if part.share is not None) or None
