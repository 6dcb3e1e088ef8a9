"""What DeepSpeedConfig refuses beyond its checked sections: wrong kinds of values, contradictions, batch arithmetic.

Read in deepspeed/runtime/config.py, release 0.19.8; the tests put generated configs to both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from master.ds_problem import PARSE, Config, Fix, Problem, Rule, shown
from master.ds_schema import coerce, node_of

RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Enter a rule in this file's table."""
    RULES.append(function)
    return function


def refused(code: str, path: tuple[str, ...], message: str, mend: str, fix: Fix | None = None) -> Problem:
    """Return an error of the parse."""
    return Problem(code, "error", path, message, mend, PARSE, fix)


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


@rule
def sections_are_objects(config: Config) -> Iterator[Problem]:
    """A section that is null, true or a text."""
    for path, takes in SECTIONS.items():
        value = config.get(*path, default={})
        if not isinstance(value, dict) and not takes(value):
            yield refused("not-a-section", path, f"expected an object {{...}}, got {shown(value)}",
                          "take it out" if value in (None, False) else "write an object",
                          Fix("remove") if value in (None, False) else None)
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


def _whole(value: Any) -> bool:
    """Tell whether Python's int() takes it."""
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
    ("data_efficiency", "data_sampling", "dynamic_batching", "min_batch_size"): (_whole, "an integer"),
    ("data_efficiency", "data_sampling", "dynamic_batching", "max_batch_size"): (_whole, "an integer"),
}


@rule
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


@rule
def bucket_of_the_old_form(config: Config) -> Iterator[Problem]:
    """allgather_size, which becomes allgather_bucket_size where zero_optimization is a bare true."""
    size = config.get("allgather_size", default="auto")
    if config.get("zero_optimization") is True and size != "auto":
        try:
            coerce(node_of(("zero_optimization", "allgather_bucket_size")) or {}, size)
        except ValueError:
            yield refused("bad-value", ("allgather_size",), f"expected an integer >= 0, got {shown(size)}",
                          "correct it")


@rule
def switches_that_are_joined(config: Config) -> Iterator[Problem]:
    """wall_clock_breakdown | flops_profiler.enabled, which Python refuses for texts, null and fractions."""
    for path in (("wall_clock_breakdown",), ("flops_profiler", "enabled")):
        value = config.get(*path, default=False)
        if not isinstance(value, int):
            fix = Fix("put", value.lower() == "true") if str(value).lower() in ("true", "false") else None
            yield refused("bad-value", path, f"expected true or false, got {shown(value)}", "correct it", fix)


@rule
def data_efficiency(config: Config) -> Iterator[Problem]:
    """A curriculum without metrics; batches by tokens without a number of tokens."""
    sampling = ("data_efficiency", "data_sampling")
    curriculum = config.section(*sampling, "curriculum_learning")
    if curriculum.get("enabled") and "curriculum_metrics" not in curriculum:
        yield refused("missing", (*sampling, "curriculum_learning"), "curriculum_metrics is missing", "give it")
    batching = config.section(*sampling, "dynamic_batching")
    if batching.get("enabled") and not _whole(batching.get("max_tokens")):
        yield refused("missing", (*sampling, "dynamic_batching"), "max_tokens is missing, or no integer", "give it")


# -- contradictions ----------------------------------------------------------------------------------------------------


@rule
def two_precisions(config: Config) -> Iterator[Problem]:
    """fp16 and bf16 together."""
    name = "bf16" if config.get("bf16") is not None else "bfloat16"
    if config.on("fp16", "enabled") and config.on(name, "enabled"):
        yield refused("fp16-and-bf16", (name, "enabled"), "fp16 and bf16 are both on", "switch one off")


