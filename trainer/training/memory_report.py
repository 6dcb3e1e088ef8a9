"""What is said of a training's memory: in run.json before it, and when it has run out."""

from __future__ import annotations

import math
import resource
from dataclasses import replace
from typing import Any

import torch

from trainer.distributed.deepspeed_config import lookup, offloads_optimizer
from trainer.distributed.ranks import Ranks
from trainer.errors import UserError
from trainer.estimate import batch, traffic
from trainer.estimate.advice import report_lines
from trainer.estimate.memory import (
    NF4,
    USABLE,
    MemoryInputs,
    bytes_needed,
    gigabytes,
    inputs_of,
    moment_bytes,
    optimizer_bytes,
    total,
)
from trainer.estimate.shape import Shape
from trainer.model.head_loss import chunk_tokens
from trainer.options import Options
from trainer.results.setup import Hardware, Setup, Workload

SCARCE = 0.5  # share of a rank's memory that it needs, from which that may be what ran out
REPEATS_KEYS = ("sdpa", "eager")  # attention that gets keys and values for every head, however few the model has
UNKNOWN_SHAPE = (AttributeError, TypeError, ZeroDivisionError)


def expected_load(options: Options, shape: Shape, device: str, precision: str, ds_config: dict[str, Any] | None,
                  sequence: int, ranks: int, sharing: int = 0) -> MemoryInputs:
    """Return what a training will put on each rank, before it is known which kernels the model takes: the most.

    `sharing`: ranks that share an engine, 0: all.
    """
    stage = None if ds_config is None else int(lookup(ds_config, "zero_optimization.stage") or 0)
    number = 4 if precision == "fp32" else 2
    bucket = lookup(ds_config or {}, "zero_optimization.reduce_bucket_size")
    return inputs_of(
        shape, shape.adapter(options.lora) if options.lora else shape.parameters, repeats_keys=True, sequence=sequence,
        micro=options.per_device_train_batch_size or 1, accumulation=options.gradient_accumulation_steps or 1,
        ranks=ranks, sharing=sharing, residual=residual_bytes(options, ranks, sharing),
        moments=moment_bytes(options.optim), stage=stage, number=number,
        weight=NF4 if options.qlora else number if options.lora else 0.0,
        offloads=offloads_optimizer(ds_config), checkpoints=options.activation_checkpointing,
        offloads_weights=lookup(ds_config or {}, "zero_optimization.offload_param.device") in ("cpu", "nvme"),
        chunk=chunk_tokens(shape.vocabulary, device == "cpu"),
        bucket=bucket if isinstance(bucket, int | float) else shape.hidden**2)  # transformers' own "auto"


