"""The DeepSpeed configs that come with lanspeed, by what they do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PRESETS = {
    (0, ""): "trainer/configs/zero0.json", (1, ""): "trainer/configs/zero1.json", (2, ""): "trainer/configs/zero2.json",
    (1, "optimizer"): "trainer/configs/zero1_offload.json",
    (2, "optimizer"): "trainer/configs/zero2_offload.json", (3, ""): "trainer/configs/zero3.json",
    (3, "all"): "trainer/configs/zero3_offload.json"}
ON_CPU = "trainer/configs/cpu.json"


def way_of(path: Path) -> tuple[int, str]:
    """Return ZeRO's stage and what is offloaded ("", "optimizer", "all", "nvme") by a config; (0, "") if unreadable."""
    try:
        zero = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization")
    except (OSError, ValueError, AttributeError, RecursionError):
        return 0, ""
    if not isinstance(zero, dict):
        return (int(zero), "") if isinstance(zero, bool) else (0, "")
    stage = zero.get("stage")
    optimizer, weights = device(zero, "offload_optimizer"), device(zero, "offload_param")
    offload = "nvme" if "nvme" in (optimizer, weights) else "all" if weights else "optimizer" if optimizer else ""
    return stage if stage in (1, 2, 3) else 0, offload


def batch_of(path: Path) -> tuple[int | None, int | None, int | None]:
    """Return micro batch, accumulation and global batch where a config has numbers for them."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = [config.get(name) for name in names]
    except (OSError, ValueError, AttributeError, RecursionError):
        return None, None, None
    micro, accumulation, whole = (each if type(each) is int and each > 0 else None for each in found)
    return micro, accumulation, whole


def device(zero: Mapping[str, Any], section: str) -> str | None:
    """Return where a section offloads to, None for nowhere."""
    found = zero.get(section)
    name = found.get("device") if isinstance(found, dict) else None
    return name if name in ("cpu", "nvme") else None
