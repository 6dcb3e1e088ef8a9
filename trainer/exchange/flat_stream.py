"""Tensors one after another as one long row of numbers, cut into buckets; and back again. One tensor and one bucket are
held at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch


def buckets_of(tensors: Iterable[torch.Tensor], sizes: Sequence[int], weight: float, device: torch.device
               ) -> Iterator[torch.Tensor]:
    """Yield the numbers of tensors times `weight`, in fp32 buckets of these sizes; the end is filled with zeros."""
    wanted = iter(sizes)
    bucket, filled = torch.zeros(next(wanted), dtype=torch.float32, device=device), 0
    for tensor in tensors:
        flat, taken = tensor.detach().reshape(-1), 0
        while taken < flat.numel():
            size = min(flat.numel() - taken, bucket.numel() - filled)
            torch.mul(flat[taken:taken + size].to(torch.float32), weight, out=bucket[filled:filled + size])
            taken, filled = taken + size, filled + size
            if filled == bucket.numel() and (following := next(wanted, 0)):
                yield bucket
                bucket, filled = torch.zeros(following, dtype=torch.float32, device=device), 0
    yield bucket


def spread(buckets: Iterable[torch.Tensor], shapes: Sequence[torch.Size],
           take: Callable[[int, torch.Tensor], None]) -> None:
    """Cut buckets into fp32 tensors of these shapes, and have each taken, with its number, once it is whole."""
    row = iter(buckets)
    bucket, used = next(row), 0
    for number, shape in enumerate(shapes):
        whole, filled = torch.empty(shape.numel(), dtype=torch.float32, device=bucket.device), 0
        while filled < whole.numel():
            if used == bucket.numel():
                bucket, used = next(row), 0
            size = min(whole.numel() - filled, bucket.numel() - used)
            whole[filled:filled + size] = bucket[used:used + size]
            filled, used = filled + size, used + size
        take(number, whole.view(shape))
