"""Where a model's layers are cut: as the user says, or by the memory and speed of each rank's device."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.estimate.memory import USABLE, MemoryInputs
from trainer.estimate.stages import choose_counts
from trainer.split.allowed import check_counts
from trainer.split.stage import Cut, cuts


def choose_cuts(wanted: Sequence[int], layers: int, memory: Sequence[float], speeds: Sequence[float | None],
                load: MemoryInputs | None, head: float = 0.0) -> list[Cut]:
    """Return a stage for each rank. `wanted`: layers of each; none for what the ranks' `memory`, in bytes, and `speeds`
    allow. `load`: what one rank would hold, None where that isn't known; `head`: how many layers' work the head is.

    Raises UserError.
    """
    ranks = len(memory)
    check_counts(wanted, layers, ranks)
    if wanted:
        return cuts(wanted)
    known = [speed for speed in speeds if speed]
    alike = known if len(known) == ranks else [1.0] * ranks
    found = choose_counts(load, [USABLE * size for size in memory], alike, head) if load else None
    return cuts(found or shares(layers, memory))


def shares(layers: int, memory: Sequence[float]) -> list[int]:
    """Return layers for each rank, at least one, in proportion to its memory."""
    found = [1] * len(memory)
    for _ in range(layers - len(memory)):
        poorest = min(range(len(memory)), key=lambda rank: (found[rank] + 1) / max(memory[rank], 1))
        found[poorest] += 1
    return found
