"""What `invoke train` takes where no --config is given, and what it warns of where one is: by the plan."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from master.core.paths import ROOT
from master.core.run_cli import UserError
from master.core.terminal import say
from master.inventory.hostfile import Slots
from master.inventory.local_gpus import local_cluster
from master.plan import history, measuring, report
from master.plan.layer_split import MOST_HOSTS, SplitBatch, SplitPlan, best_split, compare_idle, started
from master.plan.machines import Machine, Network, of_cluster
from master.plan.model_shape import shape_of
from master.plan.presets import ON_CPU, PRESETS, batch_of, way_of
from master.plan.rates import Rate, peak_rates
from master.plan.ways import FULL, LORA, QLORA, Estimate, Task, Way, all_estimates, estimate, load_of
from master.run.command_record import has_flag, last_of
from trainer.estimate import batch
from trainer.estimate.batch import default_global_batch, default_sequence
from trainer.estimate.memory import gigabytes
from trainer.flags.dataset_words import name_and_weight

FALLBACK = "trainer/configs/zero1.json"  # for a model whose shape isn't known: its traffic isn't multiplied
MOSTLY = 0.5  # share of a step in the network from which that is worth a warning
BYTES_PER_TOKEN = 4  # of English, about
BUILT_IN_BYTES = 1.9e6  # of Python's documentation, about


@dataclass(frozen=True)
class Default:
    """The config to train with, and what the run will be compared with (None: of unknown shape); `split`: how layers
    are split over the hosts, where DeepSpeed does nothing."""

    config: Path
    model: str = ""
    task: Task | None = None
    found: Estimate | None = None
    split: SplitPlan | None = None


@dataclass(frozen=True)
class Wanted:
    """What the trainer's flags say that decides what a step needs."""

    rank: int | None
    kind: str
    sequence: int | None
    micro: int | None
    accumulation: int | None
    global_batch: int | None
    checkpoints: bool
    bits: int
    averages: bool


def wanted_of(trainer_flags: Sequence[str]) -> Wanted:
    """Return what flags of the trainer say, as far as it can be read; the trainer itself refuses what is wrong."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("sequence_length", "per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=int)
    for name in (LORA, QLORA):
        parser.add_argument(f"--{name}", type=int, nargs="?", const=16)
    parser.add_argument("--adapter")
    parser.add_argument("--lan_compress", "--lan-compress", type=int, nargs="?", const=4, default=0)
    parser.add_argument("--lan_average", "--lan-average", type=int)
    parser.add_argument("--activation_checkpointing", "--activation-checkpointing", "--gradient_checkpointing",
                        action="store_true")
    try:
        said, _ = parser.parse_known_args(list(trainer_flags))
    except (argparse.ArgumentError, SystemExit):
        said, _ = parser.parse_known_args([])
    kind = QLORA if said.qlora else LORA if said.lora or said.adapter else FULL
    rank = said.qlora or said.lora or (16 if said.adapter else None)
    return Wanted(rank, kind, said.sequence_length, said.per_device_train_batch_size,
                  said.gradient_accumulation_steps, said.global_batch_size, said.activation_checkpointing,
                  said.lan_compress or (4 if said.lan_average else 0), said.lan_average is not None)


def rates_for(task: Task, machines: Sequence[Machine], cluster: Mapping[str, Any], model: str) -> dict[str, Rate]:
    """Return devices' rates: as measured, else as in earlier runs, else by their peaks; corrected by earlier runs."""
    earlier = history.outcomes(model)
    rates = peak_rates(device for machine in machines for device in machine.devices)
    rates |= history.rates_of(earlier) | measuring.rates_of(task, measuring.known(cluster, model))
    return history.corrected(rates, earlier)


def sequences_of(datasets: Sequence[str], sequence: int) -> int | None:
    """Return about how many sequences files, folders or the built-in text have, None for a name of the hub."""
    if not datasets:
        return int(BUILT_IN_BYTES / BYTES_PER_TOKEN / sequence)
    paths = [Path(name_and_weight(word)[0]).expanduser() for word in datasets]
    if not all(path.exists() for path in paths):
        return None
    files = [each for path in paths for each in ([path] if path.is_file() else path.rglob("*")) if each.is_file()]
    return int(sum(each.stat().st_size for each in files) / BYTES_PER_TOKEN / sequence)


