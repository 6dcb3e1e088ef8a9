"""A model whose layers several hosts share: which has how many, in which order, how long a step takes, and who waits.

    invoke plan --model M --gpus "1xRTX 3090:24GiB,1xRTX 3060:12GiB"    offers it where no host holds the model
    invoke train --model M --lora --split-layers                        takes its cuts, and its order of the hosts
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from master.core.atomic_write import write_atomically
from master.core.json_schema import loads
from master.core.terminal import say
from master.inventory.hostfile import Slots
from master.plan.machines import Machine, Network
from master.plan.rates import Rate, rate_on
from master.plan.ways import FULL, LORA, QLORA, Estimate, Task, load_of
from trainer.estimate import speed
from trainer.estimate.memory import USABLE, gigabytes
from trainer.estimate.shape import Shape
from trainer.estimate.stages import MICRO_BATCHES, Timing, choose_counts, head_layers, stage_bytes, step_time

MOST_HOSTS = 4


@dataclass(frozen=True)
class SplitBatch:
    """What the trainer's flags say of a step: sequences of a micro batch, micro batches (None: as the trainer takes
    them), and that activations are computed anew."""

    micro: int = 1
    count: int | None = None
    checkpoints: bool = False


@dataclass(frozen=True)
class SplitPlan:
    """How it is split: the hosts in their order, layers of each rank, micro batches of a step, each of one sequence
    unless the trainer's flags say more.

    `device`: bytes that each rank needs, `memory`: that it has; `sent`: bytes that cross each cut in a step, each way;
    `timing`: of a step, in the low, likely and high case of what devices compute, empty where no device's speed is
    known; `idle`: the share of its time in which each rank waits.
    """

    kind: str
    machines: tuple[Machine, ...]
    counts: tuple[int, ...]
    micro_batches: int
    checkpoints: bool
    device: tuple[float, ...]
    memory: tuple[float, ...]
    sent: float
    tokens: float
    timing: tuple[Timing, ...]
    idle: tuple[float, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens a second in the low, likely and high case, empty where unknown."""
        return tuple(self.tokens / each.seconds for each in self.timing)

    @property
    def cuts(self) -> str:
        """The layers of each rank: '32,16'."""
        return ",".join(map(str, self.counts))

    @property
    def order(self) -> tuple[float, ...]:
        """What sorts plans, the best first: speed, then few hosts, then little waiting."""
        return (-self.rates[1] if self.timing else 0.0, len(self.machines), max(self.idle), self.checkpoints)


def best_split(task: Task, choices: Sequence[tuple[Machine, ...]], network: Network, rates: Mapping[str, Rate],
               batch: SplitBatch = SplitBatch()) -> SplitPlan | None:
    """Return the best split over two to four hosts, in their best order; None where not even that holds the model."""
    kind = LORA if LORA in task.kinds else FULL
    if kind not in task.kinds or (kind == FULL and task.shape.tied):
        return None
    orders = (order for chosen in choices if 2 <= len(chosen) <= MOST_HOSTS for order in itertools.permutations(chosen))
    found = [plan for order in orders if (plan := split_over(task, kind, order, network, rates, batch))]
    return min(found, key=lambda plan: plan.order, default=None)


