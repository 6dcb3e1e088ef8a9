"""What this rank computes on: CUDA or ROCm GPU, Intel GPU or CPU; which precision is fast; all devices' peak."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.estimate.peaks import device_peak

AMPERE = 8  # compute capability; before it bf16 is emulated, and there is no flash attention


def device_facts(local_rank: int) -> dict[str, Any]:
    """Return what the rank of this number on its host computes on, as JSON.

    Keys: type, torch's name of the device; backend (cuda, rocm, xpu, cpu); name; count of this host's; memory in bytes;
    bf16 and fp16, whether they are fast; flash, whether the card can run flash attention.
    """
    import torch

    if torch.cuda.is_available():
        rocm, count = bool(torch.version.hip), torch.cuda.device_count()
        if local_rank >= count:
            return {"type": "cuda", "backend": "rocm" if rocm else "cuda", "name": "", "count": count, "memory": 0,
                    "bf16": False, "fp16": False, "flash": False}
        modern = rocm or torch.cuda.get_device_capability(local_rank)[0] >= AMPERE
        return {"type": "cuda", "backend": "rocm" if rocm else "cuda", "name": torch.cuda.get_device_name(local_rank),
                "count": count, "memory": torch.cuda.get_device_properties(local_rank).total_memory, "bf16": modern,
                "fp16": True, "flash": modern}
    if torch.xpu.is_available():
        return {"type": "xpu", "backend": "xpu", "name": torch.xpu.get_device_name(local_rank),
                "count": torch.xpu.device_count(),
                "memory": torch.xpu.get_device_properties(local_rank).total_memory, "bf16": True, "fp16": True,
                "flash": False}
    return {"type": "cpu", "backend": "cpu", "name": "CPU", "count": 0, "memory": host_memory(), "bf16": False,
            "fp16": False, "flash": False}


def host_memory(groups: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int:
    """Return the bytes of memory that this process may use: the machine's, or the limit of its control groups
    (cgroups(7), both versions), as containers and batch systems set it.
    """
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        lines = Path(groups).read_text().splitlines()
    except OSError:
        return found[0]
    for line in lines:
        _, controllers, inside = (*line.split(":", 2), "", "")[:3]
        name, place = ("memory.max", Path(root)) if not controllers else ("memory.limit_in_bytes", Path(root, "memory"))
        if controllers and "memory" not in controllers.split(","):
            continue
        own = place / inside.lstrip("/")
        for folder in (own, *own.parents):  # any of which may set a limit
            with contextlib.suppress(OSError, ValueError):  # "max"
                found.append(int((folder / name).read_text()))
            if folder == place:
                break
    return min(found)


def free_memory(device: str, memory: int) -> int:
    """Return the bytes that other programs, like a screen's, leave of a rank's device; without a GPU its `memory`."""
    import torch

    return memory if device == "cpu" else int(torch.get_device_module(device).mem_get_info()[0])


def common_device(facts: list[dict[str, Any]], hosts: Sequence[str]) -> str:
    """Return the device type that all ranks share; raise a UserError that names the hosts where they differ.

    ROCm's cards are CUDA's to torch, but can't exchange gradients with them: NCCL and RCCL don't meet.
    """
    for host, entry in zip(hosts, facts, strict=True):
        if entry["type"] != "cpu" and not entry["name"]:
            raise UserError(f"{host}: more ranks than its {entry['count']} GPUs: fewer slots, or CUDA_VISIBLE_DEVICES "
                            "hides some", shared=True)
    kinds = {entry["backend"] for entry in facts}
    if len(kinds) == 1:
        return str(facts[0]["type"])
    places = {kind: sorted({h for h, entry in zip(hosts, facts, strict=True) if entry["backend"] == kind})
              for kind in sorted(kinds)}
    found = "; ".join(f"{kind} on {', '.join(names)}" for kind, names in places.items())
    why = "Is a GPU driver broken there? Try: nvidia-smi" if "cpu" in kinds else "Train with those of one kind"
    raise UserError(f"the ranks have different devices: {found}. {why}", shared=True)


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
