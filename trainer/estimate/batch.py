"""How many sequences an optimizer step has, and how the ranks take them: the largest micro batch that fits, and
accumulation up to the global batch, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from trainer.estimate.memory import USABLE, MemoryInputs, gigabytes, total

GLOBAL_TOKENS = 65_536  # of an optimizer step, where nothing else was asked for
LEAST_STEPS = 50  # of an epoch: with fewer the learning rate's schedule has no room
MICRO_TOKENS = 16_384  # of a rank at once: on an H200 four times as many as 8,192 were 11 % faster, and no more
CPU_MICRO = 8  # sequences of a rank at once without a GPU, which more doesn't make faster


@dataclass(frozen=True)
class Batch:
    """A rank's micro batch, its accumulation, and whether activations are computed anew to make it fit.

    `reason`: why it isn't the largest that is useful, for a person; "" where it is.
    """

    micro: int
    accumulation: int
    checkpoints: bool
    reason: str = ""


def default_sequence(is_tiny: bool, limit: int | None) -> int:
    """Return the tokens of a sequence where nothing else was asked for; `limit`: the model's own, None without."""
    wanted = 256 if is_tiny else 1024
    return wanted if limit is None else min(wanted, limit)


def default_global_batch(sequence: int, sequences: int | None) -> int:
    """Return the sequences of an optimizer step, a power of two, so that most numbers of ranks can share them.

    `sequences`: of an epoch, None for a stream.
    """
    wanted = max(1, GLOBAL_TOKENS // sequence)
    if sequences is not None:
        wanted = min(wanted, max(1, sequences // LEAST_STEPS))
    return 1 << (wanted.bit_length() - 1)


def share(global_batch: int, ranks: int, most: int) -> tuple[int, int]:
    """Return a rank's micro batch, `most` at the highest, and its accumulation, as near the global batch as can be."""
    each = max(1, round(global_batch / ranks))
    accumulation = -(-each // most)
    even = next((count for count in range(accumulation, 2 * accumulation) if each % count == 0), None)
    if even:
        return each // even, even
    return max(1, round(each / accumulation)), accumulation


def choose_batch(load: MemoryInputs, global_batch: int, memory: float, on_gpu: bool, may_checkpoint: bool = True
                 ) -> Batch:
    """Return the batch of each rank of a load, whose own micro batch doesn't count.

    `memory`: bytes that the smallest rank has. Activations are computed anew only where not even one sequence fits
    without. Where nothing fits, the smallest is returned: the trainer says what would help when memory runs out.
    """
    useful = max(1, MICRO_TOKENS // load.sequence) if on_gpu else CPU_MICRO
    useful = min(useful, max(1, round(global_batch / load.ranks)))
    room = USABLE * memory
    for checkpoints in sorted({load.checkpoints, load.checkpoints or may_checkpoint}):
        if micro := largest_fitting(replace(load, checkpoints=checkpoints), useful, room):
            found = share(global_batch, load.ranks, micro)
            return Batch(*found, checkpoints, reason(load, useful, micro, checkpoints, memory))
    return Batch(*share(global_batch, load.ranks, 1), load.checkpoints or may_checkpoint,
                 reason(load, useful, 0, True, memory))


def largest_fitting(load: MemoryInputs, most: int, room: float) -> int:
    """Return the largest micro batch up to `most` with which a load fits into `room` bytes, 0 if none does."""
    return largest(most, lambda micro: total(replace(load, micro=micro)) <= room)


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to `most` that fits, where all smaller ones do too; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def reason(load: MemoryInputs, useful: int, micro: int, checkpoints: bool, memory: float) -> str:
    """Return why a micro batch is smaller than the useful one, or activations are computed anew; "" if neither."""
    if micro == useful and checkpoints == load.checkpoints:
        return ""
    has = f"{gigabytes(memory)} GB"
    if micro == 0:
        least = total(replace(load, micro=1, checkpoints=True))
        return f"nothing fits: one sequence needs {gigabytes(least)} of {has}"
    anew = "activations are recomputed: " if checkpoints and not load.checkpoints else ""
    return f"{anew}a micro batch of {useful} would need {gigabytes(total(replace(load, micro=useful)))} of {has}"
