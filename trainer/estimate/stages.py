"""A model whose layers are split over ranks: what each holds, how many layers it gets, how long a step takes.

1F1B: a step of M micro batches takes M + S - 1 times one on S ranks, and rank s has S - s of them under way (arXiv
2104.04473, section 2.2), but for the last one more where they overlap (trainer/split/schedule.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from trainer.estimate.batch import largest
from trainer.estimate.memory import MemoryInputs, bytes_needed
from trainer.estimate.shape import Shape

MICRO_BATCHES = 4  # for each rank, where nothing else is said: of 2 ranks one waits for a tenth of the time then
PLANNED = "LANSPEED_LAYERS"  # the variable in which the launcher says what it has planned: layers of each rank

INDEX = "model.safetensors.index.json"  # in which file of a model each weight is
NUMBERED = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")  # a weight's name with its layer


@dataclass(frozen=True)
class Timing:
    """A step: its seconds, and the share of them in which each rank computes nothing."""

    seconds: float
    idle: tuple[float, ...]


def stage_bytes(load: MemoryInputs, count: int, rank: int, ranks: int) -> dict[str, float]:
    """Return the bytes of a rank with `count` of the layers, by what takes them. `load`: the whole model's, of which
    one rank would hold all."""
    embedding = load.vocabulary * load.hidden
    ends = 2 * embedding if load.weights > 2 * embedding else 0.0
    each = (load.weights - ends) / load.layers
    weights = each * count + (embedding if ends and rank in (0, ranks - 1) else 0.0)
    trained = weights if load.trained == load.weights else load.trained * count / load.layers
    part = replace(load, weights=weights, trained=trained, layers=count, stage=None)
    found = bytes_needed(part)
    behind = ranks - 1 - rank
    under_way = min(max(load.accumulation, 1), behind + 1 + min(behind, 1))
    found["activations"] = bytes_needed(replace(part, layers=count * under_way))["activations"]
    if rank != ranks - 1:
        found["logits"] = 0.0
    return {name: size for name, size in found.items() if size}


def head_layers(shape: Shape) -> float:
    """Return how many layers' work a model's head is, which the last rank has."""
    head = shape.vocabulary * shape.hidden
    return head * shape.layers / max(shape.active - shape.embedding - head, 1.0)


def choose_counts(load: MemoryInputs, room: Sequence[float], speeds: Sequence[float], head: float) -> list[int] | None:
    """Return the layers of each rank: as many as fit into its `room`, in bytes, so that the slowest is done soonest.

    `speeds`: what the ranks' devices compute in a second, in any unit; `head`: as `head_layers` has it. None where
    they can't hold all layers.
    """
    ranks = len(room)

    def fits(rank: int, count: int) -> bool:
        return sum(stage_bytes(load, count, rank, ranks).values()) <= room[rank]

    most = [largest(load.layers, partial(fits, rank)) for rank in range(ranks)]
    if load.layers < ranks or min(most) < 1 or sum(most) < load.layers:
        return None
    found = [1] * ranks
    for _ in range(load.layers - ranks):
        able = [rank for rank in range(ranks) if found[rank] < most[rank]]
        found[min(able, key=lambda rank: (found[rank] + 1 + head * (rank == ranks - 1)) / speeds[rank])] += 1
    return found


def step_time(computing: Sequence[float], sending: float, micro_batches: int, overlaps: bool) -> Timing:
    """Return how long a step takes. `computing`: each rank's seconds for a micro batch, forward and backward;
    `sending`: the seconds that the hidden states of one need at a cut, as its gradients do; `overlaps`: while ranks
    compute. Else a rank waits for all that it sends and receives: twice as much between two others.

    Within 8 % of what stages took that computed by sleeping (benchmarks/split_layers.py).
    """
    slowest, cuts = max(computing), len(computing) - 1
    each = max(slowest, sending) if overlaps else slowest + 2 * sending * min(cuts, 2)
    seconds = (micro_batches - 1) * each + sum(computing) + 2 * cuts * sending
    return Timing(seconds, tuple(1 - micro_batches * one / seconds for one in computing))


def layer_of(name: str) -> int | None:
    """Return the number of a weight's layer by the weight's name, None for one beside the layers."""
    found = NUMBERED.search(name)
    return int(found[1]) if found else None


def other_shards(places: Mapping[str, str], layers: range) -> set[str]:
    """Return the files that hold nothing but weights of other layers. `places`: the file of each weight."""
    own = {file for name, file in places.items() if (layer := layer_of(name)) is None or layer in layers}
    return set(places.values()) - own
