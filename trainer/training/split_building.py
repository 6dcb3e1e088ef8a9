"""The parts of a training whose layers are split over the ranks: this rank's stage, and its part of an adapter."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer.errors import UserError
from trainer.estimate.shape import TINY_SHAPE
from trainer.model import lora
from trainer.options import Options
from trainer.results.setup import Setup
from trainer.split.cutting import choose_cuts
from trainer.split.loading import load_stage
from trainer.split.self_check import Family, check_family
from trainer.split.stage import Cut

MICRO_BATCHES = 4  # for each rank, where nothing else is said: of 2 ranks one waits for a tenth of the time then


@dataclass(frozen=True)
class Split:
    """How a model is split: the cut of each rank, this rank's own, and what its family showed in small."""

    cuts: tuple[Cut, ...]
    own: Cut
    family: Family


def settle_batch(options: Options, ranks: int, wanted: int) -> Options:
    """Return the options with a batch: micro batches of one row, and some for each rank. `wanted`: rows of a batch.

    Raises UserError for fewer micro batches than ranks, and for pairs of answers.
    """
    if options.method == "dpo":
        raise UserError("--split_layers trains on text and conversations, not on pairs of answers", exit_code=2,
                        shared=True)
    micro = options.per_device_train_batch_size or 1
    accumulation = options.gradient_accumulation_steps or max(
        MICRO_BATCHES * ranks, (options.global_batch_size or wanted) // micro)
    if accumulation < ranks:
        raise UserError(f"--split_layers: {accumulation} micro batches can't keep {ranks} ranks busy: "
                        f"--gradient_accumulation_steps {MICRO_BATCHES * ranks} or more", exit_code=2, shared=True)
    return replace(options, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)


def split_of(setup: Setup) -> Split:
    """Return how the model is split, once its family was tried in small; all ranks call it. Raises UserError."""
    config, ranks = setup.config, setup.ranks
    layers = TINY_SHAPE["num_hidden_layers"] if config is None else config.get_text_config().num_hidden_layers
    memory = ranks.all_gather_json("split-memory", own_memory(setup))
    made = choose_cuts(setup.options.split_layers or (), layers, memory)
    family = Family()
    if config is not None:
        if getattr(config.get_text_config(), "output_router_logits", False):
            raise UserError("--split_layers: the router's loss of this model needs all layers in one place",
                            shared=True)
        family = check_family(config, ranks.world_size, setup.options.attn_implementation)
    return Split(tuple(made), made[ranks.rank], family)


def own_memory(setup: Setup) -> int:
    """Return the bytes of this rank's device."""
    if setup.device == "cpu":
        return setup.memory
    return int(torch.get_device_module(setup.device).get_device_properties(setup.ranks.local_rank).total_memory)


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
