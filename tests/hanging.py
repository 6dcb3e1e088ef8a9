"""A training script of somebody's own that hangs as it is told: at a step, on a rank.

    invoke train --script tests/hanging.py --hostfile hostfile.txt -- --how sleep --rank 3 --step 7
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

FOREVER = 3600


def oversleep() -> None:
    time.sleep(FOREVER)


class Rows(Dataset):
    """Rows of numbers; one of them is never ready."""

    def __init__(self, stuck_at: int | None) -> None:
        self.stuck_at = stuck_at

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, number: int) -> torch.Tensor:
        if number == self.stuck_at:
            read_slowly()
        return torch.full((8,), float(number))


def read_slowly() -> None:
    time.sleep(FOREVER)


def leave_early(value: torch.Tensor) -> None:
    dist.barrier()


def reduce_otherwise(value: torch.Tensor) -> None:
    dist.broadcast(value, 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--how", default="none")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--step", type=int, default=5)
    given = parser.parse_args()
    is_it = int(os.environ["RANK"]) == given.rank
    if given.how == "before" and is_it:
        oversleep()
    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    rows = Rows(given.step if given.how == "worker" and is_it else None)
    batches = iter(DataLoader(rows, batch_size=1, num_workers=1 if given.how == "worker" else 0))
    for step in range(100_000):
        value = next(batches)
        if step == given.step and is_it:
            if given.how == "sleep":
                oversleep()
            elif given.how == "leave":
                leave_early(value)
            elif given.how == "otherwise":
                reduce_otherwise(value)
        dist.all_reduce(value)
        if dist.get_rank() == 0 and step % 100 == 0:
            print(f"reached {step}", flush=True)
        time.sleep(0.01)


if __name__ == "__main__":
    main()
