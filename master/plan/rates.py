"""How fast devices compute a model: as measured, as an earlier run was, or by their peaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trainer.estimate.peaks import device_peak
from trainer.estimate.speed import EFFICIENCY, Range

PEAK = "peak"


@dataclass(frozen=True)
class Rate:
    """A device's FLOP/s with a model, and where that is from: "measured", "earlier run", or "peak".

    `correction`: by how much whole runs with it were faster than predicted from that.
    """

    flops: Range
    source: str
    correction: float = 1.0


def peak_rates(names: Iterable[str]) -> dict[str, Rate]:
    """Return the rates of devices by their peaks; those that aren't known are left out."""
    found = {}
    for name in set(names):
        if peak := device_peak(name):
            low, likely, high = (peak * 1e12 * share for share in EFFICIENCY)
            found[name] = Rate(Range(low, likely, high), PEAK)
    return found


def rate_on(rates: Mapping[str, Rate], host: str, device: str) -> Rate | None:
    """Return a device's rate on a host: as it was measured there, else that of all devices of its name."""
    return rates.get(f"{device} on {host}", rates.get(device))


def measured_rate(flops: float, spread: float, source: str) -> Rate:
    """Return a rate that was measured, within so much of it."""
    return Rate(Range(flops * (1 - spread), flops, flops * (1 + spread)), source)
