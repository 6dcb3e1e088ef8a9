"""Which Adam for states that live on the CPU: torch's fused one against DeepSpeed's, and torch's plain one.

    python benchmarks/offload_adam.py      # DeepSpeed's is compiled first: a minute or two, and needs g++
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

PARAMETERS = 20_000_000
ROUNDS = 9


def step_time(make: Callable[[list[Any]], Any]) -> Callable[[], float]:
    """Return a function that makes one optimizer step over PARAMETERS and returns its seconds."""
    import torch

    weights = torch.nn.Parameter(torch.randn(PARAMETERS))
    weights.grad = torch.randn(PARAMETERS)
    optimizer = make([weights])

    def step() -> float:
        started = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - started

    step()
    return step


def main() -> int:
    """Print the time a step of each, and its ratio to DeepSpeed's, taken round by round."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    steps = {"DeepSpeedCPUAdam": step_time(lambda weights: DeepSpeedCPUAdam(weights, lr=1e-4)),
             "torch AdamW, fused": step_time(lambda weights: torch.optim.AdamW(weights, lr=1e-4, fused=True)),
             "torch AdamW, plain": step_time(lambda weights: torch.optim.AdamW(weights, lr=1e-4, foreach=False))}
    rounds = [{name: step() for name, step in steps.items()} for _ in range(ROUNDS)]
    print(f"{'optimizer':20} {'ms a million':>14} {'of DeepSpeed':>14}   ({torch.get_num_threads()} threads)")
    for name in steps:
        milliseconds = statistics.median(each[name] for each in rounds) * 1e3 / (PARAMETERS / 1e6)
        ratio = statistics.median(each[name] / each["DeepSpeedCPUAdam"] for each in rounds)
        print(f"{name:20} {milliseconds:14.2f} {ratio:13.2f}x")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
