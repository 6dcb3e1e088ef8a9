"""Estimates what a rank's memory is used for and what would save some of it; reported when memory runs out.

Bytes for each weight: ZeRO, arXiv 1910.02054, section 3.1 (2 + 2 + 12 in 16 bits with Adam). Activations: what torch
keeps of a Llama's layer for its gradients, counted with saved_tensors_hooks: 8 h + 4 i + 2 k numbers a token (h hidden
size, i intermediate size, k of keys), and in 16 bits 2 h more for the norms, which compute in 32. Other models differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

LORA_SHARE = 0.01  # of a model's weights in an adapter of rank 16, about
NF4 = 0.55  # bytes of a weight in 4 bits with its doubly quantized scales (arXiv 2305.14314)
MIN_SAVING = 0.02  # of what is needed: less isn't worth a word


@dataclass(frozen=True)
class MemoryInputs:
    """What is trained how: weights, those trained, shape of the model, of a micro batch, of ZeRO (stage None: without).

    `number`: bytes of a weight and an activation, `weight`: of a frozen weight where that is kept smaller.
    """

    weights: float
    trained: float
    layers: int
    hidden: int
    intermediate: int
    keys: int
    vocabulary: int
    sequence: int
    micro: int
    accumulation: int
    ranks: int
    stage: int | None
    number: int
    weight: float = 0.0
    offloads: bool = False
    checkpoints: bool = False
    liger: bool = False


def bytes_needed(inputs: MemoryInputs) -> dict[str, float]:
    """Return the bytes of one rank on its device, by what takes them."""
    stage, split = inputs.stage or 0, 1 / inputs.ranks
    kept = 4 if inputs.stage is None else inputs.number  # plain PyTorch keeps 32 bits
    states = (8 if inputs.stage is None else 12) * inputs.trained * (split if stage >= 1 else 1)
    weights = inputs.weights * (inputs.weight or kept) * (split if stage == 3 else 1)
    layer = 8 * inputs.hidden + 4 * inputs.intermediate + 2 * inputs.keys + (2 * inputs.hidden if inputs.number == 2
                                                                             else 0)
    tokens = inputs.micro * inputs.sequence
    numbers = layer + inputs.hidden * inputs.layers if inputs.checkpoints else layer * inputs.layers
    logits = (8 + 2 * inputs.number) * tokens * inputs.vocabulary  # they, their log-softmax, its gradient, their own
    if inputs.stage is None:  # DistributedDataParallel's buckets are the gradients
        copies = 0.0
    else:  # ZeRO's own part of them: as it was reduced, where the others stay too, and in 32 bits
        each = (kept if stage == 1 else 0) + (0 if inputs.offloads else 4)
        copies = each * inputs.trained * split if stage else 0.0
    return {"weights": weights, "gradients": inputs.trained * kept * (split if stage >= 2 else 1),
            "gradient copies": copies,
            "optimizer states": 0.0 if inputs.offloads else states, "activations": numbers * tokens * inputs.number,
            "logits": logits / 10 if inputs.liger else logits}


def savings(inputs: MemoryInputs, on_gpu: bool) -> list[tuple[str, float]]:
    """Return what would save memory and how many bytes of a rank's, least intrusive first."""
    before = sum(bytes_needed(inputs).values())
    found = [(words, before - sum(bytes_needed(other).values())) for words, other in alternatives(inputs, on_gpu)]
    return [(words, saved) for words, saved in found if saved > MIN_SAVING * before]


def alternatives(inputs: MemoryInputs, on_gpu: bool) -> Iterator[tuple[str, MemoryInputs]]:
    """Yield flags and the load with them: first what leaves the result as it is, then what costs time, then others."""
    flag = "--config" if "LANSPEED_PLAIN" in os.environ else "--deepspeed_config"  # the launcher's, or the trainer's
    presets, stage = f"{flag} trainer/configs", inputs.stage or 0
    if inputs.micro > 1:
        parts = next(number for number in range(2, inputs.micro + 1) if inputs.micro % number == 0)
        micro, more = inputs.micro // parts, inputs.accumulation * parts
        yield (f"--per_device_train_batch_size {micro} --gradient_accumulation_steps {more}",
               replace(inputs, micro=micro, accumulation=more))
    if on_gpu and not inputs.liger:
        yield "--liger", replace(inputs, liger=True)
    if inputs.ranks > 1 and stage < 1:
        yield f"{presets}/zero1.json", replace(inputs, stage=1)
    if inputs.ranks > 1 and stage < 2:
        yield f"{presets}/zero2.json", replace(inputs, stage=2)
    if not inputs.checkpoints:
        yield "--activation_checkpointing", replace(inputs, checkpoints=True)
    if on_gpu and not inputs.offloads:
        yield f"{presets}/zero2_offload.json", replace(inputs, stage=max(stage, 2), offloads=True)
    if inputs.ranks > 1 and stage < 3 and not inputs.weight:
        yield f"{presets}/zero3.json", replace(inputs, stage=3)
        if on_gpu:
            yield f"{presets}/zero3_offload.json", replace(inputs, stage=3, offloads=True)
    if inputs.trained == inputs.weights:
        adapter = replace(inputs, trained=LORA_SHARE * inputs.weights)
        yield "--lora", adapter
        if on_gpu and stage < 3:
            yield "--qlora", replace(adapter, weight=NF4)
    yield f"--sequence_length {inputs.sequence // 2}", replace(inputs, sequence=inputs.sequence // 2)


def report_lines(inputs: MemoryInputs, on_gpu: bool) -> list[str]:
    """Return the lines that a person reads when memory has run out."""
    parts = bytes_needed(inputs)
    what = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
    lines = [f"a rank needs about {gigabytes(sum(parts.values()))} GB: {what}",
             "what would save memory, least intrusive first:"]
    found = savings(inputs, on_gpu)
    width = max((len(words) for words, _ in found), default=0)
    return lines + [f"  {words:<{width}}  {gigabytes(saved)} GB" for words, saved in found]


def gigabytes(size: float) -> str:
    """Return bytes as GB with two digits that count."""
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"
