"""The parts of a training whose layers are split over the ranks: this rank's stage, and its part of an adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer.distributed import devices
from trainer.errors import UserError
from trainer.estimate.memory import MemoryInputs, gigabytes
from trainer.estimate.stages import stage_bytes
from trainer.model import loading, lora
from trainer.options import Options
from trainer.results.setup import Setup
from trainer.split import allowed
from trainer.split.allowed import MICRO_BATCHES
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


def settle_batch(options: Options, ranks: int, wanted: int) -> Options:
    """Return the options with a batch: micro batches of one row, and some for each rank. `wanted`: rows of a batch.

    Raises UserError for fewer micro batches than ranks, and for pairs of answers.
    """
    if options.method == "dpo":
        raise allowed.refused("--split_layers trains on text and conversations, not on pairs of answers")
    micro = options.per_device_train_batch_size or 1
    accumulation = options.gradient_accumulation_steps or max(
        MICRO_BATCHES * ranks, (options.global_batch_size or wanted) // micro)
    return replace(options, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)


def split_of(setup: Setup) -> Split:
    """Return how the model is split, once its family was tried in small; all ranks call it. Raises UserError."""
    options, ranks = setup.options, setup.ranks
    config = setup.config if setup.config is not None else loading.tiny_config(setup.tokenizer)
    allowed.check(options, ranks.world_size, config.to_dict())
    speed = devices.peak_flops([devices.device_facts(ranks.local_rank)], setup.precision)
    told = ranks.all_gather_json("split-memory", [own_memory(setup), speed])
    memory = [size for size, _ in told]
    load = expected_load(options, setup.shape, setup.device, setup.precision, None, setup.sequence_length,
                         ranks.world_size) if setup.shape else None
    made = choose_cuts(options.split_layers or (), config.get_text_config().num_hidden_layers, memory,
                       [speed for _, speed in told], load)
    needs = stop_if_too_large(load, made, memory, ranks.hosts) if load else ()
    family = check_family(config, ranks.world_size, options.attn_implementation)
    if family.split.shared and not options.lora:
        raise allowed.refused(f"--split_layers: several stages of {config.model_type} use "
                              f"{min(family.split.shared)}: train an adapter: add --lora")
    return Split(tuple(made), made[ranks.rank], family, needs, tuple(memory))


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


def own_memory(setup: Setup) -> int:
    """Return the bytes of this rank's device."""
    if setup.device == "cpu":
        return setup.memory
    return int(torch.get_device_module(setup.device).get_device_properties(setup.ranks.local_rank).total_memory)


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
