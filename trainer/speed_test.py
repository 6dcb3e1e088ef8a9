"""How fast each slot multiplies matrices, for some seconds: a slow card makes every step of all others slow.

    python master/launch_training.py --hostfile hostfile.txt --script trainer/speed_test.py
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.distributed.meeting import join
from trainer.distributed.ranks import Ranks

SECONDS = 5.0
MARK = "@@SPEED "


def tflops(device: str) -> float:
    """Return how many 1e12 floating-point operations a second a product of square matrices takes (2 n^3 each)."""
    import torch

    size, kind = (4096, torch.float16) if device != "cpu" else (512, torch.float32)
    one, other = (torch.rand(size, size, device=device, dtype=kind) for _ in range(2))
    products, started = 0, 0.0
    for warming in (True, False):
        products, started = 0, time.monotonic()
        while time.monotonic() - started < (1.0 if warming else SECONDS):
            for _ in range(10):
                made = one @ other
            made[0, 0].item()  # until they are done
            products += 10
    return products * 2 * size**3 / (time.monotonic() - started) / 1e12


def main() -> int:
    """Measure; rank 0 prints all. Return 0, 1 if the ranks don't come together."""
    import torch
    import torch.distributed as dist

    ranks = Ranks()
    device = join(ranks)
    if device is None:
        return 1
    name = "CPU" if device == "cpu" else torch.cuda.get_device_name(ranks.local_rank) if device == "cuda" else device
    mine = {"host": ranks.host, "slot": ranks.local_rank, "device": name, "tflops": round(tflops(device), 4)}
    found: list[dict[str, Any]] = ranks.all_gather_json("speed", mine)
    if ranks.is_first:
        print(MARK + json.dumps(found), flush=True)
    ranks.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
