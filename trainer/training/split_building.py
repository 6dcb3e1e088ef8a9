"""The parts of a training whose layers are split over the ranks: this rank's stage, and its part of an adapter."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer.distributed import devices
from trainer.distributed.ranks import Ranks
from trainer.errors import UserError
from trainer.estimate.memory import USABLE, MemoryInputs, gigabytes
from trainer.estimate.shape import Shape
from trainer.estimate.stages import MICRO_BATCHES, PLANNED, choose_counts, head_layers, stage_bytes
from trainer.model import loading, lora
from trainer.options import Options
from trainer.results.setup import Hardware, Setup
from trainer.split import allowed, sharing
from trainer.split.cutting import choose_cuts
from trainer.split.loading import load_stage
from trainer.split.pipeline import Wire
from trainer.split.self_check import Family, check_family
from trainer.split.stage import Cut, layers_of
from trainer.training.memory_report import expected_load


@dataclass(frozen=True)
class Split:
    """How a model is split: the cut of each rank, this rank's own, what its family showed in small; the bytes that each
    rank `needs`, empty where that isn't known, and those of its device's `memory`.
    """

    cuts: tuple[Cut, ...]
    own: Cut
    family: Family
    needs: tuple[float, ...]
    memory: tuple[int, ...]

    @property
    def described(self) -> str:
        """The layers of each rank, for a person: '32 + 16, about 19.1 of 24.0 + 9.6 of 12.0 GB'."""
        layers = " + ".join(str(cut.end - cut.first) for cut in self.cuts)
        sizes = " + ".join(f"{gigabytes(needed)} of {gigabytes(has)}"
                           for needed, has in zip(self.needs, self.memory, strict=False))
        return f"{layers}, about {sizes} GB" if sizes else layers


def settle_batch(options: Options, shape: Shape | None, hardware: Hardware, sequence: int, wanted: int, ranks: Ranks
                 ) -> Options:
    """Return the options with a batch: micro batches of one row, and some for each rank; activations are computed anew
    where the ranks can't keep them. `wanted`: rows of a batch. All ranks call it.

    Raises UserError for pairs of answers.
    """
    if options.method == "dpo":
        raise allowed.refused("--split_layers trains on text and conversations, not on pairs of answers")
    micro = options.per_device_train_batch_size or 1
    accumulation = options.gradient_accumulation_steps or max(
        MICRO_BATCHES * ranks.world_size, (options.global_batch_size or wanted) // micro)
    options = replace(options, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)
    means = means_of(options, shape, hardware, sequence, ranks)
    if means.load and not options.activation_checkpointing and not fitting(options, means):
        anew = replace(means, load=replace(means.load, checkpoints=True))
        options = replace(options, activation_checkpointing=fitting(options, anew))
    return options


@dataclass(frozen=True)
class Means:
    """What the ranks have: bytes of each device's `memory`, its `speed` (None: unknown); the whole model's `load`, None
    where its shape isn't known, and how many layers' work its `head` is.
    """

    memory: tuple[int, ...]
    speeds: tuple[float | None, ...]
    load: MemoryInputs | None
    head: float


def means_of(options: Options, shape: Shape | None, on: Hardware | Setup, sequence: int, ranks: Ranks) -> Means:
    """Return what the ranks have; all call it."""
    own = on.memory if on.device == "cpu" else int(
        torch.get_device_module(on.device).get_device_properties(ranks.local_rank).total_memory)
    speed = devices.peak_flops([devices.device_facts(ranks.local_rank)], on.precision)
    told = sharing.told(ranks, [own, speed])
    load = expected_load(options, shape, on.device, on.precision, None, sequence, ranks.world_size) if shape else None
    return Means(tuple(size for size, _ in told), tuple(speed for _, speed in told), load,
                 head_layers(shape) if shape else 0.0)


def fitting(options: Options, means: Means) -> bool:
    """Return whether the ranks hold the model, with the layers that they were given, or any."""
    assert means.load
    room = [USABLE * size for size in means.memory]
    if counts := wanted_counts(options, means.load.layers, len(room)):
        return all(sum(stage_bytes(means.load, count, rank, len(room)).values()) <= room[rank]
                   for rank, count in enumerate(counts))
    return choose_counts(means.load, room, [1.0] * len(room), means.head) is not None


def wanted_counts(options: Options, layers: int, ranks: int) -> tuple[int, ...]:
    """Return the layers of each rank that the user has said, else those that the launcher has planned, else none."""
    planned = tuple(int(word) for word in os.environ.get(PLANNED, "").split(",") if word.isdigit())
    fits = len(planned) == ranks and sum(planned) == layers and min(planned) > 0
    return tuple(options.split_layers or ()) or (planned if fits else ())


def split_of(setup: Setup) -> Split:
    """Return how the model is split, once its family was tried in small; all ranks call it. Raises UserError."""
    options, ranks = setup.options, setup.ranks
    config = setup.config if setup.config is not None else loading.tiny_config(setup.tokenizer)
    allowed.check(options, ranks.world_size, config.to_dict())
    means = means_of(options, setup.shape, setup, setup.sequence_length, ranks)
    layers = config.get_text_config().num_hidden_layers
    made = choose_cuts(wanted_counts(options, layers, ranks.world_size), layers, means.memory, means.speeds, means.load,
                       means.head)
    needs = stop_if_too_large(means.load, made, means.memory, ranks.hosts) if means.load else ()
    family = check_family(config, ranks.world_size, options.attn_implementation)
    if family.split.shared and not options.lora:
        raise allowed.refused(f"--split_layers: several stages of {config.model_type} use "
                              f"{min(family.split.shared)}: train an adapter: add --lora")
    return Split(tuple(made), made[ranks.rank], family, needs, means.memory)


def stop_if_too_large(load: MemoryInputs, made: Sequence[Cut], memory: Sequence[int], hosts: Sequence[str]
                      ) -> tuple[float, ...]:
    """Return the bytes that each rank needs. Raises UserError where its weights alone are larger than its memory."""
    parts = [stage_bytes(load, cut.end - cut.first, rank, len(made)) for rank, cut in enumerate(made)]
    for rank, part in enumerate(parts):
        if part["weights"] > memory[rank]:
            layers, size, room = made[rank].end - made[rank].first, gigabytes(part["weights"]), gigabytes(memory[rank])
            raise UserError(f"{hosts[rank]}: the weights of rank {rank}'s {layers} layers are {size} GB, and it has "
                            f"{room} GB of memory: fewer layers there (--split_layers A,B), or more hosts", shared=True)
    return tuple(sum(part.values()) for part in parts)


def freeze_others(model: Any, split: Split) -> frozenset[str]:
    """Freeze what a stage has only because it couldn't be left out, and return the names of what is its own."""
    beside = (split.family.split.first if split.own.is_first else frozenset()) | (
        split.family.split.last if split.own.is_last else frozenset())
    inside = {id(value) for value in layers_of(model).state_dict(keep_vars=True).values()}
    everything = model.state_dict(keep_vars=True)
    own = {name for name, value in everything.items() if id(value) in inside or name in beside}
    if split.own.is_first:  # buffers, and what nothing uses
        own |= set(everything) - split.family.split.last
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in own)
    return frozenset(own)


