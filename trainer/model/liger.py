"""Liger's kernels (the package liger-kernel): norms, rotary positions, gated layers and the head's loss fused on a GPU.

They change a model's modules in place. Where a model isn't covered, or they don't run, `problem` says why.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from trainer.errors import first_line, is_out_of_memory


def problem(model: Any, device: torch.device) -> str | None:
    """Return why the kernels can't be used for a model on a device, None if they can."""
    if device.type not in ("cuda", "xpu"):
        return "Liger's kernels need a GPU"
    if find_spec("liger_kernel") is None:
        return "liger-kernel isn't installed (pip install liger-kernel)"
    try:
        from liger_kernel.transformers import LigerRMSNorm
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            return f"Liger has no kernels for {model.config.model_type}"
        norm = LigerRMSNorm(64).to(device)
        norm(torch.ones(2, 64, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # Triton needs a compiler, and fails in many ways
        if is_out_of_memory(error):
            raise
        return f"Liger's kernels don't run here ({first_line(error)})"
    return None


def apply(model: Any) -> None:
    """Put the kernels into a model, but for the loss: that one is the head's (head_loss.py)."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)
