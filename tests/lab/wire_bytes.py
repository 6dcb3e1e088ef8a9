"""What leaves a host in an optimizer step of each way to train, by its network card's own counter. A program for tests.

    python master/launch_training.py --hostfile H --script tests/lab/wire_bytes.py -- 4      micro steps of accumulation

Rank 0 prints a JSON line for each way to train: its bytes a step and those of the host that sent most.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

from trainer.distributed.sent_bytes import COUNTERS, sent_by
from trainer.exchange.coalescing import Coalescing
from trainer.exchange.gradient_exchange import GradientExchange
from trainer.exchange.host_engine import engine_of_host
from trainer.exchange.hosts import Hosts, join_hosts
from trainer.exchange.weight_average import WeightAverage

HIDDEN, LAYERS, STEPS = 512, 2, 4


def sent() -> int:
    """Return the bytes that this host's network card has sent."""
    return sent_by("eth0", COUNTERS.read_text()) or 0


def ways(hosts: Hosts) -> Iterator[dict[str, Any]]:
    """Yield what differs in each way to train."""
    for stage in range(4):
        for number in (4, 2):
            yield {"stage": stage, "number": number}
    yield {"stage": 2, "number": 2, "coalesced": True}
    for bits in (8, 4, 3):
        yield {"stage": 1, "number": 2, "bits": bits, "hosts": hosts.count}
    yield {"stage": 0, "number": 2, "bits": 4, "hosts": hosts.count, "period": 2}
    if hosts.count > 2:
        yield {"stage": 1, "number": 2, "by_owner": True}
        yield {"stage": 2, "number": 2, "by_owner": True}


def bytes_a_step(way: dict[str, Any], micro_steps: int, hosts: Hosts) -> tuple[float, int]:
    """Return the bytes that this rank's host sends in a step, and the weights that are trained."""
    torch.manual_seed(0)
    dtype, stage = torch.bfloat16 if way["number"] == 2 else torch.float32, way["stage"]
    pairs = [(HIDDEN, 4 * HIDDEN), (4 * HIDDEN, HIDDEN)] * LAYERS
    model = torch.nn.Sequential(*[torch.nn.Linear(*pair, bias=False) for pair in pairs]).to(dtype)
    weights = sum(weight.numel() for weight in model.parameters())
    zero = {"stage": stage, "use_multi_rank_bucket_allreduce": "by_owner" not in way,
            **({"stage3_param_persistence_threshold": 0} if stage == 3 else
               {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000})}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": micro_steps,
              "zero_allow_untested_optimizer": True, "bf16": {"enabled": dtype is torch.bfloat16},
              "zero_optimization": zero}
    with engine_of_host(hosts, clips=False) if "bits" in way else contextlib.nullcontext():
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()),
                                          config_params=config, dist_init_required=False)
        if "period" in way:
            WeightAverage(engine, hosts, way["bits"], way["period"])
        elif "bits" in way:
            GradientExchange(engine, hosts, way["bits"], 1.0)
        coalescing = Coalescing(engine) if "coalesced" in way else None
        before = 0
        for step in range(2 + STEPS):
            if step == 2:  # the first ones make connections and buffers
                dist.barrier()
                before = sent()
            for micro in range(micro_steps):
                if coalescing:
                    coalescing.begin()
                engine.set_gradient_accumulation_boundary(micro == micro_steps - 1)
                engine.backward(engine(torch.ones(1, HIDDEN, dtype=dtype)).float().pow(2).mean())
            engine.step()
        dist.barrier()
    found = (sent() - before) / STEPS
    engine.destroy()
    return found, weights


def main() -> None:
    """Print what each way sends, from rank 0."""
    logging.disable(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    nodes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, int(os.environ["CROSS_RANK"]))
    hosts = join_hosts(nodes, dist.get_rank())
    for way in ways(hosts):
        found, weights = bytes_a_step(way, int(sys.argv[-1]), hosts)
        most = torch.tensor(found)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            print("@@ " + json.dumps([way, weights, found, most.item()]), flush=True)


if __name__ == "__main__":
    main()
