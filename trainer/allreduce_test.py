"""A sum over all ranks on the real backend, and nothing else: do they come together, and how fast?

    python master/launch_training.py --hostfile hostfile.txt --script trainer/allreduce_test.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.distributed.meeting import join
from trainer.distributed.ranks import Ranks

MEGABYTES = 16  # as many as DeepSpeed's buckets have on a CPU; on a LAN a fraction of a second
ROUNDS = 5


def main() -> int:
    """Add up; rank 0 prints the rate. Return 0, 1 if the ranks don't come together."""
    import torch
    import torch.distributed as dist

    ranks = Ranks()
    device = join(ranks)
    if device is None:
        return 1
    values = torch.ones(MEGABYTES * 1_000_000 // 4, device=device)
    times = []
    for _ in range(ROUNDS):
        ranks.barrier()
        before = time.monotonic()
        dist.all_reduce(values)
        values.sum().item()  # until it is there
        times.append(time.monotonic() - before)
    # Each rank's card moves 2 (n - 1) / n of the data, in a ring (NCCL tests, doc/PERFORMANCE.md: busbw).
    moved = MEGABYTES * 2 * (ranks.world_size - 1) / ranks.world_size
    if ranks.is_first:
        rate = moved / sorted(times)[ROUNDS // 2]
        print(f"{ranks.world_size} ranks joined the all-reduce test on {device}: {rate:.0f} MB/s", flush=True)
    ranks.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
