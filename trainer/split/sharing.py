"""What each stage has, told and brought to other ranks under the model's own names: weights and optimizer states."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed.ranks import Ranks

Named = dict[str, torch.Tensor]
_numbers = itertools.count()  # of the calls, which all ranks make in the same order


@dataclass(frozen=True)
class Kind:
    """What a tensor is, without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the tensor whose bytes are these."""
        return flat.view(self.dtype).reshape(self.shape)


Kinds = dict[str, Kind]


def told(ranks: Ranks, value: Any) -> list[Any]:
    """Return what each rank tells, any JSON value; all must call it. It goes through the store, which is signed."""
    return ranks.all_gather_json(f"stages/{next(_numbers)}", value)


def kinds_of_all(own: Mapping[str, Kind], ranks: Ranks) -> list[Kinds]:
    """Return what tensors each rank has; all must call it."""
    described = {name: [str(kind.dtype).removeprefix("torch."), list(kind.shape)] for name, kind in own.items()}
    return [{name: Kind(getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in each.items()}
            for each in told(ranks, described)]


def kinds(own: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> Kinds:
    """Return what tensors these are, or will be once they are of another `dtype`."""
    return {name: Kind(dtype or value.dtype, tuple(value.shape)) for name, value in own.items()}


def flat(value: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def gathered(own: Named, ranks: Ranks, device: torch.device) -> Named:
    """Return the tensors of all ranks on the CPU, in the ranks' order; all must call it."""
    found: Named = {}
    for rank, each in enumerate(kinds_of_all(kinds(own), ranks)):
        if rank == ranks.rank:
            parts = [flat(value).to(device) for value in own.values()]
            together = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)
        else:
            together = torch.empty(sum(kind.size for kind in each.values()), dtype=torch.uint8, device=device)
        if len(together):
            dist.broadcast(together, rank)
        together, start = together.cpu(), 0
        for name, kind in each.items():
            found[name] = kind.of(together[start : start + kind.size].clone())
            start += kind.size
    return found


def send(value: torch.Tensor, rank: int, ranks: Ranks) -> None:
    """Send a tensor, whose kind the receiver knows."""
    if value.numel():
        dist.send(flat(value).cpu(), rank, group=ranks._side_group)


def receive(kind: Kind, rank: int, ranks: Ranks) -> torch.Tensor:
    """Return a tensor of a kind that a rank sends."""
    room = torch.empty(kind.size, dtype=torch.uint8)
    if kind.size:
        dist.recv(room, rank, group=ranks._side_group)
    return kind.of(room)