def choose(config: Path | None, model: str | None, datasets: Sequence[str], trainer_flags: Sequence[str],
           slots: Sequence[Slots], cluster: Mapping[str, Any]) -> Default:
    """Return the config for a training: the one that was given, or the fastest that fits of those that come along.

    Says what it chose and what it foresees. It never fails: a model that isn't here yet, or of a shape that nobody
    knows, gets what sends little.
    """
    on_cpu = slots[0].vendor == "CPU"
    if not on_cpu and not cluster["hosts"] and [host.host for host in slots] == ["localhost"]:
        cluster = local_cluster()
    fallback = Default(config or ROOT / (ON_CPU if on_cpu else FALLBACK))
    if has_flag(trainer_flags, "--split_layers"):
        return replace(fallback, split=choose_split(model, datasets, trainer_flags, slots, cluster))
    wanted = wanted_of(trainer_flags)
    if config:
        micro, accumulation, whole = batch_of(config)
        wanted = replace(wanted, micro=wanted.micro or micro, accumulation=wanted.accumulation or accumulation,
                         global_batch=wanted.global_batch or whole)
    task = task_of(model, datasets, wanted, thorough=not on_cpu)
    if task is None or model is None:
        return fallback
    machines, network = of_cluster(slots, cluster, None)
    rates = rates_for(task, machines, cluster, model)
    if not on_cpu and not all(machine.memory for machine in machines):
        return fallback
    if config or on_cpu:
        if wanted.averages:  # whose traffic the plan doesn't know
            return fallback
        found = fixed(task, wanted, tuple(machines), *way_of(fallback.config), network, rates)
        say_all(warnings(found) if not on_cpu else [])
        return Default(fallback.config, model, task, found)
    found_all = [each for each in all_estimates(task, [tuple(machines)], network, rates)
                 if (each.way.stage, each.way.offload) in PRESETS]
    if wanted.micro or wanted.accumulation or wanted.checkpoints:  # the batch is settled: only stages are to choose
        found_all = sorted((fixed(task, wanted, tuple(machines), stage, offload, network, rates)
                            for stage, offload in {(each.way.stage, each.way.offload) for each in found_all}),
                           key=lambda each: (each.short, each.seconds(), each.way.stage))
    best = found_all[0]
    if wanted.averages:
        return Default(ROOT / PRESETS[best.way.stage, best.way.offload])
    say_all(block(best))
    return Default(ROOT / PRESETS[best.way.stage, best.way.offload], model, task, best)


def task_of(model: str | None, datasets: Sequence[str], wanted: Wanted, thorough: bool) -> Task | None:
    """Return what is to be trained, None for a model whose shape isn't known; `thorough` as `shape_of` has it."""
    try:
        shape = shape_of(model, thorough) if model else None
    except UserError:
        return None
    if shape is None:
        return None
    sequence = wanted.sequence or default_sequence(model == "tiny", shape.positions)
    whole = wanted.global_batch or default_global_batch(sequence, sequences_of(datasets, sequence))
    return Task(shape, sequence, whole, wanted.rank or 16, (wanted.kind,), bits=wanted.bits)


def choose_split(model: str | None, datasets: Sequence[str], trainer_flags: Sequence[str], slots: Sequence[Slots],
                 cluster: Mapping[str, Any]) -> SplitPlan | None:
    """Return how a model's layers are split over these hosts, in their best order; None where that isn't known, or the
    flags say it."""
    wanted = wanted_of(trainer_flags)
    if dict(last_of(trainer_flags)).get("--split_layers"):
        return None
    task = task_of(model, datasets, wanted, thorough=False)
    machines, network = of_cluster(slots, cluster, None)
    if task is None or model is None or not 2 <= len(machines) <= MOST_HOSTS:
        return None
    plan = best_split(task, [tuple(machines)], network, rates_for(task, machines, cluster, model),
                      SplitBatch(wanted.micro or 1, wanted.accumulation, wanted.checkpoints))
    say_all(started(plan) if plan else [])
    return plan


def say_all(lines: Sequence[str]) -> None:
    """Say lines, if there are any."""
    if lines:
        say(*lines)


def fixed(task: Task, wanted: Wanted, machines: tuple[Machine, ...], stage: int, offload: str, network: Network,
          rates: Mapping[str, Rate]) -> Estimate:
    """Return the estimate of one way, with the batch that the flags say or the trainer will choose."""
    ranks = sum(len(machine.devices) for machine in machines)
    load = replace(load_of(task, wanted.kind, ranks, stage, offload, machines), checkpoints=wanted.checkpoints)
    if wanted.micro or wanted.accumulation:
        chosen = batch.Batch(wanted.micro or batch.CPU_MICRO, wanted.accumulation or 1, wanted.checkpoints)
    else:
        chosen = batch.choose_batch(load, task.global_batch, min(machine.memory for machine in machines),
                                    machines[0].on_gpu)
    return estimate(task, Way(wanted.kind, machines, stage, offload, chosen,
                              task.bits if len(machines) > 1 else 0), network, rates)


def block(best: Estimate) -> list[str]:
    """Return what is said before the first step: what was chosen, how fast it is, and why."""
    preset = PRESETS[best.way.stage, best.way.offload]
    speed = f"about {report.rate_words(best)} tokens/s" if best.known else "speed unknown (invoke plan --measure)"
    why = f"; micro batch {best.way.batch.micro}, since {best.way.batch.reason}" if best.way.batch.reason else ""
    return [f"plan: {report.words_of(best)} ({preset}), {speed}{why}", *warnings(best)]


def warnings(found: Estimate) -> list[str]:
    """Return what the plan foresees that is worth stopping for."""
    lines = []
    if not found.fits:
        lines.append(f"the plan says that this doesn't fit: {gigabytes(sum(found.device.values()))} GB on a device, "
                     f"{gigabytes(found.short)} GB too much: invoke plan shows what does")
    share = found.communication.likely / found.seconds() if found.known else 0.0
    if share > MOSTLY and len(found.way.machines) > 1:
        lines.append(f"the plan says that {share:.0%} of the time will be the network's "
                     f"({gigabytes(found.sent)} GB a step): invoke plan shows what would be faster")
    return lines


@contextlib.contextmanager
def compared(run: Path, plan: Default) -> Iterator[None]:
    """Compare a run with the plan after it; a folder that can't be written loses that, and nothing else."""
    yield
    if plan.split:
        compare_idle(run, plan.split)
    if plan.task and plan.found:
        with contextlib.suppress(OSError):
            history.record(run, plan.model, plan.task, plan.found)
