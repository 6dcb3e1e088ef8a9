"""What is said of a training's memory: in run.json before it, and when it has run out."""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import Any

import torch

from trainer.distributed.deepspeed_config import lookup, offloads_optimizer
from trainer.distributed.ranks import Ranks
from trainer.estimate.memory import NF4, MemoryInputs, bytes_needed, gigabytes, report_lines
from trainer.model.head_loss import chunk_tokens
from trainer.results.setup import Setup, Workload

REPEATS_KEYS = ("sdpa", "eager")  # attention that gets keys and values for every head, however few the model has
UNKNOWN_SHAPE = (AttributeError, TypeError, ZeroDivisionError)


def memory_inputs(setup: Setup, workload: Workload) -> MemoryInputs:
    """Return what a training puts on each rank."""
    o, config = setup.options, workload.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    grouped = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    stage = None if setup.ds_config is None else int(lookup(setup.ds_config, "zero_optimization.stage") or 0)
    number = 4 if setup.precision == "fp32" else 2
    return MemoryInputs(
        weights=workload.parameters, trained=workload.trained, layers=config.num_hidden_layers, hidden=hidden,
        intermediate=max(inner) if isinstance(inner, list) else inner,
        keys=size * (grouped if workload.attention not in REPEATS_KEYS else heads), vocabulary=config.vocab_size,
        sequence=setup.sequence_length, micro=o.per_device_train_batch_size,
        accumulation=o.gradient_accumulation_steps, ranks=setup.ranks.world_size, stage=stage,
        number=number, weight=NF4 if o.qlora else number if o.lora else 0.0,
        offloads=offloads_optimizer(setup.ds_config), checkpoints=o.activation_checkpointing, liger=workload.liger,
        chunk=None if changes_logits(config) else chunk_tokens(config.vocab_size, setup.device == "cpu"))


def changes_logits(config: Any) -> bool:
    """Return whether a model changes its logits after the head, so that its loss needs all of them."""
    return any(getattr(config, name, None) not in (None, 0, 1, 1.0)
               for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"))


def peak_bytes(setup: Setup) -> int:
    """Return the most bytes that a rank has held at once: on its GPU, or without one in the host's memory."""
    if setup.device == "cpu":
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        own = torch.get_device_module(setup.device).max_memory_allocated()
    return max(setup.ranks.all_gather_json("peak", own))


def explained(ranks: Ranks, setup: Setup | None, workload: Workload | None, step: int) -> str:
    """Return what a rank says whose memory has run out after `step` steps; what was not settled by then is None."""
    where = f"{ranks.host}: rank {ranks.rank} ran out of memory"
    if setup is None:
        return f"{where} as it prepared the data: --streaming holds little of it at once"
    if workload is None:
        return f"{where} as it loaded the model: fewer ranks a host, or ZeRO-3, which loads it in parts"
    where += f" after step {step} of {workload.steps}"
    try:
        return "\n".join([where, *report_lines(memory_inputs(setup, workload), setup.device != "cpu", setup.memory)])
    except UNKNOWN_SHAPE:
        return f"{where}: a smaller --per_device_train_batch_size with more --gradient_accumulation_steps"


def described(setup: Setup, workload: Workload) -> dict[str, Any] | None:
    """Return what run.json says of memory; "host" has what would save a host's own, should the kernel kill a rank.

    None for a model whose configuration has other names for its shape.
    """
    try:
        load = memory_inputs(setup, workload)
    except UNKNOWN_SHAPE:
        return None
    host = report_lines(load, False, setup.memory) if setup.device == "cpu" else []
    if host:
        host.append(f"and fewer slots a host: {setup.ranks.local_world_size} ranks share the memory of "
                    f"{setup.ranks.host}")
    elif load.offloads:
        states = bytes_needed(replace(load, offloads=False))["optimizer states"]
        host = [f"each rank keeps {gigabytes(states)} GB of optimizer states in the host's memory: "
                "trainer/configs/zero2.json leaves them on the GPU, --lora needs almost none"]
    return {"needs": {name: round(size) for name, size in bytes_needed(load).items()}, "host": host}
