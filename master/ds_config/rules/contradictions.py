"""What DeepSpeedConfig refuses because two settings contradict each other, or a setting and the ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from master.ds_config.problem import Config, Fix, Problem, Rules, shown
from master.ds_config.rules.parse import is_whole, refused
from master.ds_config.schema import node_of

RULES = Rules()


@RULES.add
def two_precisions(config: Config) -> Iterator[Problem]:
    """fp16 and bf16 together."""
    name = "bf16" if config.get("bf16") is not None else "bfloat16"
    if config.on("fp16", "enabled") and config.on(name, "enabled"):
        yield refused("fp16-and-bf16", (name, "enabled"), "fp16 and bf16 are both on", "switch one off")


@RULES.add
def loss_scale(config: Config) -> Iterator[Problem]:
    """What the fp16 section checks beyond types."""
    fp16 = {key: value for key, value in config.section("fp16").items() if value != "auto"}  # which is dropped
    for key in ("loss_scale", "loss_scale_window", "min_loss_scale"):
        value = fp16.get(key, 1)
        if isinstance(value, bool):
            yield refused("bad-value", ("fp16", key), f"expected a number, got {shown(value)}", "write a number")
        elif value in (float("inf"), float("-inf")) or (isinstance(value, float) and value != value):
            yield refused("bad-value", ("fp16", key), "expected a finite number", "write one")
    for key in ("loss_scale_window", "min_loss_scale"):
        if not is_whole(fp16.get(key, 1)):
            yield refused("bad-value", ("fp16", key), f"expected an integer, got {shown(fp16[key])}", "correct it")
    if config.on("fp16", "enabled") and _as_number(fp16.get("loss_scale", 0)) == 0:
        for key in ("loss_scale_window", "min_loss_scale"):
            if _as_number(fp16.get(key, 1)) <= 0:
                yield refused("bad-value", ("fp16", key), "must be above 0 for a dynamic loss scale", "write 1 or more")


def _as_number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return 1.0


@RULES.add
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


@RULES.add
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


@RULES.add
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


@RULES.add
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
