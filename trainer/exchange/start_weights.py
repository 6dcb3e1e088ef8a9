"""Every host starts with the same weights: they are compared, and rank 0's sent to all where they differ.

DeepSpeed sends rank 0's weights to the ranks that its engine knows, which with `--lan_compress` are those of a host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from trainer.distributed.ranks import Ranks

CHUNK = 1 << 24  # numbers that are summed at a time
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def agree(model: torch.nn.Module, ranks: Ranks) -> bool:
    """Return whether all ranks had the same weights; where not, they have rank 0's afterwards."""
    own = digest(model)
    if len(set(ranks.all_gather_json("start-weights", own))) == 1:
        return True
    for tensor in tensors_of(model):
        group = ranks._side_group if tensor.device.type == "cpu" else None
        whole = tensor.contiguous()
        dist.broadcast(whole.view(-1).view(torch.uint8), 0, group=group)  # gloo doesn't know every kind of number
        tensor.copy_(whole)
    return False


def digest(model: torch.nn.Module) -> int:
    """Return a number that hangs on every bit of a model's weights, and is the same on every kind of device."""
    total = 0
    for place, tensor in enumerate(tensors_of(model), start=1):
        flat = tensor.reshape(-1).view(INTEGERS[tensor.element_size()])
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start:start + CHUNK].to(torch.int64)
            by_place = torch.arange(1 + start, 1 + start + part.numel(), device=part.device)
            total += place * int((part * (by_place % 65521 + 1)).sum())  # it wraps around, on every device alike
    return total % (1 << 61)


def tensors_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield a model's weights and buffers, in their order."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor.detach()
