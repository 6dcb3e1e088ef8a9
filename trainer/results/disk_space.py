"""Whether the disk holds what a training will write."""

from __future__ import annotations

from trainer.checkpoint import verification
from trainer.errors import UserError
from trainer.estimate.memory import sized
from trainer.results.setup import Setup, Workload

MOMENT_BYTES = 8  # of Adam, of each weight


def check_disk_space(setup: Setup, workload: Workload, weight: int) -> None:
    """Raise a UserError if a machine lacks the disk space for the checkpoints that will be there at once.

    `weight`: bytes of a saved weight.
    """
    options, ranks, path = setup.options, setup.ranks, setup.run.path
    if options.measure:  # it keeps nothing
        return
    interval = options.save_steps or workload.steps
    saves = workload.steps / (interval if interval >= 1 else max(interval * workload.steps, 1))
    together = min(options.save_total_limit + 1, int(saves) + 1)
    parts = min(ranks.local_world_size * (1 + options.checkpoint_copies), ranks.world_size)
    if setup.hosts:  # each of which has an engine's states
        parts = ranks.world_size
    one = verification.expected_bytes(workload.trained, weight, parts, ranks.world_size)
    model = float(weight * workload.parameters)
    if workload.layers and not options.lora:  # each host has its own stages' part, at the end the first one all
        one = int(workload.trained * (weight + MOMENT_BYTES) * parts / ranks.world_size)
        model = model if ranks.is_first else 0.0
    needed, free = together * one + model, verification.free_bytes(path)
    fewer = "--save_total_limit 1, " if options.save_total_limit > 1 and together > 2 else ""
    what = f"{together} checkpoint{'s' * (together > 1)} and the model"
    short = (f"{ranks.host}: {path} needs about {sized(needed)} for {what}, and {sized(free)} are free: "
             f"{fewer}another --output_dir, or free some space")
    found = [text for text in ranks.all_gather_json("room", short if free < needed else None) if text]
    if found:
        raise UserError(found[0], shared=True)
