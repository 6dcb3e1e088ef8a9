"""Steps of one model whose gradients cross between hosts in each way: seconds and bytes. Run by lan_exchange.py.

    python master/launch_training.py --hostfile H --script benchmarks/contenders/lan_steps.py -- 20 5      layers, steps
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed.sent_bytes import COUNTERS, card_of_ranks, sent_by
from trainer.exchange.gradient_exchange import GradientExchange
from trainer.exchange.host_engine import engine_of_host
from trainer.exchange.hosts import Hosts, join_hosts

WIDTH, TOKENS = 512, 64


def sent() -> int:
    """Return the bytes that this host's network card has sent."""
    return sent_by(card_of_ranks(), COUNTERS.read_text()) or 0


def model_of(layers: int, dtype: torch.dtype) -> torch.nn.Module:
    """Return layers of WIDTH squared weights each."""
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)]).to(dtype)


def engine_of(layers: int, stage: int) -> Any:
    """Return a DeepSpeed engine in bf16."""
    model = model_of(layers, torch.bfloat16)
    zero = {"stage": stage, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True,
              "zero_optimization": zero}
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), fused=True),
                                config_params=config, dist_init_required=False)[0]


@contextlib.contextmanager
def deepspeed_steps(layers: int, hosts: Hosts, stage: int, bits: int | None) -> Iterator[Callable[[], None]]:
    """Yield a step of DeepSpeed: over all hosts (bits None), within each alone (0), or with gradients in few bits."""
    with contextlib.nullcontext() if bits is None else engine_of_host(hosts, clips=False):
        engine = engine_of(layers, stage)
        if bits:
            GradientExchange(engine, hosts, bits, 1.0)

        def step() -> None:
            engine.backward(engine(torch.ones(TOKENS, WIDTH, dtype=torch.bfloat16)).float().pow(2).mean())
            engine.step()

        yield step
        engine.destroy()


@contextlib.contextmanager
def ddp_steps(layers: int, hosts: Hosts) -> Iterator[Callable[[], None]]:
    """Yield a step of torch's DistributedDataParallel, whose gradients cross in bf16."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    model = DistributedDataParallel(model_of(layers, torch.float32))
    model.register_comm_hook(None, bf16_compress_hook)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.ones(TOKENS, WIDTH)).float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    yield step


WAYS: dict[str, Callable[[int, Hosts], contextlib.AbstractContextManager[Callable[[], None]]]] = {
    "no exchange": lambda layers, hosts: deepspeed_steps(layers, hosts, 1, 0),
    "ZeRO-1, bf16": lambda layers, hosts: deepspeed_steps(layers, hosts, 1, None),
    "ZeRO-0, bf16": lambda layers, hosts: deepspeed_steps(layers, hosts, 0, None),
    "--lan_compress 8": lambda layers, hosts: deepspeed_steps(layers, hosts, 1, 8),
    "--lan_compress 4": lambda layers, hosts: deepspeed_steps(layers, hosts, 1, 4),
    "--lan_compress 3": lambda layers, hosts: deepspeed_steps(layers, hosts, 1, 3),
    "DDP, bf16 hook": ddp_steps,
}


def main() -> None:
    """Print a JSON line for each way: seconds and bytes a step, or why it doesn't run."""
    logging.disable(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    layers, steps = int(sys.argv[-2]), int(sys.argv[-1])
    nodes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, int(os.environ["CROSS_RANK"]))
    hosts = join_hosts(nodes, dist.get_rank())
    for name, way in WAYS.items():
        found: dict[str, Any] = {"way": name, "weights": layers * WIDTH * WIDTH}
        try:
            with way(layers, hosts) as step:
                times, before = [], 0
                for number in range(1 + steps):
                    dist.barrier()
                    if number == 1:
                        before = sent()
                    began = time.monotonic()
                    step()
                    times.append(time.monotonic() - began)
                dist.barrier()
                found |= {"seconds": sorted(times[1:])[steps // 2], "bytes": (sent() - before) / steps}
        except (TypeError, RuntimeError) as error:
            found["fault"] = str(error).splitlines()[0][:100]
        if dist.get_rank() == 0:
            print("@@ " + json.dumps(found), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
