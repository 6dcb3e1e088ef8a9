"""The model and its Trainer, as a training's setup asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import transformers

from trainer.data import sources
from trainer.distributed import heartbeat
from trainer.estimate.flops import flops_per_token
from trainer.exchange import start_weights
from trainer.model import from_config, loading, lora
from trainer.model.head_loss import HeadLoss
from trainer.options import Options
from trainer.results.setup import Setup, Workload
from trainer.sequences import streaming
from trainer.sequences.packing import Collator, PackedSequences
from trainer.steps.evaluation import affordable_sequences
from trainer.steps.finite import FiniteCheck
from trainer.training import kernels, split_building
from trainer.training.arguments import training_arguments
from trainer.training.causal_trainer import CausalTrainer
from trainer.training.preflight import check_world_sizes
from trainer.training.split_building import Split


@dataclass(frozen=True)
class Built:
    """A model that is ready to be trained, with its adapter.

    `config`: its text model's; `parameters`: without an adapter, `trained`: those that are, `active`: those that a
    token meets; `share`: of the linear weights that have an adapter; `liger`: with its kernels; `split`: how its layers
    are split over the ranks, None where each has all, `own`: what this rank saves of a split model that is trained
    whole.
    """

    model: Any
    config: Any
    parameters: int
    trained: int
    active: int
    share: float | None
    liger: bool
    head_loss: HeadLoss | None
    split: Split | None = None
    own: frozenset[str] | None = None


def dtype_of(setup: Setup) -> str:
    """Return the kind of the weights: DeepSpeed keeps 32-bit copies itself, plain PyTorch doesn't, of what is
    trained."""
    in_32_bits = setup.ds_config is None and not setup.options.lora
    return "float32" if in_32_bits else loading.DTYPES[setup.precision]


def base_model(setup: Setup, split: Split | None) -> Any:
    """Return the model as it is before an adapter; of one that is `split` this rank's stage."""
    options = setup.options
    if split:
        return split_building.stage_model(setup, split, dtype_of(setup))
    if options.from_config:
        return from_config.build_model(options, setup.config, setup.tokenizer, dtype_of(setup), setup.flash)
    if options.qlora:
        here = "cpu" if setup.device == "cpu" else f"{setup.device}:{setup.ranks.local_rank}"
        return loading.load_model(options, loading.DTYPES[setup.precision], setup.flash, here)
    return loading.load_model(options, dtype_of(setup), setup.flash)


def build_model(setup: Setup) -> tuple[Built, transformers.TrainingArguments]:
    """Return the model and the Trainer's arguments; stop if transformers counts other ranks than the launcher."""
    options, ranks = setup.options, setup.ranks
    heartbeat.report("loading the model")
    tiny = options.model_name_or_path == loading.TINY
    # A tiny model is built before transformers knows of ZeRO-3, so that its weights hang on the seed alone.
    split = split_building.split_of(setup) if options.split_layers is not None else None
    model = loading.build_tiny(setup.tokenizer, options.seed) if tiny and not split else None
    arguments = pair_arguments(setup) if setup.pairs else training_arguments(setup, **batches_of(setup))
    check_world_sizes(ranks.world_size, arguments.world_size, engine=ranks.world_size)
    if model is None:
        model = base_model(setup, split)
    resized = loading.resize(model, options, setup.tokenizer)
    if loading.freeze_other_senses(model):
        setup.console.say("what the model has for pictures or sound stays as it is")
    config = model.config.get_text_config()
    parameters = model.num_parameters() if options.qlora else lora.trained(model)
    active = lora.active_parameters(model, parameters)
    with_liger, head_loss, share = False, None, None
    if not setup.pairs:
        kernels.keep_residual(model, setup)
        if not split:
            with_liger, head_loss = kernels.choose(model, setup), kernels.head_loss_of(model)
        elif split.own.is_last and split.family.in_chunks:
            head_loss = kernels.head_loss_of(model)
    own: frozenset[str] | None = None
    if split:
        parameters, active = split_building.whole(setup, parameters), split_building.whole(setup, active)
        if setup.shape:  # what stands at both ends counts once
            active, parameters = int(active * setup.shape.parameters / parameters), int(setup.shape.parameters)
        if options.lora:
            model, share = split_building.add_adapter(model, setup)
        else:
            own = split_building.freeze_others(model, split)
    elif options.lora:
        transformers.set_seed(options.seed)
        model, share = lora.add_adapter(model, options, setup.engine.endswith("ZeRO-3"), resized)
    if setup.hosts and not start_weights.agree(model, ranks):
        setup.console.warn("the hosts had other weights to start with: those of rank 0 were sent to all")
    trained = split_building.whole(setup, lora.trained(model)) if split else lora.trained(model)
    return Built(model, config, parameters, trained, active, share, with_liger, head_loss, split, own), arguments