def split_over(task: Task, kind: str, machines: tuple[Machine, ...], network: Network, rates: Mapping[str, Rate],
               batch: SplitBatch) -> SplitPlan | None:
    """Return the plan for hosts in this order, None where they don't hold the model. A rank for each device."""
    places = [(machine, name) for machine in machines for name in machine.devices]
    ranks, shape = len(places), task.shape
    micro_batches = batch.count or max(MICRO_BATCHES * ranks, task.global_batch // batch.micro)
    load = replace(load_of(task, kind, 1, 0, "", machines), stage=None, micro=batch.micro, accumulation=micro_batches)
    known = [rate_on(rates, machine.name, name) for machine, name in places]
    speeds = [rate.flops.likely if rate else 1.0 for rate in known] if all(known) else [1.0] * ranks
    room = [USABLE * machine.memory for machine, _ in places]
    for checkpoints in (True,) if batch.checkpoints else (False, True):
        load = replace(load, checkpoints=checkpoints)
        if counts := choose_counts(load, room, speeds, head_layers(shape)):
            break
    else:
        return None
    tokens, overlaps = task.sequence * batch.micro, not machines[0].on_gpu
    work = [tokens * each for each in stage_work(shape, task.sequence, kind, counts, checkpoints)]
    size = float(tokens * shape.hidden * load.number)
    sending = max(crossing(one[0], other[0], size, network) for one, other in itertools.pairwise(places))
    timing = tuple(step_time([flops / getattr(rate.flops, case) for flops, rate in zip(work, known, strict=True)
                              if rate], sending, micro_batches, overlaps) for case in speed.CASES) if all(known) else ()
    idle = timing[1].idle if timing else step_time(work, 0.0, micro_batches, overlaps).idle
    needs = tuple(sum(stage_bytes(load, count, rank, ranks).values()) for rank, count in enumerate(counts))
    return SplitPlan(kind, machines, tuple(counts), micro_batches, checkpoints, needs,
                     tuple(machine.memory for machine, _ in places), size * micro_batches,
                     float(micro_batches * tokens), timing, idle)


def stage_work(shape: Shape, sequence: int, kind: str, counts: Sequence[int], checkpoints: bool) -> list[float]:
    """Return the FLOP that a token costs each rank in training; the last one has the head."""
    whole = speed.work_per_token(shape, sequence, kind != FULL, 0, checkpoints, True)
    head = head_layers(shape)
    layer = whole / (shape.layers + head)
    return [layer * (count + head * (rank == len(counts) - 1)) for rank, count in enumerate(counts)]


def crossing(one: Machine, other: Machine, size: float, network: Network) -> float:
    """Return the seconds that so many bytes take from one rank to the next."""
    if one.name == other.name:
        return size / speed.PCIE_BYTES_S[1] if one.on_gpu else 0.0
    return size / network.between((one, other))[0] + network.latency((one, other)) / 2


def in_order(slots: Sequence[Slots], plan: SplitPlan) -> list[Slots]:
    """Return a hostfile's lines in a plan's order."""
    by_name = {host.host: host for host in slots}
    return [by_name[machine.name] for machine in plan.machines]


def is_held(estimates: Sequence[Estimate]) -> bool:
    """Return whether some rank holds the whole model in a way that fits: then data parallel training is faster."""
    return any(each.fits and each.way.kind != QLORA and each.way.stage < 3 for each in estimates)


def layer_words(plan: SplitPlan) -> list[str]:
    """Return each host's layers, memory and waiting: 'gpu1: 32 layers, 19.1 of 24.0 GB, idle 12 %'."""
    found, rank = [], 0
    for machine in plan.machines:
        for _ in machine.devices:
            memory = f", {gigabytes(plan.device[rank])} of {gigabytes(plan.memory[rank])} GB" \
                if math.isfinite(plan.memory[rank]) else ""
            found.append(f"{machine.name}: {plan.counts[rank]} layers{memory}, idle {plan.idle[rank]:.0%}")
            rank += 1
    return found


def lines(task: Task, plan: SplitPlan, alone: str) -> list[str]:
    """Return what a person reads below the plan. `alone`: what 4 bits on one device would do, "" where that doesn't
    fit."""
    anew = ", activations recomputed" if plan.checkpoints else ""
    speed_words = "speed unknown"
    if plan.timing:
        low, likely, high = plan.rates
        speed_words = f"{likely:,.3g} ({low:,.3g} to {high:,.3g}) tokens/s, {plan.timing[1].seconds:,.3g} s a step"
    return ["no machine holds the model; with its layers split over the hosts they hold it together "
            "(docs/split_layers.md):",
            f"  {'full' if plan.kind == FULL else 'LoRA'}{anew}, {plan.micro_batches} micro batches of "
            f"{task.sequence:,} tokens: {speed_words}; {gigabytes(plan.sent)} GB a step each way at a cut",
            *(f"  {words}" for words in layer_words(plan)), *([f"  beside it: {alone}"] if alone else [])]


def started(plan: SplitPlan) -> list[str]:
    """Return what is said before a training starts."""
    seconds = f"; about {plan.timing[1].seconds:,.3g} s a step" if plan.timing else ""
    return [f"plan: {'; '.join(layer_words(plan))}{seconds}"]


def compare_idle(run: Path, plan: SplitPlan) -> None:
    """Say how long the ranks of a run waited, beside the plan, and keep both in its plan.json."""
    try:
        facts = loads((run / "run.json").read_text())
        measured, rate = facts["waiting"]["idle"], facts["summary"]["computed_tokens_per_second"]
        text = json.dumps({"split": described(plan), "idle": measured, "tokens_per_second": rate}, indent=1)
        beside = ", ".join(f"{found:.0%} ({planned:.0%})" for found, planned in zip(measured, plan.idle, strict=True))
        if plan.timing:
            beside += f"; tokens/s {rate:,.0f} ({plan.rates[1]:,.0f})"
        write_atomically(run / "plan.json", text + "\n")
    except (OSError, ValueError, KeyError, TypeError):  # it failed before that, or was stopped
        return
    say(f"idle (as planned): {beside}")


def described(plan: SplitPlan) -> dict[str, Any]:
    """Return a plan as data: bytes, seconds, tokens a second."""
    return {"kind": plan.kind, "machines": [machine.name for machine in plan.machines], "layers": list(plan.counts),
            "micro_batches": plan.micro_batches, "activation_checkpointing": plan.checkpoints,
            "device_bytes": [round(size) for size in plan.device], "sent_bytes_per_step": round(plan.sent),
            "tokens_per_step": round(plan.tokens), "idle": list(plan.idle),
            "step_s": [each.seconds for each in plan.timing] or None, "tokens_per_second": list(plan.rates) or None}


def command(plan: SplitPlan, model: str, rank: int, sequence: int, hostfile: str) -> str:
    """Return the command that trains so; it finds the same cuts and order again."""
    words = ["invoke", "train", "--model", model, "--hostfile", hostfile, "--include",
             "@".join(machine.name for machine in plan.machines), *(["--lora", str(rank)] if plan.kind == LORA else []),
             "--split-layers", "--", "--sequence_length", str(sequence), "--gradient_accumulation_steps",
             str(plan.micro_batches), *(["--activation_checkpointing"] if plan.checkpoints else [])]
    return shlex.join(words)
