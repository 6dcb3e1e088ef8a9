"""What DeepSpeed's engines hold: all tensors of a rank after a backward pass and a step, counted. A program for tests.

    torchrun --nproc-per-node 2 tests/trainer/engine_states.py      one JSON line for each engine
"""

from __future__ import annotations

import gc
import json
import logging
import time
from typing import Any

import deepspeed
import deepspeed.ops
import torch

HIDDEN, LAYERS, MICRO_STEPS = 256, 4, 2
SETTLING = 0.3  # seconds until gloo's threads have let go of what they sent last
SMALL: dict[str, Any] = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
# Nothing gathered is kept, so that what remains is a rank's own.
BARE: dict[str, Any] = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0,
                        "stage3_max_live_parameters": 0}


def held() -> int:
    """Return the bytes of all tensors' storages of this process."""
    gc.collect()
    seen: dict[int, int] = {}
    for found in gc.get_objects():
        if type(found) is torch.Tensor or type(found) is torch.nn.Parameter:
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None and not tensor.is_meta:
                    seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())


def bytes_held(stage: int, dtype: torch.dtype, offloads: bool) -> tuple[int, int]:
    """Return the bytes that an engine holds, and how many weights it trains."""
    before = held()
    torch.manual_seed(0)
    pairs = [(HIDDEN, 4 * HIDDEN), (4 * HIDDEN, HIDDEN)] * LAYERS
    model = torch.nn.Sequential(*[torch.nn.Linear(*pair, bias=False) for pair in pairs]).to(dtype)
    weights = sum(weight.numel() for weight in model.parameters())
    zero = {"stage": stage, **(BARE if stage == 3 else {}), **SMALL}
    if offloads:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": MICRO_STEPS,
              "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
              "bf16": {"enabled": dtype is torch.bfloat16}, "zero_optimization": zero}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    found = 0
    for number in range(2 * MICRO_STEPS):
        engine.backward(engine(torch.ones(1, HIDDEN, dtype=dtype)).float().pow(2).mean())
        if number == 2 * MICRO_STEPS - 1:
            for group in (None, getattr(engine.optimizer, "dp_process_group", None)):  # whose threads take the next
                torch.distributed.all_reduce(torch.zeros(1), group=group)
            time.sleep(SETTLING)
            found = held() - before
        engine.step()
    engine.destroy()
    return found, weights


def main() -> None:
    """Print what each engine holds on rank 0."""
    logging.disable(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    for stage in range(4):
        for dtype in (torch.bfloat16, torch.float32):
            for offloads in (False, True) if stage else (False,):
                found, weights = bytes_held(stage, dtype, offloads)
                if torch.distributed.get_rank() == 0:
                    print("@@ " + json.dumps([stage, dtype.itemsize, offloads, found, weights]), flush=True)


if __name__ == "__main__":
    main()