def wire_of(setup: Setup) -> Wire:
    """Return the dtypes of hidden states between stages and inside: weights in 32 bits that compute in 16 send 16."""
    if setup.precision != "bf16":
        return Wire(None, None)
    wide = not (setup.options.lora or setup.options.bf16_residual)
    return Wire(torch.bfloat16, torch.float32 if wide else torch.bfloat16)


def stage_model(setup: Setup, split: Split, dtype: str) -> Any:
    """Return this rank's stage. Raises UserError."""
    return load_stage(setup.options, setup.config, split.own, split.family.in_tuple, dtype, setup.tokenizer)


def add_adapter(model: Any, setup: Setup) -> tuple[Any, float]:
    """Return the stage with its part of an adapter, which begins with the same numbers wherever the layers are cut."""
    try:
        made, share = lora.add_adapter(model, setup.options, False)
    except UserError as error:  # of this rank's layers alone
        raise UserError(f"{setup.ranks.host}: in the layers of rank {setup.ranks.rank}: {error}") from None
    if not setup.options.adapter:
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if weight.requires_grad and "lora_A" in name:
                    start(weight, f"{setup.options.seed} {name}")
    return made, share


def start(weight: torch.Tensor, name: str) -> None:
    """Fill an adapter's matrix as peft does (uniform, up to 1 / root of its inputs), by a seed of its own."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
    bound = weight.shape[1] ** -0.5
    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed)))


def whole(setup: Setup, own: int) -> int:
    """Return the number of all ranks' weights from this rank's own; all ranks call it. A tied head counts twice."""
    return int(setup.ranks.all_reduce_sum(own)[0])