@rule
def loss_scale(config: Config) -> Iterator[Problem]:
    """What the fp16 section checks beyond types."""
    fp16 = config.section("fp16")
    for key in ("loss_scale", "loss_scale_window", "min_loss_scale"):
        value = fp16.get(key, 1)
        if isinstance(value, bool):
            yield refused("bad-value", ("fp16", key), f"expected a number, got {shown(value)}", "write a number")
        elif value in (float("inf"), float("-inf")) or (isinstance(value, float) and value != value):
            yield refused("bad-value", ("fp16", key), "expected a finite number", "write one")
    for key in ("loss_scale_window", "min_loss_scale"):
        if not _whole(fp16.get(key, 1)) and fp16[key] != "auto":
            yield refused("bad-value", ("fp16", key), f"expected an integer, got {shown(fp16[key])}", "correct it")
    if config.on("fp16", "enabled") and _as_number(fp16.get("loss_scale", 0)) == 0:
        for key in ("loss_scale_window", "min_loss_scale"):
            if _as_number(fp16.get(key, 1)) <= 0:
                yield refused("bad-value", ("fp16", key), "must be above 0 for a dynamic loss scale", "write 1 or more")


def _as_number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 1.0


@rule
def sum_of_gradients(config: Config) -> Iterator[Problem]:
    """gradient_allreduce_op sum where something divides by the ranks on its own."""
    if str(config.get("gradient_allreduce_op")).lower() != "sum":
        return
    zenflow = config.get("zero_optimization", "zenflow")
    against = [name for name, there in (("ZeRO stage 3", config.stage == 3),
                                        ("ZenFlow", zenflow is not None and zenflow != "auto"),
                                        ("DeepCompile", config.on("compile", "deepcompile"))) if there]
    for name in against:
        yield refused("sum-unsupported", ("gradient_allreduce_op",), f"sum does not go with {name}", "write mean")


@rule
def sixteen_bit_masters(config: Config) -> Iterator[Problem]:
    """16-bit master weights without ZeRO; 16-bit moments without such weights."""
    bf16 = "bf16" if config.get("bf16") is not None else "bfloat16"
    for path in (("fp16", "fp16_master_weights_and_grads"), (bf16, "bf16_master_weights_and_grads"),
                 (bf16, "bf16_optimizer_states")):
        if config.on(*path) and config.stage == 0:
            yield refused("needs-zero", path, "works with ZeRO stage 1 to 3 only", "set zero_optimization.stage")
    if config.on(bf16, "bf16_optimizer_states") and not config.on(bf16, "bf16_master_weights_and_grads"):
        yield refused("needs-masters", (bf16, "bf16_optimizer_states"),
                      "needs bf16_master_weights_and_grads", "switch that on too")


@rule
def two_names_of_one_key(config: Config) -> Iterator[Problem]:
    """stage3_x beside x, cpu_offload beside offload_optimizer: DeepSpeed takes one of them."""
    zero = config.section("zero_optimization")
    given = {key for key, value in zero.items() if value != "auto"}
    pairs = {"cpu_offload": ("offload_optimizer",), "cpu_offload_param": ("offload_param",),
             "stage3_gather_fp16_weights_on_model_save": ("stage3_gather_16bit_weights_on_model_save",
                                                          "gather_16bit_weights_on_model_save")}
    for old, new in pairs.items():
        if old in given and given & set(new):
            yield refused("two-names", ("zero_optimization", old), f"given together with {new[0]}, which replaces it",
                          "take it out", Fix("remove"))
    for section in ("zero_optimization", "tensor_parallel"):
        for key, value in config.section(section).items():
            other = (node_of((section, key)) or {}).get("x-same-as")
            if other and config.section(section).get(other, "auto") != "auto" and value != "auto":
                yield refused("two-names", (section, key), f"given together with {other}, which is the same",
                              "take one out")


@rule
def at_another_stage(config: Config) -> Iterator[Problem]:
    """Settings that the ZeRO section refuses at this stage."""
    ratio = config.get("zero_optimization", "offload_optimizer", "ratio")
    if isinstance(ratio, (int, float)) and 0 <= ratio < 1 and config.stage != 3:
        yield refused("wrong-stage", ("zero_optimization", "offload_optimizer", "ratio"),
                      f"below 1 at stage 3 only, and the stage is {config.stage}", "take it out")
    off = config.get("zero_optimization", "compute_grad_norm", default=True)
    if not config.on("zero_optimization", "compute_grad_norm") and off is not True and off != "auto" \
            and config.stage not in (1, 2):
        yield refused("wrong-stage", ("zero_optimization", "compute_grad_norm"),
                      f"false at stages 1 and 2 only, and the stage is {config.stage}", "take it out")
