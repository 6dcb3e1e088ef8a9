"""What would save memory, least intrusive first, and the one command that fits: reported when memory has run out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from trainer.estimate.memory import NF4, USABLE, MemoryInputs, bytes_needed, gigabytes, total

LORA_SHARE = 0.01  # of a model's weights in an adapter of rank 16, about
MIN_SAVING = 0.02  # of what is needed: less isn't worth a word


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
