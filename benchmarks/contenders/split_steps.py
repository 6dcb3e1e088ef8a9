"""Steps of a pipeline whose stages compute by sleeping, by two schedules. Run by split_layers.py.

    python master/launch_training.py --hostfile H --script benchmarks/contenders/split_steps.py -- 524288 0.12 16 3
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from trainer.split.schedule import EarlyReceives


class Sleep(torch.autograd.Function):
    """Takes time, and twice of it backward; hands on what it is given."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, seconds: float) -> torch.Tensor:
        """Sleep."""
        ctx.seconds = seconds
        time.sleep(seconds)
        return hidden + 0 * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Sleep twice as long."""
        time.sleep(2 * ctx.seconds)
        return gradients[0], torch.zeros(1), None


class Slow(torch.nn.Module):
    """A stage."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight, self.seconds = torch.nn.Parameter(torch.ones(1)), seconds

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Do a micro batch."""
        found: torch.Tensor = Sleep.apply(hidden, self.weight, self.seconds)
        return found


def main() -> None:
    """Print a line for each schedule."""
    size, seconds, count, steps = int(sys.argv[-4]), float(sys.argv[-3]), int(sys.argv[-2]), int(sys.argv[-1])
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = torch.zeros(count, size // 4)
    given: list[Any] = [rows] if rank == 0 else []
    wanted: dict[str, Any] = {"target": rows} if rank == ranks - 1 else {}
    for schedule in (Schedule1F1B, EarlyReceives):
        stage = PipelineStage(Slow(seconds), rank, ranks, torch.device("cpu"))
        made = schedule(stage, count, loss_fn=lambda found, target: (found * (target + 1)).sum(), scale_grads=False)
        taken = []
        for _ in range(steps + 1):  # the first one makes buffers
            dist.barrier()
            started = time.monotonic()
            made.step(*given, **wanted)
            dist.barrier()
            taken.append(time.monotonic() - started)
        if rank == 0:
            print("@@ " + json.dumps({"way": schedule.__name__, "seconds": sorted(taken[1:])[steps // 2]}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
