"""What DeepSpeedConfig refuses beyond its checked sections: wrong kinds of sections and values.

Read in deepspeed/runtime/config.py, release 0.19.8; the tests put generated configs to both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from master.ds_config.problem import PARSE, Config, Fix, Problem, Rules, shown
from master.ds_config.schema import node_of
from master.ds_config.schema_check import coerce

RULES = Rules()


def refused(code: str, path: tuple[str, ...], message: str, how_to_fix: str, fix: Fix | None = None) -> Problem:
    """Return an error of the parse."""
    return Problem(code, "error", path, message, how_to_fix, PARSE, fix)


# -- sections ----------------------------------------------------------------------------------------------------------

# Sections that must be objects, and what else DeepSpeed takes in their place.
NEVER: Callable[[Any], bool] = lambda value: False  # noqa: E731
NULL: Callable[[Any], bool] = lambda value: value is None  # noqa: E731
SECTIONS: dict[tuple[str, ...], Callable[[Any], bool]] = {
    **{(name,): NEVER for name in (
        "fp16", "optimizer", "scheduler", "activation_checkpointing", "flops_profiler", "autotuning", "pipeline",
        "data_efficiency", "checkpoint", "data_types", "comms_logger", "compile", "hybrid_engine", "tensor_parallel",
        "weight_quantization", "torch_autocast")},
    **{(name,): lambda value: value == "auto" for name in ("tensorboard", "wandb", "csv_monitor", "comet")},
    ("zero_optimization",): lambda value: isinstance(value, bool),
    ("bf16",): NULL,
    ("aio",): NULL,
    ("timers",): lambda value: isinstance(value, (str, list)) and "throughput" not in value,
    ("timers", "throughput"): NEVER,
    ("expert_parallel",): lambda value: not value,
    ("autotuning", "model_info"): NULL,
    ("checkpoint", "parallel_write"): NEVER,
    ("checkpoint", "writer"): NULL,
    ("data_efficiency", "data_sampling"): NEVER,
    ("data_efficiency", "data_sampling", "curriculum_learning"): NEVER,
    ("data_efficiency", "data_sampling", "dynamic_batching"): NEVER,
    ("data_efficiency", "data_routing"): NEVER,
    ("data_efficiency", "data_routing", "random_ltd"): NEVER,
}


def _section_fix(path: tuple[str, ...], value: Any) -> Fix | None:
    if path == ("zero_optimization",) and value is None:
        return Fix("put", {"stage": 0})  # the Trainer asks for the section
    return Fix("remove") if value in (None, False) else None


@RULES.add
def sections_are_objects(config: Config) -> Iterator[Problem]:
    """A section that is null, true or a text."""
    for path, takes in SECTIONS.items():
        value = config.get(*path, default={})
        if not isinstance(value, dict) and not takes(value):
            yield refused("not-a-section", path, f"expected an object {{...}}, got {shown(value)}",
                          "take it out" if value in (None, False) else "write an object", _section_fix(path, value))
    value = config.get("bfloat16", default={})
    if config.get("bf16") is None and not isinstance(value, dict):
        yield refused("not-a-section", ("bfloat16",), f"expected an object {{...}}, got {shown(value)}", "write bf16")
    if config.section("optimizer").get("type") is not None:
        params = config.get("optimizer", "params")
        if params is not None and not isinstance(params, dict):
            yield refused("not-a-section", ("optimizer", "params"), f"expected an object, got {shown(params)}",
                          "write an object")


# -- values ------------------------------------------------------------------------------------------------------------


def _lower_in(*words: str, null: bool = False) -> Callable[[Any], bool]:
    return lambda value: (value is None and null) or (isinstance(value, str) and value.lower() in words)


def _dtype(value: Any) -> bool:
    return value in (node_of(("torch_autocast", "dtype")) or {})["enum"]


def is_whole(value: Any) -> bool:
    """Return whether Python's int() takes it."""
    try:
        int(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _names(value: Any) -> bool:
    return isinstance(value, (str, dict)) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


VALUES: dict[tuple[str, ...], tuple[Callable[[Any], bool], str]] = {
    ("communication_data_type",): (_lower_in("fp16", "bf16", "fp32", null=True), "fp16, bf16 or fp32"),
    ("seq_parallel_communication_data_type",): (_lower_in("fp16", "bf16", "fp32", null=True), "fp16, bf16 or fp32"),
    ("gradient_allreduce_op",): (_lower_in("mean", "sum"), "mean or sum"),
    ("checkpoint", "tag_validation"): (_lower_in("warn", "ignore", "fail"), "Ignore, Warn or Fail"),
    ("checkpoint", "parallel_write", "pipeline_stage"): (lambda value: value in (True, False), "true or false"),
    ("checkpoint", "writer", "type"): (_lower_in("mock", "python", "fast", null=True), "MOCK, PYTHON or FAST"),
    ("checkpoint", "writer", "data_parallel"): (
        _lower_in("replica", "socket", "machine", null=True), "REPLICA, SOCKET or MACHINE"),
    ("torch_autocast", "dtype"): (_dtype, "a type such as bf16, fp16 or fp32"),
    ("torch_autocast", "lower_precision_safe_modules"): (_names, "a list of class names"),
    ("optimizer", "type"): (lambda value: value is None or isinstance(value, str), "a name in quotes"),
    ("autotuning", "results_dir"): (bool, "a folder"),
    ("autotuning", "exps_dir"): (bool, "a folder"),
    ("data_types", "keep_in_fp32_modules"): (
        lambda value: value == "auto" or (isinstance(value, list) and _names(value)), '"auto" or a list of patterns'),
    ("expert_parallel", "load_balance_coeff"): (lambda value: value is None, "null"),
    ("data_efficiency", "data_sampling", "dynamic_batching", "min_batch_size"): (is_whole, "an integer"),
    ("data_efficiency", "data_sampling", "dynamic_batching", "max_batch_size"): (is_whole, "an integer"),
}


@RULES.add
def values_that_are_read_at_once(config: Config) -> Iterator[Problem]:
    """Values outside the checked sections that the parse itself looks at."""
    missing = object()
    for path, (takes, wanted) in VALUES.items():
        value = config.get(*path, default=missing)
        if value is not missing and not takes(value):
            yield refused("bad-value", path, f"expected {wanted}, got {shown(value)}", "correct it")
    size = config.get("vocabulary_size")
    if size and not isinstance(size, (int, float)):
        yield refused("bad-value", ("vocabulary_size",), f"expected an integer, got {shown(size)}", "correct it")


@RULES.add
def bucket_of_the_old_form(config: Config) -> Iterator[Problem]:
    """allgather_size, which becomes allgather_bucket_size where zero_optimization is a bare true."""
    size = config.get("allgather_size", default="auto")
    if config.get("zero_optimization") is True and size != "auto":
        try:
            coerce(node_of(("zero_optimization", "allgather_bucket_size")) or {}, size)
        except ValueError:
            yield refused("bad-value", ("allgather_size",), f"expected an integer >= 0, got {shown(size)}",
                          "correct it")


@RULES.add
def switches_that_are_joined(config: Config) -> Iterator[Problem]:
    """wall_clock_breakdown | flops_profiler.enabled, which Python refuses for texts, null and fractions."""
    for path in (("wall_clock_breakdown",), ("flops_profiler", "enabled")):
        value = config.get(*path, default=False)
        if not isinstance(value, int):
            fix = Fix("put", value.lower() == "true") if str(value).lower() in ("true", "false") else None
            yield refused("bad-value", path, f"expected true or false, got {shown(value)}", "correct it", fix)


@RULES.add
def data_efficiency(config: Config) -> Iterator[Problem]:
    """A curriculum without metrics; batches by tokens without a number of tokens."""
    sampling = ("data_efficiency", "data_sampling")
    curriculum = config.section(*sampling, "curriculum_learning")
    if curriculum.get("enabled") and "curriculum_metrics" not in curriculum:
        yield refused("missing", (*sampling, "curriculum_learning"), "curriculum_metrics is missing", "give it")
    batching = config.section(*sampling, "dynamic_batching")
    if batching.get("enabled") and not is_whole(batching.get("max_tokens")):
        yield refused("missing", (*sampling, "dynamic_batching"), "max_tokens is missing, or no integer", "give it")
