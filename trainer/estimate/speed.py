"""How long an optimizer step takes: computing, sending, and moving what was offloaded; each with a range.

Computing: what a token costs (`flops.py`) on a device at a share of its peak. The share was measured on one H200 alone
(28 to 35 %, with a Llama of 1.1 billion weights); 20 to 50 % is the range that is assumed of other cards and models.
DeepSpeed's stages 0 to 3 send when a micro step has been computed: on shaped links nothing overlapped.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.estimate.flops import flops_per_token
from trainer.estimate.shape import Shape

EFFICIENCY = (0.20, 0.35, 0.50)  # of a device's peak: low, likely, high
RECOMPUTED = 4 / 3  # of a step's products with activations computed anew: the forward pass twice
# How much longer a micro step takes than without ZeRO, by its stage: small Llamas on CPUs (0.9 and 5 million weights),
# and on an H200 a Llama of 1.1 billion, of which only stage 2 was measured.
ENGINE_ON_CPU = (1.0, 1.06, 1.2, 1.43)
ENGINE_ON_GPU = (1.0, 1.07, 1.07, 1.15)
ADAM_BYTES = 28  # a number's weight, moments and gradient, read and written by the CPU's optimizer
HOST_BYTES_S = (15e9, 30e9, 60e9)  # of a desktop's memory, assumed
PCIE_BYTES_S = (6e9, 12e9, 24e9)  # between a device and its host, or another device: PCIe 3.0 to 5.0 x16, assumed
NVLINK_BYTES_S = (100e9, 200e9, 400e9)  # between devices that have it, each way: a part of the 300 to 900, assumed
NVLINKED = ("B200", "H200", "H100", "A100-SXM", "A800-SXM", "V100-SXM")  # not those on PCIe cards
# Weights a second whose gradients a rank encodes and decodes for other hosts: a core (benchmarks/lan_exchange.py),
# and a card, about a hundred bytes of whose memory each takes, assumed.
ENCODED_ON_CPU = (3e7, 6e7, 1.2e8)
ENCODED_ON_GPU = (3e9, 6e9, 1.5e10)
NVME_BYTES_S = (1e9, 2e9, 5e9)  # of a drive, assumed


CASES = ("low", "likely", "high")


@dataclass(frozen=True)
class Range:
    """A figure that isn't known exactly."""

    low: float
    likely: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def times(self, factor: float) -> Range:
        """Return the figure multiplied."""
        return Range(self.low * factor, self.likely * factor, self.high * factor)


NOTHING = Range(0.0, 0.0, 0.0)


def between_devices(name: str) -> tuple[float, float, float]:
    """Return the bytes a second between devices of this name in one host: slow, likely, fast."""
    linked = any(card in name for card in NVLINKED) and "PCIe" not in name and "NVL" not in name
    return NVLINK_BYTES_S if linked else PCIE_BYTES_S


def over(amount: float, rates: tuple[float, float, float]) -> Range:
    """Return the seconds that an amount takes at a slow, a likely and a fast rate."""
    slow, likely, fast = rates
    return Range(amount / fast, amount / likely, amount / slow)


def work_per_token(shape: Shape, sequence: int, frozen: bool, stage: int, checkpoints: bool, on_gpu: bool) -> float:
    """Return the FLOP that a token costs a device, with what ZeRO's engine and recomputed activations add."""
    engine = (ENGINE_ON_GPU if on_gpu else ENGINE_ON_CPU)[stage]
    return flops_per_token(shape, sequence, frozen) * engine * (RECOMPUTED if checkpoints else 1)


def compute_seconds(flops: float, rate: Range) -> Range:
    """Return the seconds of so many FLOP on a device that makes so many a second."""
    return over(flops, (rate.low, rate.likely, rate.high))


def encoding_seconds(trained: float, lanes: int, on_gpu: bool) -> Range:
    """Return the seconds in which `lanes` ranks of a host encode and decode what crosses between hosts in few bits."""
    return over(trained / lanes, ENCODED_ON_GPU if on_gpu else ENCODED_ON_CPU)


def offload_seconds(trained: float, weights: float, number: int, micro_steps: int, to_nvme: bool) -> Range:
    """Return the seconds an optimizer step spends on what a host holds of its ranks.

    `trained`: numbers of all its ranks' optimizer states together; `weights`: those that are fetched at each micro
    step's forward and backward pass, 0 where they stay on the devices.
    """
    found = over(ADAM_BYTES * trained, HOST_BYTES_S) + over(2 * number * trained, PCIE_BYTES_S)
    found += over(2 * micro_steps * number * weights, PCIE_BYTES_S)
    if to_nvme:  # 12 bytes of states, read and written
        found += over(24 * trained + 2 * micro_steps * number * weights, NVME_BYTES_S)
    return found
