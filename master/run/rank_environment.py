"""The environment variables that all ranks of a training get: settings of the libraries, and what the user names."""

from __future__ import annotations

import os
from collections.abc import Sequence

from master.core.run_cli import UsageError

# What the hosts get of this shell's environment: settings of the libraries, never all of it.
SENT = ("NCCL_", "TORCH_NCCL_", "TORCH_FR_", "GLOO_", "DS_", "DEEPSPEED_")
SENT_NAMES = ("HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL")
ACCELERATORS = {"CPU": "cpu", "NVIDIA": "cuda", "AMD": "cuda", "INTEL": "xpu"}


def environment(vendor: str, wanted: Sequence[str]) -> dict[str, str]:
    """Return the variables for all ranks; `wanted` are --env's K=V, or K for this shell's. Raises UsageError."""
    found = {name: value for name, value in os.environ.items() if name.startswith(SENT) or name in SENT_NAMES}
    found["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    found.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of each peer that no name server knows
    if vendor in ACCELERATORS:  # so that a host with a broken driver fails instead of training on its CPU
        found["DS_ACCELERATOR"] = ACCELERATORS[vendor]
    for word in wanted:
        name, equals, value = word.partition("=")
        if not name.isidentifier() or (not equals and name not in os.environ):
            raise UsageError(f"--env {word}: NAME=VALUE, or the NAME of a variable that is set here")
        found[name] = value if equals else os.environ[name]
    return found
