"""What each stage has, brought to all ranks under the model's own names: an adapter's weights, optimizer states."""

from __future__ import annotations

import itertools
import math

import torch
import torch.distributed as dist

from trainer.distributed.ranks import Ranks

Named = dict[str, torch.Tensor]
_numbers = itertools.count()  # of the calls, which all ranks make in the same order


def gathered(own: Named, ranks: Ranks, device: torch.device) -> Named:
    """Return the tensors of all ranks on the CPU, in the ranks' order; all must call it.

    What they are called and how large they are goes through the store, which is signed.
    """
    told = ranks.all_gather_json(f"stage-tensors/{next(_numbers)}", {
        name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in own.items()})
    found: Named = {}
    for rank, described in enumerate(told):
        kinds = {name: (getattr(torch, kind), tuple(shape)) for name, (kind, shape) in described.items()}
        size = sum(kind.itemsize * math.prod(shape) for kind, shape in kinds.values())
        if rank == ranks.rank:
            parts = [value.detach().contiguous().reshape(-1).view(torch.uint8) for value in own.values()]
            flat = torch.cat([part.to(device) for part in parts]) if parts else torch.empty(0, dtype=torch.uint8,
                                                                                            device=device)
        else:
            flat = torch.empty(size, dtype=torch.uint8, device=device)
        if size:
            dist.broadcast(flat, rank)
        flat, start = flat.cpu(), 0
        for name, (kind, shape) in kinds.items():
            end = start + kind.itemsize * math.prod(shape)
            found[name] = flat[start:end].clone().view(kind).reshape(shape)
            start = end
    return found
