"""What leaves a host in an optimizer step of each ZeRO stage, by its network card's own counter. A program for tests.

    python master/launch_training.py --hostfile H --script tests/lab/wire_bytes.py -- 4      micro steps of accumulation

Rank 0 prints a JSON line for each stage: its bytes a step and those of the host that sent most.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

HIDDEN, LAYERS, STEPS = 512, 2, 4


def sent() -> int:
    """Return the bytes that this host's network card has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "eth0":
            return int(counts.split()[8])
    return 0


def bytes_a_step(stage: int, dtype: torch.dtype, micro_steps: int) -> tuple[float, int]:
    """Return the bytes that this rank's host sends in a step, and the weights that are trained."""
    torch.manual_seed(0)
    pairs = [(HIDDEN, 4 * HIDDEN), (4 * HIDDEN, HIDDEN)] * LAYERS
    model = torch.nn.Sequential(*[torch.nn.Linear(*pair, bias=False) for pair in pairs]).to(dtype)
    weights = sum(weight.numel() for weight in model.parameters())
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else
                               {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000})}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": micro_steps,
              "zero_allow_untested_optimizer": True, "bf16": {"enabled": dtype is torch.bfloat16},
              "zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config,
                                      dist_init_required=False)
    before = 0
    for step in range(1 + STEPS):
        if step == 1:  # the first one makes connections and buffers
            dist.barrier()
            before = sent()
        for _ in range(micro_steps):
            engine.backward(engine(torch.ones(1, HIDDEN, dtype=dtype)).float().pow(2).mean())
            engine.step()
    dist.barrier()
    found = (sent() - before) / STEPS
    engine.destroy()
    return found, weights


def main() -> None:
    """Print what each stage sends, from rank 0."""
    logging.disable(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    micro_steps = int(sys.argv[-1])
    for stage in range(4):
        for dtype in (torch.float32, torch.bfloat16):
            found, weights = bytes_a_step(stage, dtype, micro_steps)
            most = torch.tensor(found)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            if dist.get_rank() == 0:
                print("@@ " + json.dumps([stage, dtype.itemsize, weights, found, most.item()]), flush=True)


if __name__ == "__main__":
    main()
