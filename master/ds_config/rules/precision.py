"""Precision, activation checkpointing and monitors: what fails when the engine is built, and what has no effect."""

from __future__ import annotations

from collections.abc import Iterator

from master.ds_config.problem import INIT, Config, Problem, Rules, shown
from master.ds_config.schema import node_of

RULES = Rules()
SAME_TYPE = {"half": "fp16", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "float32": "fp32"}


def short(name: object) -> str:
    """Return fp16, bf16, fp32 or int8 for any spelling of a type."""
    word = str(name).removeprefix("torch.")
    return SAME_TYPE.get(word, word)


def model_type(config: Config) -> str:
    """Return the type that the model trains in; '' where the Trainer decides."""
    for name in ("fp16", "bf16"):
        if config.get(name, "enabled") == "auto" and config.for_trainer:
            return ""
        if config.on(name, "enabled"):
            return name
    return "bf16" if config.on("bfloat16", "enabled") and not config.has("bf16") else "fp32"


@RULES.add
def kept_types(config: Config) -> Iterator[Problem]:
    """data_types against the precision (engine.py:1812, :2323)."""
    trained = model_type(config)
    for key in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        value = config.get("data_types", key)
        if value is None or value == "auto":
            continue
        known = (node_of(("data_types", key)) or {})["enum"]
        if value not in known and key == "buffer_dtype":
            yield Problem("bad-value", "warning", ("data_types", key), f"there is no type {shown(value)}",
                          "write fp32, bf16 or fp16")
        elif value not in known:
            yield Problem("bad-value", "error", ("data_types", key), f"there is no type {shown(value)}",
                          "write fp32, bf16 or fp16", INIT)
        elif key == "param_dtype" and trained and short(value) != trained:
            yield Problem("bad-combination", "error", ("data_types", key), f"{value} contradicts the training in "
                          f"{trained}", "take it out", INIT)
        elif key == "grad_accum_dtype" and trained and config.stage == 0 and short(value) != trained:
            yield Problem("bad-combination", "error", ("data_types", key), f"at ZeRO stage 0 gradients of a training "
                          f"in {trained} are kept in {trained}", "set stage 1, or take it out", INIT)


@RULES.add
def activation_checkpoints(config: Config) -> Iterator[Problem]:
    """deepspeed.checkpointing.configure asserts these, in programs that call it."""
    name = "activation_checkpointing"
    if config.on(name, "contiguous_memory_optimization") and not config.get(name, "number_checkpoints"):
        yield Problem("missing", "warning", (name, "number_checkpoints"), "contiguous_memory_optimization needs the "
                      "number of checkpoints", "give it, or switch contiguous_memory_optimization off")
    if config.on(name, "contiguous_memory_optimization") and not config.on(name, "partition_activations"):
        yield Problem("bad-combination", "info", (name, "contiguous_memory_optimization"),
                      "needs partition_activations", "switch that on too")
    if config.on(name, "cpu_checkpointing") and not config.on(name, "partition_activations"):
        yield Problem("no-effect", "info", (name, "cpu_checkpointing"), "works on partitioned activations only",
                      "set partition_activations to true")


@RULES.add
def monitors(config: Config) -> Iterator[Problem]:
    """Packages that every host needs (monitor/utils.py imports them when the engine is built)."""
    for name, package in (("wandb", "wandb"), ("comet", "comet_ml"), ("tensorboard", "tensorboard")):
        if config.on(name, "enabled"):
            yield Problem("needs-package", "info", (name,), f"needs the package {package} on every host",
                          f"pip install {package} there")
    if config.get("comet", "api_key"):
        yield Problem("secret", "info", ("comet", "api_key"), "a key in a file that is copied to every host",
                      "set COMET_API_KEY instead")


@RULES.add
def lamb(config: Config) -> Iterator[Problem]:
    """Lamb with a fixed loss scale (engine.py:2021)."""
    scale = config.get("fp16", "loss_scale", default=0)
    is_lamb = str(config.get("optimizer", "type")).lower() == "lamb"
    if is_lamb and config.on("fp16", "enabled") and scale not in (0, "0"):
        yield Problem("bad-combination", "error", ("fp16", "loss_scale"), "Lamb needs a dynamic loss scale",
                      "take it out", INIT)


@RULES.add
def compiled(config: Config) -> Iterator[Problem]:
    """DeepCompile switched on in a file alone."""
    if config.on("compile", "deepcompile"):
        yield Problem("no-effect", "info", ("compile", "deepcompile"), "nothing is compiled until the program calls "
                      "engine.compile()", "call it (the Trainer does not)")
