"""The devices of this machine to train on, when no hostfile names any: all its GPUs, or CPU slots."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from master.core.run_cli import UsageError
from master.inventory.hostfile import Slots

GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD128")
COUNT = """
import torch
kind = torch.accelerator.current_accelerator()
vendor = "INTEL" if kind and kind.type == "xpu" else "AMD" if torch.version.hip else "NVIDIA"
print(torch.accelerator.device_count(), vendor)
"""


@dataclass(frozen=True)
class Gpus:
    """How many GPUs PyTorch can use here, and their vendor."""

    count: int
    vendor: str


def count_gpus() -> Gpus:
    """Return the GPUs that PyTorch can use; it is asked, in a process of its own, only if a driver is there."""
    if not any(os.path.exists(path) for path in GPU_DEVICE_FILES):
        return Gpus(0, "CPU")
    asked = subprocess.run([sys.executable, "-P", "-c", COUNT], capture_output=True, text=True)
    count, _, vendor = asked.stdout.strip().partition(" ")
    return Gpus(int(count), vendor) if count.isdigit() and int(count) else Gpus(0, "CPU")


def choose_slots(wanted: int | None, gpus: Gpus, environment: Mapping[str, str]) -> Slots:
    """Return this machine's line of a hostfile: the devices that CUDA_VISIBLE_DEVICES names, or the first `wanted`.

    Raises UsageError if there are fewer.
    """
    if not gpus.count:
        count = wanted or 1
        return Slots("localhost", count, tuple(range(count)), "CPU")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible and not all(word.strip().isdigit() for word in visible.split(",")):
        raise UsageError(f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's launcher takes numbers only, like 0,1")
    devices = [int(word) for word in visible.split(",")] if visible else list(range(gpus.count))
    if wanted and wanted > len(devices):
        raise UsageError(f"--slots {wanted}: this machine has {len(devices)} usable GPUs")
    use = tuple(sorted(devices[:wanted]))
    return Slots("localhost", max(use) + 1, use, gpus.vendor)
