"""Estimates what a rank's memory is used for and what would save some of it; reported when memory runs out.

Bytes for each weight: ZeRO, arXiv 1910.02054, section 3.1 (2 + 2 + 12 in 16 bits with Adam). Activations: what torch
keeps of a Llama's layer for its gradients, counted with saved_tensors_hooks: 8 h + 4 i + 2 k numbers a token (h hidden
size, i intermediate size, k of keys as attention gets them), and in 16 bits 2 h more for the norms, which compute in
32. Liger's gated layer computes two of the 4 i anew, and its norms keep 16 bits. Autocast keeps the weights in 16 bits
until the backward pass. On an H200 a Llama of 1.1 billion weights took 40.1 GB, with Liger 32.4, where this gives 39.9
and 31.7 with the copy of the gradients that was made then. Other models differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

LORA_SHARE = 0.01  # of a model's weights in an adapter of rank 16, about
NF4 = 0.55  # bytes of a weight in 4 bits with its doubly quantized scales (arXiv 2305.14314)
MIN_SAVING = 0.02  # of what is needed: less isn't worth a word
USABLE = 0.9  # of a device's memory, a guess: its libraries, and what lies between blocks, take the rest


@dataclass(frozen=True)
class MemoryInputs:
    """What is trained how: weights, those trained, shape of the model, of a micro batch, of ZeRO (stage None: without).

    `number`: bytes of a weight and an activation, `weight`: of a frozen weight where that is kept smaller; `chunk`: the
    tokens whose logits are held at once, None: all.
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
    chunk: int | None = None


def bytes_needed(inputs: MemoryInputs) -> dict[str, float]:
    """Return the bytes of one rank on its device, by what takes them."""
    stage, split = inputs.stage or 0, 1 / inputs.ranks
    kept = 4 if inputs.stage is None else inputs.number  # plain PyTorch keeps 32 bits
    states = (8 if inputs.stage is None else 12) * inputs.trained * (split if stage >= 1 else 1)
    weights = inputs.weights * (inputs.weight or kept) * (split if stage == 3 else 1)
    wide = 2 * inputs.hidden if inputs.number == 2 and not inputs.liger else 0
    layer = 8 * inputs.hidden + (2 if inputs.liger else 4) * inputs.intermediate + 2 * inputs.keys + wide
    tokens = inputs.micro * inputs.sequence
    numbers = layer + inputs.hidden * inputs.layers if inputs.checkpoints else layer * inputs.layers
    activations, logits, copies = float(numbers * tokens * inputs.number), logits_bytes(inputs), 0.0
    gradients: float = inputs.trained * kept * (split if stage >= 2 else 1)
    if inputs.stage is None:  # DistributedDataParallel's buckets are the gradients
        activations += inputs.number * inputs.weights if inputs.number == 2 and not inputs.weight else 0  # autocast's
        if inputs.ranks == inputs.accumulation == 1:  # gradients come as activations go
            gradients = max(0.0, gradients - activations - logits)
    else:  # ZeRO's own part of them: as it was reduced, where the others stay too, and in 32 bits
        each = (kept if stage == 1 else 0) + (0 if inputs.offloads else 4)
        copies = each * inputs.trained * split if stage else 0.0
    return {"weights": weights, "gradients": gradients, "gradient copies": copies,
            "optimizer states": 0.0 if inputs.offloads else states, "activations": activations, "logits": logits}


def logits_bytes(inputs: MemoryInputs) -> float:
    """Return the bytes of the logits that are held at once, with what is computed of them."""
    tokens, low = inputs.micro * inputs.sequence, inputs.number if inputs.number == 2 else 0
    if inputs.chunk is None:  # they, their log-softmax, its gradient, their own
        return (8 + 2 * inputs.number) * tokens * inputs.vocabulary
    held = min(inputs.chunk, tokens) * inputs.vocabulary * (8 + 2 * low)  # in 32 bits, their exponentials; in 16 twice
    head = 4 * inputs.vocabulary * inputs.hidden if low and inputs.trained == inputs.weights else 0  # its gradient
    return held + head


def total(inputs: MemoryInputs) -> float:
    """Return the bytes of one rank on its device."""
    return sum(bytes_needed(inputs).values())


def savings(inputs: MemoryInputs, on_gpu: bool, room: float) -> list[tuple[str, float]]:
    """Return what would save memory and how many bytes of a rank's, least intrusive first; `room` as in `fitting`."""
    before = total(inputs)
    found = [(words, before - total(other)) for words, other in alternatives(inputs, on_gpu, room)]
    return [(words, saved) for words, saved in found if saved > MIN_SAVING * before]


def smaller_batch(inputs: MemoryInputs, room: float) -> MemoryInputs:
    """Return the load with the largest micro batch that fits, and the accumulation that keeps the global batch."""
    divisors = (micro for micro in range(inputs.micro - 1, 0, -1) if inputs.micro % micro == 0)
    loads = [replace(inputs, micro=micro, accumulation=inputs.accumulation * inputs.micro // micro)
             for micro in divisors]
    return next((load for load in loads if total(load) <= room), loads[-1] if loads else inputs)


def batch_flags(load: MemoryInputs) -> str:
    """Return the flags of a load's batch."""
    return f"--per_device_train_batch_size {load.micro} --gradient_accumulation_steps {load.accumulation}"


def fitting(inputs: MemoryInputs, on_gpu: bool, room: float) -> tuple[str, MemoryInputs] | None:
    """Return the flags of the least intrusive load that fits into `room` bytes, and that load; None if none does.

    Smaller micro batches come first, alone and with each alternative in turn.
    """
    for words, other in alternatives(inputs, on_gpu, room):
        load = other if total(other) <= room else smaller_batch(other, room)
        if total(load) <= room:
            return words if load is other else f"{words} {batch_flags(load)}", load
    return None


def alternatives(inputs: MemoryInputs, on_gpu: bool, room: float) -> Iterator[tuple[str, MemoryInputs]]:
    """Yield flags and the load with them: first what leaves the result as it is, then what costs time, then others."""
    flag = "--config" if "LANSPEED_PLAIN" in os.environ else "--deepspeed_config"  # the launcher's, or the trainer's
    presets, stage = f"{flag} trainer/configs", inputs.stage or 0
    if inputs.micro > 1:
        load = smaller_batch(inputs, room)
        yield batch_flags(load), load
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


def report_lines(inputs: MemoryInputs, on_gpu: bool, memory: float) -> list[str]:
    """Return the lines that a person reads when memory has run out; `memory`: bytes that a rank has."""
    parts = bytes_needed(inputs)
    what = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
    room = USABLE * min(memory, total(inputs))  # where it seems to fit and didn't, something else takes memory
    fits = fitting(inputs, on_gpu, room)
    lines = [f"a rank needs about {gigabytes(total(inputs))} GB and has {gigabytes(memory)}: {what}",
             f"this fits: the same command with {fits[0]} (about {gigabytes(total(fits[1]))} GB)" if fits else
             "no single change makes it fit: a smaller model, or more machines with ZeRO-3",
             "what would save memory, least intrusive first:"]
    found = savings(inputs, on_gpu, room)
    width = max((len(words) for words, _ in found), default=0)
    return lines + [f"  {words:<{width}}  {gigabytes(saved)} GB" for words, saved in found]


def gigabytes(size: float) -> str:
    """Return bytes as GB with two digits that count."""
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"
