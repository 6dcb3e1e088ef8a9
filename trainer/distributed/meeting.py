"""The ranks of a test meet and start the process group, as those of a training do."""

from __future__ import annotations

import sys

from trainer.distributed import devices
from trainer.distributed.ranks import Ranks
from trainer.errors import UserError

MEETING_S = 180  # a first start reads gigabytes of libraries, on some hosts from a slow disk


def join(ranks: Ranks) -> str | None:
    """Have the ranks meet and start the process group; return the device type. Say why, and None, if they can't."""
    import torch

    try:
        ranks.rendezvous(MEETING_S)
        facts = ranks.all_gather_json("device", devices.device_facts(ranks.local_rank))
        device = devices.common_device(facts, ranks.hosts)
        if device != "cpu":
            torch.accelerator.set_device_index(ranks.local_rank)
        ranks.start_process_group(device)
    except UserError as fault:
        if ranks.is_first or not fault.shared:
            print(f"error: {fault}", file=sys.stderr, flush=True)
        return None
    return device
