"""Sums and DeepSpeed engines of several hosts, played by the ranks of one launcher. A program for tests.

    torchrun --nproc-per-node 3 tests/trainer/exchange_between_hosts.py sums 0,0,1       each rank's host
    torchrun --nproc-per-node 2 tests/trainer/exchange_between_hosts.py engines 0,1      a JSON line for each case
"""

from __future__ import annotations

import json
import logging
import os
import sys
from types import SimpleNamespace
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from trainer.exchange.all_reduce import CompressedSum
from trainer.exchange.gradient_exchange import GradientExchange
from trainer.exchange.host_engine import engine_of_host
from trainer.exchange.hosts import Hosts, join_hosts
from trainer.exchange.start_weights import agree
from trainer.exchange.weight_average import WeightAverage

ROUNDS, MICRO_STEPS, STEPS, HIDDEN, MOST = 5, 2, 4, 48, 0.05
COUNTS = ((1, 1 << 22), (1000, 1 << 22), (100_000, 1 << 15))  # numbers, and those of a bucket


def ranks_here() -> Any:
    """Return what tells all ranks something, as the trainer's Ranks do."""
    def all_gather_json(_: str, value: Any) -> list[Any]:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
        return found

    return SimpleNamespace(_side_group=None, all_gather_json=all_gather_json)


def same_everywhere(tensor: torch.Tensor) -> bool:
    """Return whether all ranks have the same numbers to the last bit."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return all(torch.equal(each, tensor) for each in found)


def tell(**facts: Any) -> None:
    """Print what rank 0 has found."""
    if dist.get_rank() == 0:
        print("@@ " + json.dumps(facts), flush=True)


def sum_case(hosts: Hosts, bits: int, count: int, bucket: int) -> None:
    """Sum random numbers in some rounds; tell what the sums and what was left out lack of the truth."""
    made = CompressedSum(count, bits, hosts, torch.device("cpu"), bucket)
    truth, decoded, same = torch.zeros(count), torch.zeros(count), True
    first_error = norm = norm_error = 0.0
    for number in range(ROUNDS):
        own = [torch.randn(count, generator=torch.Generator().manual_seed(97 * number + host)) * 1e-7
               for host in range(hosts.count)]
        whole = torch.nn.functional.pad(own[hosts.number], (0, sum(made.sizes) - count))
        codes, norm = made.reduce(iter(whole.split(made.bucket)))
        found = torch.cat(list(made.gather(codes)))[:count]
        total = torch.stack(own).sum(0)
        truth, decoded = truth + total, decoded + found
        same = same and same_everywhere(found) and same_everywhere(torch.tensor(norm))
        norm_error = max(norm_error, abs(norm / found.double().norm().item() - 1))
        first_error = first_error or ((found - total).norm() / total.norm()).item()
    left = made.left_out(torch.arange(count))
    dist.all_reduce(left)
    lost = ((truth - decoded - left).abs().max() / truth.abs().max()).item()
    sent = torch.tensor(float(made.sent if hosts.lane is not None else 0))
    dist.all_reduce(sent)
    tell(case="sum", bits=bits, count=count, hosts=hosts.count, same=same, lost=lost, first_error=first_error,
         norm_error=norm_error, sent=sent.item() / hosts.count / ROUNDS, padded=sum(made.sizes))


def odd_case(hosts: Hosts) -> None:
    """Sum what isn't a number on the last host; start with other weights there."""
    made = CompressedSum(1000, 4, hosts, torch.device("cpu"))
    own = torch.ones(made.bucket)
    if hosts.number == hosts.count - 1:
        own[7] = float("nan")
    codes, norm = made.reduce(iter([own]))
    found = torch.cat(list(made.gather(codes)))
    lost = [None] * dist.get_world_size()
    dist.all_gather_object(lost, [norm != norm, int(found.isnan().sum())])
    model = torch.nn.Linear(3, 3).to(torch.bfloat16)
    torch.nn.init.constant_(model.weight, hosts.number)
    torch.nn.init.constant_(model.bias, 0.5)
    agreed = [agree(model, ranks_here()) for _ in range(2)]
    tell(case="odd", lost=lost, agreed=agreed, same=same_everywhere(model.weight.detach()),
         weight=model.weight.sum().item())


def engine_case(hosts: Hosts, stage: int, dtype: torch.dtype, offloads: bool, period: int) -> None:
    """Train a little; tell whether weights stay the same, and how far the gradients are from those of all ranks.

    `period`: steps between averages of the weights, 0: their gradients cross.
    """
    torch.manual_seed(0)
    world = dist.get_world_size()
    model = torch.nn.Sequential(*[torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(3)], torch.nn.Linear(HIDDEN, 7))
    model = model.to(dtype)
    zero: dict[str, Any] = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offloads else {})}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": MICRO_STEPS,
              "train_batch_size": MICRO_STEPS * world, "gradient_clipping": MOST, "zero_force_ds_cpu_optimizer": False,
              "zero_allow_untested_optimizer": True, "bf16": {"enabled": dtype is torch.bfloat16},
              "zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
                                      config_params=config, dist_init_required=False)
    sums = [torch.zeros(weight.shape, dtype=torch.float64) for weight in model.parameters()]
    for weight, own in zip(model.parameters(), sums, strict=True):
        weight.register_hook(lambda gradient, own=own: (own.add_(gradient.double()), None)[1])
    errors: list[float] = []
    norms: list[float] = []
    crossing: Any = WeightAverage(engine, hosts, 4, period) if period else GradientExchange(engine, hosts, 8, MOST)

    def compare() -> None:
        truth = torch.cat([own.flatten() for own in sums]) / world
        dist.all_reduce(truth)
        given = torch.cat([safe_get_full_grad(weight).double().flatten() for weight in model.parameters()])
        errors.append(((given / crossing.factor - truth).norm() / truth.norm()).item())
        norms.append(given.norm().item())
        for own in sums:
            own.zero_()

    if isinstance(crossing, GradientExchange):
        crossing.after = compare
    random = torch.Generator().manual_seed(dist.get_rank())
    same = []
    for _ in range(STEPS):
        for micro in range(MICRO_STEPS):
            engine.set_gradient_accumulation_boundary(micro == MICRO_STEPS - 1)
            engine.backward(engine(torch.randn(1, HIDDEN, generator=random).to(dtype)).float().pow(2).mean())
        engine.step()
        same.append(same_everywhere(torch.cat([weight.detach().flatten() for weight in model.parameters()])))
    tell(case="engine", stage=stage, bytes=dtype.itemsize, offloads=offloads, period=period, same=same, errors=errors,
         norms=norms, told=float(engine.get_global_grad_norm() or 0) if not period else None)
    engine.destroy()


def main() -> None:
    """Do the cases of one kind."""
    logging.disable(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    hosts = join_hosts([int(word) for word in sys.argv[2].split(",")], dist.get_rank())
    if sys.argv[1] == "odd":
        odd_case(hosts)
    if sys.argv[1] == "sums":
        for bits in (8, 4, 3):
            for count, bucket in COUNTS:
                sum_case(hosts, bits, count, bucket)
    for stage, offloads in ((0, False), (1, False), (2, False), (2, True)) if sys.argv[1] == "engines" else ():
        for dtype in (torch.float32, torch.bfloat16):
            for period in (0, 2):
                with engine_of_host(hosts, clips=bool(period)):
                    engine_case(hosts, stage, dtype, offloads, period)


if __name__ == "__main__":
    main()
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the libraries' threads sometimes abort a process that ends on its own
