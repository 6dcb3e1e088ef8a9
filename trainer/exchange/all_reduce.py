"""A sum over hosts in few bits, whose error is kept and added to the next one.

Each host encodes its numbers and sends each other host a piece of them; the owner of a piece sums it, encodes the sum
and sends it to all. What either encoding leaves out (the residual, kept in bf16) is added before the next one: over
many steps next to nothing is lost. All ranks decode the same bytes, so that they have the same numbers to the last bit.

With N hosts a host sends 2 (N - 1) / N of its encoded numbers. They go in buckets: while one is on its way the next is
encoded and the last decoded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from trainer.estimate.traffic import COMPRESSED_BUCKET
from trainer.exchange import quantizer
from trainer.exchange.hosts import Hosts
from trainer.exchange.quantizer import BLOCK

UNDER_WAY = 2  # buckets that are sent at once
RESIDUAL = torch.bfloat16  # of an eighth of a gradient's size it keeps 8 bits: half the memory of fp32


class CompressedSum:
    """Sums `count` fp32 numbers over all hosts in `bits` each; every rank makes one alike, and calls it alike.

    `residual`: what this rank's encodings have left out, [a lane's share of all buckets]; `own_residual`: of the pieces
    that it sums, [that share / hosts]. Both are None for a rank without a lane.
    """

    def __init__(self, count: int, bits: int, hosts: Hosts, device: torch.device,
                 bucket: int = COMPRESSED_BUCKET) -> None:
        self.count, self.bits, self.hosts = count, bits, hosts
        self._device = device
        self.sizes = bucket_sizes(count, bucket, hosts.lanes * hosts.count)
        self.bucket = self.sizes[0]
        self.residual = self.own_residual = None
        if hosts.lane is not None:
            mine = sum(self.sizes) // hosts.lanes
            self.residual = torch.zeros(mine, dtype=RESIDUAL, device=device)
            self.own_residual = torch.zeros(mine // hosts.count, dtype=RESIDUAL, device=device)
        self.sent = 0  # bytes that this rank has sent to other hosts

    def piece(self, number: int) -> int:
        """Return the numbers of a bucket that one host sums in one lane."""
        return self.sizes[number] // (self.hosts.lanes * self.hosts.count)

    def reduce(self, buckets: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
        """Sum buckets [their sizes], each weighted already; return the codes of this rank's pieces, and the norm.

        The norm is that of all sums, as they will be decoded: the same to the last bit on every rank.
        """
        codes: list[torch.Tensor] = []
        waiting: deque[tuple[int, torch.Tensor, Any]] = deque()
        squares = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, bucket in enumerate(buckets):
            if self.hosts.lane is not None:
                waiting.append((number, *self._send(number, bucket)))
                if len(waiting) == UNDER_WAY:
                    squares += self._sum(*waiting.popleft(), codes)
        while waiting:
            squares += self._sum(*waiting.popleft(), codes)
        return codes, self._norm(squares)

    def _send(self, number: int, bucket: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Encode this lane's share of a bucket and send each host its piece; return where theirs arrive, and how."""
        lane, lanes, piece = self.hosts.lane, self.hosts.lanes, self.piece(number)
        assert self.residual is not None and lane is not None
        left = part_of(self.residual, number, self.bucket // lanes, self.sizes[number] // lanes)
        own = bucket.view(lanes, -1)[lane] + left
        decoded = torch.empty_like(own)
        payload = quantizer.encode(own.view(self.hosts.count, piece), self.bits, decoded)
        left.copy_(own.sub_(decoded))
        arriving = torch.empty_like(payload)
        work = dist.all_to_all_single(arriving.view(-1), payload.view(-1), group=self.hosts.across, async_op=True)
        self.sent += payload.numel() // self.hosts.count * (self.hosts.count - 1)
        return arriving, (work, payload)  # the payload is kept until it has gone

    def _sum(self, number: int, arriving: torch.Tensor, under_way: Any, codes: list[torch.Tensor]) -> torch.Tensor:
        """Sum this rank's piece of a bucket, note its codes; return the sum of its decoded numbers' squares."""
        under_way[0].wait()
        piece = self.piece(number)
        assert self.own_residual is not None
        left = part_of(self.own_residual, number, self.bucket // self.hosts.lanes // self.hosts.count, piece)
        total = quantizer.decode(arriving, self.bits, piece).sum(0).add_(left)
        decoded = torch.empty_like(total)
        codes.append(quantizer.encode(total, self.bits, decoded))
        left.copy_(total.sub_(decoded))
        lane = self.hosts.lane or 0
        first = number * self.bucket + (lane * self.hosts.count + self.hosts.number) * piece
        return decoded[:max(0, self.count - first)].double().square_().sum()  # without what fills the last bucket up

    def _norm(self, squares: torch.Tensor) -> float:
        """Return the norm of all ranks' pieces; each adds them up in the same order."""
        all_squares = torch.empty(self.hosts.world_size, dtype=torch.float64, device=self._device)
        dist.all_gather_into_tensor(all_squares, squares.view(1))
        return sum(all_squares.tolist()) ** 0.5

    def gather(self, codes: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the sums, bucket by bucket [their sizes], on every rank."""
        waiting: deque[tuple[int, torch.Tensor, Any]] = deque()
        for number in range(len(self.sizes)):
            waiting.append((number, *self._ask(number, codes)))
            if len(waiting) == UNDER_WAY:
                yield self._decoded(*waiting.popleft())
        while waiting:
            yield self._decoded(*waiting.popleft())

    def _ask(self, number: int, codes: list[torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """Begin to gather a bucket's codes [lanes, hosts, bytes]."""
        hosts = self.hosts
        size = quantizer.payload_bytes(self.piece(number), self.bits)
        arriving = torch.empty(hosts.lanes, hosts.count * size, dtype=torch.uint8, device=self._device)
        if hosts.lane is None:
            return arriving, None
        work = dist.all_gather_into_tensor(arriving[hosts.lane], codes[number], group=hosts.across, async_op=True)
        self.sent += size * (hosts.count - 1)
        return arriving, work

    def _decoded(self, number: int, arriving: torch.Tensor, work: Any) -> torch.Tensor:
        """Return a bucket's sums once they are here; within the host each lane's rank passes on what it has got."""
        if work is not None:
            work.wait()
        if len(self.hosts.here) > 1:
            for lane, source in enumerate(self.hosts.here[:self.hosts.lanes]):
                dist.broadcast(arriving[lane], source, group=self.hosts.within)
        return quantizer.decode(arriving.view(self.hosts.lanes * self.hosts.count, -1), self.bits,
                                self.piece(number)).view(-1)

    def left_out(self, places: torch.Tensor) -> torch.Tensor:
        """Return what encoding has left out of the numbers at these places of the row, as far as this rank knows.

        Its sum over all ranks is what the sums so far lack.
        """
        found = torch.zeros(places.shape, dtype=torch.float32, device=self._device)
        if self.residual is None or self.own_residual is None:
            return found
        lanes, hosts = self.hosts.lanes, self.hosts.count
        number, within = places // self.bucket, places % self.bucket
        share = torch.tensor(self.sizes, device=self._device)[number] // lanes
        mine, place = within // share == self.hosts.lane, within % share
        piece = share // hosts
        summed = mine & (place // piece == self.hosts.number)
        found[mine] += self.residual[(number * (self.bucket // lanes) + place)[mine]].float()
        found[summed] += self.own_residual[(number * (self.bucket // lanes // hosts) + place % piece)[summed]].float()
        return found


def bucket_sizes(count: int, bucket: int, pieces: int) -> list[int]:
    """Return the numbers of each bucket of `count`, of `bucket` or a little more: pieces and blocks come out even."""
    share = pieces * BLOCK
    bucket = -(-min(bucket, count) // share) * share
    return [-(-min(bucket, count - start) // share) * share for start in range(0, count, bucket)]


def part_of(whole: torch.Tensor, number: int, step: int, size: int) -> torch.Tensor:
    """Return what belongs to a bucket, of which all but the last take `step` numbers."""
    return whole[number * step:number * step + size]
