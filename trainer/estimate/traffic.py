"""What an optimizer step sends: bytes that leave each host, counted on network cards (DeepSpeed 0.19.8, gloo).

With f = (R - 1) / R for R ranks, b bytes of a number, P trained and W all weights, G micro steps of accumulation:

    ZeRO-0            2 b f P           an all-reduce of the gradients
    ZeRO-1            3 b f P           an all-reduce of the gradients, an all-gather of the weights
    ZeRO-2   (2 G + 1) b f P            the gradients at every micro step; 3 b f P where they are coalesced
    ZeRO-3       2 G b f W + G b f P    the weights twice and the gradients once, at every micro step

`use_multi_rank_bucket_allreduce: false` reduces the gradients to their owners, 1 + 1/R instead of 2: so counted with 4
hosts in 16 bits (8 % more in 32); with 2 hosts gloo sends as much as without, and NCCL's ring b f P, by its algorithm.
A ring passes through each host once, whatever the number of its ranks, so that a host sends what one rank would.

Between N hosts in few bits (`--lan_compress`), with F = (N - 1) / N:

    gradients         2 F P (bits + 16/128) / 8      they are sent to be summed, and their sums to all
    averages          the same, every H steps        of weights (`--lan_average H`)
"""

from __future__ import annotations

from dataclasses import dataclass

BUCKET_BYTES = 1e8  # what one call moves at most: 5e7 numbers of 16 bits
COMPRESSED_BUCKET = 1 << 22  # numbers that are compressed and sent at a time: 2 MB in 4 bits, 18 ms of 1 Gbit/s


@dataclass(frozen=True)
class Exchange:
    """What a step exchanges: ZeRO's `stage`, `ranks`, bytes of a `number`, weights trained and in all, accumulation.

    `by_owner`: gradients are reduced to their owners; `coalesced`: once a step with ZeRO-2, too; `bits`: of a number
    between `hosts`, 0: not compressed; `period`: steps between averages.
    """

    stage: int
    ranks: int
    number: int
    trained: float
    weights: float
    accumulation: int
    by_owner: bool = False
    coalesced: bool = False
    bits: int = 0
    hosts: int = 1
    period: int = 1


def step_bytes(exchange: Exchange) -> float:
    """Return the bytes that one rank sends, and that leave each host, in an optimizer step; 0 for one rank."""
    if exchange.bits:
        return compressed_bytes(exchange.trained, exchange.bits, exchange.hosts) / exchange.period
    share = exchange.number * (exchange.ranks - 1) / exchange.ranks
    if exchange.stage == 3:
        return share * exchange.accumulation * (2 * exchange.weights + exchange.trained)
    if exchange.stage == 0:
        return share * 2 * exchange.trained
    reduced = 1 + 1 / exchange.ranks if exchange.by_owner else 2
    times = 1 if exchange.stage == 1 or exchange.coalesced else exchange.accumulation
    return share * (reduced * times + 1) * exchange.trained


def step_messages(exchange: Exchange) -> float:
    """Return how many messages a rank waits for in an optimizer step, one after another."""
    if exchange.ranks == 1:
        return 0.0
    if exchange.bits:  # of two buckets that are under way at once it waits for one
        return max(1.0, exchange.trained / COMPRESSED_BUCKET) / exchange.period
    calls = max(1.0, step_bytes(exchange) / BUCKET_BYTES)
    return 2 * (exchange.ranks - 1) * calls


def goodput(bits_per_s: float) -> float:
    """Return the bytes a second that TCP carries over a link of so many bit/s.

    1,448 of 1,538 bytes of each Ethernet frame are data (RFC 894, RFC 1323): 117.7 MB/s of 1 Gbit/s.
    """
    return bits_per_s / 8 * 1448 / 1538


def compressed_bytes(trained: float, bits: int, hosts: int) -> float:
    """Return the bytes that leave each host when so many numbers are summed over hosts in `bits` each.

    Each block of 128 has a scale of 16 bits; numbers are sent once to be summed, and their sums once to all.
    """
    return 2 * (hosts - 1) / hosts * trained * (bits + 16 / 128) / 8


def residual_bytes(lanes: int, hosts: int, averages: bool) -> float:
    """Return the bytes for each trained weight that a rank keeps of what crosses between hosts compressed.

    What its own encoding has left out and that of the sums that it makes, in 16 bits; with averages the last, in 32.
    """
    return 2 * (1 + 1 / hosts) / lanes + (4 if averages else 0)
