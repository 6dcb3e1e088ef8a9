"""What this rank computes on: CUDA or ROCm GPU, Intel GPU or CPU; which precision is fast; the device's peak.

Peaks are dense bf16/fp16 tensor-core TFLOP/s with fp32 accumulation, from the vendors' data sheets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trainer.errors import UserError

# Longest name first where one contains another: the first that occurs in the device's name counts.
PEAK_TFLOPS = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0, "A800": 312.0,
    "L40S": 362.0, "L40": 181.0, "L4": 121.0, "A40": 149.7, "A30": 165.0, "A10G": 70.0, "A10": 125.0,
    "RTX A6000": 154.8, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 4070 Ti": 80.2,
    "RTX 3090 Ti": 80.0, "RTX 3090": 71.0, "RTX 3080": 59.5, "V100": 125.0, "T4": 65.0,
    "MI300X": 1307.4, "MI250X": 383.0, "MI210": 181.0,
}


def device_facts() -> dict[str, Any]:
    """Return this rank's device as JSON: type (cuda, xpu, cpu), name, count, whether bf16 and fp16 are fast."""
    import torch

    if torch.cuda.is_available():
        major, _ = torch.cuda.get_device_capability()
        fast_bf16 = bool(torch.version.hip) or major >= 8  # before Ampere bf16 is emulated
        name = torch.cuda.get_device_name()
        return {"type": "cuda", "name": name, "count": torch.cuda.device_count(), "bf16": fast_bf16, "fp16": True}
    if torch.xpu.is_available():
        count = torch.xpu.device_count()
        return {"type": "xpu", "name": torch.xpu.get_device_name(), "count": count, "bf16": True, "fp16": True}
    return {"type": "cpu", "name": "CPU", "count": 0, "bf16": False, "fp16": False}


def common_device(facts: list[dict[str, Any]], hosts: Sequence[str]) -> str:
    """Return the device type that all ranks share; raise a UserError that names the hosts where they differ."""
    kinds = {entry["type"] for entry in facts}
    if len(kinds) == 1:
        return kinds.pop()
    places = {kind: sorted({h for h, entry in zip(hosts, facts, strict=True) if entry["type"] == kind})
              for kind in sorted(kinds)}
    found = "; ".join(f"{kind} on {', '.join(names)}" for kind, names in places.items())
    raise UserError(f"the ranks have different devices: {found}. Is a GPU driver broken there? Try: nvidia-smi")


def choose_precision(wanted: str, facts: list[dict[str, Any]]) -> str:
    """Return bf16, fp16 or fp32: what was wanted, or for 'auto' the best that is fast on every rank's device.

    Raises UserError for fp16 on a CPU, which DeepSpeed and torch refuse there.
    """
    if wanted == "fp16" and not all(entry["fp16"] for entry in facts):
        raise UserError("fp16 needs a GPU on every rank: leave --precision at auto, or take bf16 or fp32", shared=True)
    if wanted != "auto":
        return wanted
    return next((kind for kind in ("bf16", "fp16") if all(entry[kind] for entry in facts)), "fp32")


def peak_flops(facts: list[dict[str, Any]], precision: str) -> float | None:
    """Return all ranks' peak FLOP/s together, or None where one is unknown or the precision isn't 16 bits."""
    if precision == "fp32":
        return None
    peaks = [device_peak(entry["name"]) for entry in facts]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) * 1e12 if len(known) == len(peaks) else None


def device_peak(name: str) -> float | None:
    """Return the TFLOP/s of a device by its name; a variant that isn't in the table (Laptop, Ti, ...) is unknown."""
    for key, peak in PEAK_TFLOPS.items():
        if re.search(rf"\b{key}(?! (Ti|SUPER|D|Laptop|Max-Q)\b)(?![A-Za-z0-9])", name):
            return peak
    return None
