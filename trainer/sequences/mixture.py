"""Several datasets in one training: which pieces an epoch has, so that each dataset has its share of the tokens.

An epoch ends when every dataset was read whole; one that runs out before starts again. Pieces are packed and shuffled
together, so that the shares hold in each global batch on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.errors import UserError

MOST_PIECES = 100_000_000  # of an epoch: their numbers alone take 0.8 GB
NEARLY = 1e-9  # what a quotient of sums may be off by


def times_read(tokens: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Return how often an epoch reads each dataset, given their tokens and their shares: at least once."""
    epoch = max(count / share for count, share in zip(tokens, shares, strict=True))
    return [share * epoch / count for count, share in zip(tokens, shares, strict=True)]


def epoch_pieces(pieces: Any, names: Sequence[str], shares: Sequence[float], seed: int) -> np.ndarray:
    """Return the numbers of the pieces of an epoch, some of them several times; `pieces` has the columns source and
    length.

    Raises UserError for a dataset of which nothing is trained, or shares that would repeat one for ever.
    """
    sources, lengths, tokens = columns_of(pieces, len(shares))
    if not tokens.all():
        raise UserError(f"{names[int(np.argmin(tokens))]}: nothing to train on", shared=True)
    times, random = times_read(tokens.tolist(), shares), np.random.default_rng(seed)
    if (most := float(np.bincount(sources, minlength=len(shares)) @ np.asarray(times))) > MOST_PIECES:
        often = int(np.argmax(times))
        raise UserError(f"an epoch would read {names[often]} {times[often]:,.0f} times ({most:,.0f} pieces): give it a "
                        "smaller weight", shared=True)
    found = []
    for number, each in enumerate(times):
        own = np.flatnonzero(sources == number)
        whole = int(each + NEARLY)
        order = random.permutation(own)
        part = np.searchsorted(np.cumsum(lengths[order]), max(0.0, each - whole - NEARLY) * tokens[number])
        found += [own] * whole + [np.sort(order[:part])]
    return np.concatenate(found)


def columns_of(pieces: Any, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each piece the dataset and the tokens, and of each of `count` datasets the tokens."""
    table = pieces.with_format("numpy")
    sources, lengths = np.asarray(table["source"][:]), np.asarray(table["length"][:])
    return sources, lengths, np.bincount(sources, weights=lengths, minlength=count)


def described(pieces: Any, epoch: np.ndarray | None, names: Sequence[str]) -> str:
    """Return each dataset's part of an epoch's tokens, and how often it is read where that isn't once."""
    sources, lengths, once = columns_of(pieces, len(names))
    chosen = slice(None) if epoch is None else epoch
    tokens = np.bincount(sources[chosen], weights=lengths[chosen], minlength=len(names))
    times = tokens / np.maximum(once, 1)
    return ", ".join(f"{name} {count / tokens.sum():.0%}" + (f" (read {often:.1f} times in an epoch)" if often > 1.05
                                                             else "")
                     for name, count, often in zip(names, tokens, times, strict=True))