def residual_bytes(options: Options, ranks: int, sharing: int) -> float:
    """Return the bytes for each trained weight that a rank of the smallest host keeps of what crosses between hosts."""
    if not options.lan_compress or sharing in (0, ranks):
        return 0.0
    return traffic.residual_bytes(sharing, -(-ranks // sharing), bool(options.lan_average))


def memory_inputs(setup: Setup, workload: Workload) -> MemoryInputs:
    """Return what a training puts on each rank, with the kernels that it has. Raises UNKNOWN_SHAPE."""
    if (shape := setup.shape) is None:
        raise AttributeError("a model whose shape isn't known")
    found = expected_load(setup.options, shape, setup.device, setup.precision, setup.ds_config, setup.row_tokens,
                          setup.ranks.world_size, setup.hosts.lanes if setup.hosts else 0)
    heads = shape.heads if workload.attention in REPEATS_KEYS else shape.kv_heads
    return replace(found, weights=workload.parameters, trained=workload.trained, keys=shape.head_size * heads,
                   liger=workload.liger, chunk=None if changes_logits(workload.config) else found.chunk)


def may_coalesce(setup: Setup) -> bool:
    """Return whether ZeRO-2 over several hosts, which accumulates, has the memory to keep all gradients for a step."""
    options, config = setup.options, setup.ds_config or {}
    if (setup.shape is None or setup.hosts or setup.ranks.on_one_machine or options.gradient_accumulation_steps == 1
            or lookup(config, "zero_optimization.stage") != 2 or offloads_optimizer(config)):
        return False
    load = expected_load(options, setup.shape, setup.device, setup.precision, config, setup.sequence_length,
                         setup.ranks.world_size)
    return total(replace(load, stage=1)) <= USABLE * setup.free


def settle_batch(options: Options, shape: Shape | None, hardware: Hardware, ds_config: dict[str, Any] | None,
                 sequence: int, sequences: int | None, ranks: int, sharing: int = 0) -> tuple[Options, str]:
    """Return the options with a batch, and why it is no larger ("" where nothing stood against it).

    What was given is taken; `sequences`: of an epoch, None for a stream. All ranks come to the same.
    """
    micro, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    wanted = options.global_batch_size or batch.default_global_batch(sequence, sequences)
    if options.global_batch_size and (micro or accumulation):
        rest = max(1, round(wanted / (ranks * (micro or accumulation))))
        micro, accumulation = micro or rest, accumulation or rest
    if micro or accumulation:
        return replace(options, per_device_train_batch_size=micro or batch.CPU_MICRO,
                       gradient_accumulation_steps=accumulation or 1), ""
    if shape is None:
        found = batch.Batch(*batch.share(wanted, ranks, batch.CPU_MICRO), options.activation_checkpointing)
    else:
        load = expected_load(options, shape, hardware.device, hardware.precision, ds_config, sequence, ranks,
                             sharing)
        found = batch.choose_batch(load, wanted, hardware.free, hardware.device != "cpu")
    return replace(options, per_device_train_batch_size=found.micro, gradient_accumulation_steps=found.accumulation,
                   activation_checkpointing=found.checkpoints), found.reason


def stop_if_too_large(options: Options, shape: Shape | None, hardware: Hardware, ds_config: dict[str, Any] | None,
                      sequence: int, ranks: int) -> None:
    """Raise a UserError where a rank's weights alone are larger than its memory, before any are loaded."""
    if shape is None:
        return
    load = expected_load(options, shape, hardware.device, hardware.precision, ds_config, sequence, ranks)
    on_gpu, each = hardware.device != "cpu", load.weight or (4 if load.stage is None else load.number)
    if load.stage == 3:
        each *= 0 if load.offloads_weights and on_gpu else 1 / ranks
    if each * load.weights <= hardware.memory:
        return
    others = {"--lora": load.number, "--qlora": NF4 if on_gpu else math.inf,
              f"--lora --split-layers over these {ranks} ranks": load.number / ranks if ranks > 1 else math.inf}
    fits = next((words for words, size in others.items() if size * load.weights <= USABLE * hardware.memory), None)
    size, room = gigabytes(each * load.weights), gigabytes(hardware.memory)
    raise UserError(f"{options.model_name_or_path}: a rank's weights are {size} GB, and it has {room} GB of memory: "
                    + (fits or "more hosts hold it together: --lora --split-layers"), shared=True)


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
    if workload.layers:  # each rank holds a part of that
        return None
    scarce = total(load) > SCARCE * setup.memory  # else it is something other than this model that fills it
    host = report_lines(load, False, setup.memory) if setup.device == "cpu" and scarce else []
    if host:
        host.append(f"and fewer slots a host: {setup.ranks.local_world_size} ranks share the memory of "
                    f"{setup.ranks.host}")
    elif load.offloads:
        host = [f"each rank keeps {gigabytes(optimizer_bytes(load))} GB of optimizer states in the host's memory: "
                "trainer/configs/zero2.json leaves them on the GPU, --lora needs almost none"]
    return {"needs": {name: round(size) for name, size in bytes_needed(load).items()}, "host": host}
