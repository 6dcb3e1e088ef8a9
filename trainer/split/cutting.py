"""Where a model's layers are cut: as the user says, or by the memory of each rank's device."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.errors import UserError
from trainer.split.stage import Cut, cuts


def choose_cuts(wanted: Sequence[int], layers: int, memory: Sequence[int]) -> list[Cut]:
    """Return a stage for each rank. `wanted`: layers of each, none for what `memory`, bytes of each, allows.

    Raises UserError.
    """
    ranks = len(memory)
    if ranks < 2:
        raise UserError("--split_layers needs two ranks or more: a model that one holds is trained without it",
                        exit_code=2, shared=True)
    if layers < ranks:
        raise UserError(f"--split_layers: {layers} layers can't be split over {ranks} ranks", exit_code=2, shared=True)
    if wanted and (len(wanted) != ranks or sum(wanted) != layers or min(wanted) < 1):
        example = ",".join(map(str, shares(layers, memory)))
        raise UserError(f"--split_layers {','.join(map(str, wanted))}: {ranks} ranks share {layers} layers, each at "
                        f"least one, as in {example}", exit_code=2, shared=True)
    return cuts(list(wanted) or shares(layers, memory))


def shares(layers: int, memory: Sequence[int]) -> list[int]:
    """Return layers for each rank, at least one, in proportion to its memory."""
    found = [1] * len(memory)
    for _ in range(layers - len(memory)):
        poorest = min(range(len(memory)), key=lambda rank: (found[rank] + 1) / max(memory[rank], 1))
        found[poorest] += 1
    return found
