"""The devices of this machine to train on, when no hostfile names any: all its GPUs, or CPU slots."""

from __future__ import annotations

import glob
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from master.core.paths import WORKER
from master.core.run_cli import UsageError, UserError
from master.core.terminal import say
from master.inventory.gpu_report import GpuReport, ReportError, parse_report
from master.inventory.hostfile import Slots

GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD128")
PCI_CLASSES, DISPLAY_CLASS = "/sys/bus/pci/devices/*/class", "0x03"
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
        if any(Path(path).read_text().startswith(DISPLAY_CLASS) for path in glob.glob(PCI_CLASSES)) \
                and (fault := broken_gpus()):
            say(f"this machine's GPU is not used: {fault}: invoke detect says more")
        return Gpus(0, "CPU")
    asked = subprocess.run([sys.executable, "-P", "-c", COUNT], capture_output=True, text=True)
    count, _, vendor = asked.stdout.strip().partition(" ")
    if count.isdigit() and int(count):
        return Gpus(int(count), vendor)
    if fault := broken_gpus():
        raise BrokenGpus(f"this machine's GPUs can't be used: {fault}: invoke detect says how to fix it; to train on "
                         "CPUs all the same: DS_ACCELERATOR=cpu invoke train ...")
    return Gpus(0, "CPU")


class BrokenGpus(UserError):
    """GPUs that are there, and can't be used."""


def broken_gpus() -> str | None:
    """Return what is wrong with GPUs that are there and unusable, None where there are none, or the user wants none.

    The detector is asked: a device file alone is no GPU.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    report = local_report()
    if report is None or not (report.vendor == "NVIDIA" or any(not gpu.integrated for gpu in report.gpus)):
        return None  # what only draws the screen
    if report.usable:
        return "PyTorch finds none of them (is it a build for CPUs?)"
    return next((problem.message for problem in report.problems if problem.is_fault), None)


def local_report() -> GpuReport | None:
    """Return what the detector says of this machine, None if that makes no sense."""
    found = subprocess.run(["bash", str(WORKER / "detect_gpus.sh"), "--json", "--nonce", "here"], capture_output=True,
                           text=True)
    try:
        return parse_report(found.stdout, "here")
    except ReportError:
        return None


def local_cluster() -> dict[str, Any]:
    """Return what is known of this machine alone, in the form of cluster.json."""
    report = local_report()
    facts = {"ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}
    return {"hosts": [{"name": "localhost", "address": None, "facts": facts,
                       "report": asdict(report) if report else {}}], "pairs": []}


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