def batches_of(setup: Setup) -> dict[str, Any]:
    """Return the Trainer's batch where it isn't a micro batch: that of all micro batches, which go through stages."""
    o = setup.options
    if o.split_layers is None:
        return {}
    return {"per_device_train_batch_size": o.batch_per_rank, "per_device_eval_batch_size": o.batch_per_rank,
            "gradient_accumulation_steps": 1}


def pair_arguments(setup: Setup) -> transformers.TrainingArguments:
    """Return the arguments of TRL's trainer for pairs of answers."""
    from trl import DPOConfig

    o = setup.options
    return training_arguments(setup, DPOConfig, beta=o.dpo_beta, max_length=None, precompute_ref_log_probs=True,
                              disable_dropout=not o.lora_dropout, gradient_checkpointing=None)


def common_arguments(setup: Setup, built: Built, arguments: Any, callbacks: Sequence[Any]) -> dict[str, Any]:
    """Return what every trainer gets."""
    o = setup.options
    return {"ranks": setup.ranks, "layout": setup.layout, "keep": o.save_total_limit, "copies": o.checkpoint_copies,
            "warn": setup.console.warn, "finite": FiniteCheck(setup.ranks, setup.precision, o.learning_rate),
            "model": built.model, "args": arguments, "processing_class": setup.tokenizer, "callbacks": [*callbacks]}


def workload_of(setup: Setup, built: Built, sequences: Any, steps: int, evaluated: int, held_out: int) -> Workload:
    """Return what is trained."""
    return Workload(built.config, built.parameters, built.trained, sequences, steps, evaluated, held_out, built.liger,
                    str(built.model.config._attn_implementation), built.share,
                    built.split.described if built.split else "")


def text_trainer(setup: Setup, built: Built, arguments: Any, callbacks: Sequence[Any]) -> tuple[Workload, Any]:
    """Return what is trained of text, and the Trainer that does it."""
    options = setup.options
    capacity = None if options.no_packing else setup.sequence_length
    sequences = PackedSequences(setup.data.train, capacity, setup.global_batch_size, epoch=setup.data.epoch)
    steps = steps_of(options, len(sequences) // setup.global_batch_size)
    held_out = PackedSequences(setup.data.evaluation, capacity)
    evaluated = held_out.spread(affordable_sequences(options, steps, setup.global_batch_size))
    kind: Any = CausalTrainer
    if built.split:
        from trainer.training.split_trainer import SplitTrainer

        kind = partial(SplitTrainer, cut=built.split.own, way=built.split.family.way, own=built.own,
                       micro_batches=options.gradient_accumulation_steps, wire=split_building.wire_of(setup))
    trainer = kind(
        eval_sequences=evaluated, collate=Collator(setup.tokenizer.pad_token_id, capacity,
                                                   len(setup.data.info.sources)),
        train_dataset=stream_of(setup, capacity) if options.streaming else sequences,
        **common_arguments(setup, built, arguments, callbacks))
    trainer.head_loss = built.head_loss
    return workload_of(setup, built, sequences, steps, evaluated.filled, held_out.filled), trainer


def pair_trainer(setup: Setup, built: Built, arguments: Any, callbacks: Sequence[Any]) -> tuple[Workload, Any]:
    """Return what is trained of pairs of answers, and TRL's trainer that does it."""
    from trainer.preference import pairs
    from trainer.preference.preference_trainer import PreferenceTrainer

    data, batch = setup.data, setup.global_batch_size
    steps = steps_of(setup.options, -(-len(data.train) // batch))
    evaluated = pairs.spread(data.evaluation, affordable_sequences(setup.options, steps, batch))
    trainer = PreferenceTrainer(train_dataset=data.train, eval_dataset=evaluated if len(evaluated) else None,
                                **common_arguments(setup, built, arguments, callbacks))
    counted = pairs.counted(data.train)
    return workload_of(setup, built, counted, steps, len(evaluated), len(data.evaluation)), trainer


def steps_of(options: Options, epoch: int) -> int:
    """Return the optimizer steps of a training, given those of an epoch."""
    return options.max_steps if options.max_steps > 0 else epoch * options.num_epochs


def stream_of(setup: Setup, capacity: int | None) -> streaming.Stream:
    """Return this rank's stream of sequences, from its beginning or where the checkpoint was."""
    options, ranks, facts = setup.options, setup.ranks, setup.data.info
    source = sources.open_source(options.datasets[0].name, options, list)
    made = streaming.Stream(streaming.StreamSettings(
        source.after, facts.form, setup.tokenizer, setup.sequence_length, frozenset(facts.held_out), ranks.rank,
        ranks.world_size, options.seed), capacity)
    if setup.checkpoint:
        streaming.load(made, setup.checkpoint, ranks.rank)
    return made


def flops_of(setup: Setup, built: Built) -> float | None:
    """Return the operations of a token in training, None where the model's shape isn't known."""
    if setup.shape is None or setup.pairs:  # whose reference answers aren't computed again
        return None
    shape = replace(setup.shape, active=built.active)
    return flops_per_token(shape, setup.sequence_length, frozen=bool(setup.options.lora))
