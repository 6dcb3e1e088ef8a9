"""Going on with another number of ranks: DeepSpeed's universal checkpoint, made of all ranks' parts.

DeepSpeed splits optimizer states by rank and refuses them to another number of ranks; in its universal form they lie by
parameter. The global batch stays the same, and with it the steps, the learning rate and the order of the data.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.checkpoint import verification
from trainer.distributed import heartbeat
from trainer.errors import UserError
from trainer.options import Options

SUFFIX = "_universal"
LATEST = "latest_universal"  # by which DeepSpeed finds it
OPTIMIZERS = (None, "adamw_torch", "adamw_torch_fused")  # whose states that form knows
COPIES = 3  # of the states that the conversion writes before it is done: fragments, whole parameters, a reserve


def keep_global_batch(options: Options, rows: int, world_size: int) -> Options:
    """Return options whose micro batch and accumulation give `rows` a step, the micro batch no larger than asked for.

    Where so many ranks can't share them, --flexible_batch takes the nearest number that they can; without it that
    raises UserError.
    """
    if options.batch_per_rank * world_size == rows:
        return options
    each, rest = divmod(rows, world_size)
    if rest and options.flexible_batch:
        each = max(1, round(rows / world_size))
    elif rest:
        fitting = [str(count) for count in range(1, rows + 1) if rows % count == 0][:8]
        raise UserError(f"a step has {rows} sequences in this run, which {world_size} ranks can't share evenly: "
                        f"resume with {', '.join(fitting)} ranks", shared=True)
    micro = next(size for size in range(min(options.per_device_train_batch_size, each), 0, -1) if each % size == 0)
    return replace(options, per_device_train_batch_size=micro, gradient_accumulation_steps=each // micro)


def free_batch(config: dict[str, Any]) -> None:
    """Let the Trainer fill in a DeepSpeed config's batch sizes anew."""
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if key in config:
            config[key] = "auto"


def optimizer_shards(folder: Path) -> set[int]:
    """Return the ranks whose optimizer states are in a checkpoint's folder; none for states that every rank has."""
    found = set()
    for path in folder.glob("global_step*/*zero_pp_rank_*_optim_states.pt"):
        found.add(int(path.name.partition("zero_pp_rank_")[2].partition("_")[0]))
    return found


def missing_shards(folder: Path, world_size: int) -> str | None:
    """Return what lacks of a checkpoint that `world_size` ranks have written, None for nothing."""
    there = optimizer_shards(folder)
    lacking = sorted(set(range(world_size)) - there) if there else []
    if not lacking:
        return None
    return (f"{folder} is missing the optimizer shards of rank {', '.join(map(str, lacking))}, which are on other "
            "hosts: invoke train --resume RUN --hostfile H brings them")


def convert(folder: Path) -> None:
    """Make the universal form in a checkpoint's folder. Raises UserError where it fails or the disk is too small."""
    source = folder / f"global_step{verification.step_of(folder)}"
    target = source.with_name(source.name + SUFFIX)
    shutil.rmtree(target, ignore_errors=True)
    needed, free = COPIES * verification.folder_bytes(source), verification.free_bytes(folder)
    if free < needed:
        raise UserError(f"{folder}: {needed / 1e9:.1f} GB are needed to make it fit another number of ranks, and "
                        f"{free / 1e9:.1f} GB are free")
    heartbeat.report(f"converting {folder.name} for another number of ranks")
    command = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(source),
               "--output_folder", str(target), "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (folder / LATEST).exists():
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no reason given"]
        raise UserError(f"{folder} can't be converted for another number of ranks: {said[-1]}")


def separate_step_counts(engine: Any) -> None:
    """Give each parameter a step count of its own: at stage 3 DeepSpeed 0.19.8 loads one tensor for all of them, and
    torch's fused Adam counts it up once for each."""
    for state in engine.optimizer.optimizer.state.values():
        if hasattr(state.get("step"), "clone"):
            state["step"] = state["step"].clone()


def remove_universal(folder: Path) -> None:
    """Delete what `convert` made: it is as large as the checkpoint."""
    for path in folder.glob(f"global_step*{SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)
    (folder / LATEST).unlink(missing_ok=True)
