"""ZeRO: stages, offload, and the settings that need one or the other. Sources are in DeepSpeed 0.19.8."""

from __future__ import annotations

from collections.abc import Iterator

from master.ds_config.problem import INIT, STEP, Config, Fix, Problem, Rules
from master.ds_config.schema import node_of

RULES = Rules()
ZERO = "zero_optimization"
OFFLOADS = ("offload_optimizer", "offload_param")
# Where a setting is read at all (runtime/zero/stage3.py, stage_1_and_2.py).
STAGE_3 = {"sub_group_size", "memory_efficient_linear", "zero_hpz_partition_size", "zero_quantized_weights",
           "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
           "stage3_gather_fp16_weights_on_model_save"}
STAGE_1_AND_2 = {"allgather_bucket_size", "round_robin_gradients", "use_multi_rank_bucket_allreduce"}
NVME_ONLY = {"nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write", "fast_init"}


def needs(code: str, path: tuple[str, ...], message: str, how_to_fix: str) -> Problem:
    """Return an error of deepspeed.initialize."""
    return Problem(code, "error", path, message, how_to_fix, INIT)


@RULES.add
def bare_boolean(config: Config) -> Iterator[Problem]:
    """zero_optimization: true, which only DeepSpeed takes."""
    if isinstance(config.get(ZERO), bool):
        fails = config.for_trainer and not config.target.completed
        yield Problem("old-form", "error" if fails else "warning", (ZERO,), "true or false is the old form of stage "
                      f"{config.stage}" + (", which the Trainer can't read" if fails else ""),
                      f'write {{"stage": {config.stage}}}', INIT if fails else "",
                      None if "allgather_size" in config.root else Fix("put", {"stage": config.stage}))


@RULES.add
def renamed_keys(config: Config) -> Iterator[Problem]:
    """Old names that DeepSpeed still takes."""
    zero = config.section(ZERO)
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if old in zero and new not in zero:
            what = f'"{new}": {{"device": "cpu"}}'
            yield Problem("renamed", "info", (ZERO, old), f"the old form of {what}", "write that" if
                          config.on(ZERO, old) else "take it out",
                          fix=Fix("replace", (new, {"device": "cpu"})) if config.on(ZERO, old) else Fix("remove"))
    if "cpu_offload_use_pin_memory" in zero:
        yield Problem("renamed", "info", (ZERO, "cpu_offload_use_pin_memory"), "ignored: pin_memory stands in "
                      "offload_optimizer and offload_param", "take it out", fix=Fix("remove"))
    old, new = "stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"
    if old in zero and new not in zero and new[7:] not in zero:
        yield Problem("renamed", "info", (ZERO, old), f"the old name of {new}", "rename it", fix=Fix("rename", new))


@RULES.add
def null_for_the_trainer(config: Config) -> Iterator[Problem]:
    """offload_optimizer: null, whose device Accelerate asks for where the program makes the optimizer."""
    if config.for_trainer and config.get(ZERO, "offload_optimizer", default={}) is None \
            and not config.has("optimizer"):
        yield Problem("bad-value", "error", (ZERO, "offload_optimizer"), "the Trainer can't read null here",
                      "take it out", INIT, Fix("remove"))


@RULES.add
def offload_without_its_stage(config: Config) -> Iterator[Problem]:
    """offload_param below stage 3, offload_optimizer at stage 0, nvme below stage 3."""
    for section, key in (("offload_param", "offload_param"), ("offload_param", "cpu_offload_param")):
        on = config.get(ZERO, key, "device") in ("cpu", "nvme") if key == section else config.on(ZERO, key)
        if on and config.stage < 3:
            yield Problem("wrong-stage", "warning", (ZERO, key), "weights are offloaded at stage 3 only; at stage "
                          f"{config.stage} they stay on the GPU", "set stage 3, or take it out")
    if config.device("offload_optimizer") != "none" and config.stage == 0:
        yield Problem("wrong-stage", "warning", (ZERO, "offload_optimizer"), "nothing is offloaded at stage 0, only "
                      "the optimizer becomes DeepSpeed's CPU one", "set stage 1, or take it out")
    if config.device("offload_optimizer") == "nvme" and config.stage in (1, 2):
        yield Problem("wrong-stage", "warning", (ZERO, "offload_optimizer", "device"), "nvme works at stage 3 only; at "
                      f"stage {config.stage} it is cpu", "write cpu, or set stage 3")


@RULES.add
def nvme(config: Config) -> Iterator[Problem]:
    """NVMe without a path, with a path that isn't one, and settings of NVMe without NVMe."""
    for section in OFFLOADS:
        place, device = config.get(ZERO, section, "nvme_path"), config.device(section)
        if device == "nvme" and config.stage == 3 and (not isinstance(place, str) or place in ("", "auto", "none")):
            yield needs("missing", (ZERO, section, "nvme_path"), "device nvme needs nvme_path",
                        "give a folder on a local drive of every host")
        elif isinstance(place, str) and (place.startswith("~") or (device == "nvme" and not place.startswith("/"))):
            wrong = "~ is not expanded" if place.startswith("~") else "not an absolute path"
            yield Problem("bad-value", "warning", (ZERO, section, "nvme_path"), f"{wrong}: a folder of that name is "
                          "made where the training was started", "write the whole path")
        for key in sorted(NVME_ONLY & set(config.section(ZERO, section))):
            if device != "nvme" and config.get(ZERO, section, key) not in (None, False):
                yield Problem("no-effect", "info", (ZERO, section, key), "only used with device nvme", "take it out")
    if config.has("aio") and all(config.device(section) != "nvme" for section in OFFLOADS):
        yield Problem("no-effect", "info", ("aio",), "only used with NVMe offload", "take it out")


@RULES.add
def settings_of_other_stages(config: Config) -> Iterator[Problem]:
    """Settings that this stage doesn't read, and those that no stage reads."""
    for key in config.section(ZERO):
        name = (node_of((ZERO, key)) or {}).get("x-same-as", key)
        if (node_of((ZERO, key)) or {}).get("x-inert"):
            yield Problem("no-effect", "info", (ZERO, key), "nothing reads it in DeepSpeed 0.19", "take it out")
        elif "gather_16bit" in name and _whole_number(config.get("tensor_parallel", "autotp_size")) > 1:
            continue  # AutoTP gathers by the same switch at any stage (accelerate, get_state_dict)
        elif (name.startswith("stage3_") or name in STAGE_3) and config.stage != 3:
            yield Problem("wrong-stage", "info", (ZERO, key), f"used only at stage 3 (the stage is {config.stage})",
                          "take it out")
        elif name in STAGE_1_AND_2 and config.stage not in (1, 2):
            yield Problem("wrong-stage", "info", (ZERO, key),
                          f"used only at stages 1 and 2 (the stage is {config.stage})", "take it out")
    for section in ("pipeline",):
        for key in config.section(section):
            if (node_of((section, key)) or {}).get("x-inert"):
                yield Problem("no-effect", "info", (section, key), "nothing reads it in DeepSpeed 0.19", "take it out")
    if config.has("disable_allgather"):
        yield Problem("no-effect", "info", ("disable_allgather",), "nothing uses it in DeepSpeed 0.19", "take it out")
    if config.has("allgather_size") and not isinstance(config.get(ZERO), bool):
        yield Problem("no-effect", "warning", ("allgather_size",), "read only where zero_optimization is true or "
                      "false", "write zero_optimization.allgather_bucket_size")


def _whole_number(value: object) -> int:
    return value if isinstance(value, int) else 0


@RULES.add
def scaling_of_gradients(config: Config) -> Iterator[Problem]:
    """prescale_gradients and gradient_predivide_factor (stage_1_and_2.py, stage3.py: asserted with reduce_scatter)."""
    scatters = config.get(ZERO, "reduce_scatter", default=True) in (True, 1, "auto", "true")
    if config.stage not in (2, 3) or not scatters or str(config.get("gradient_allreduce_op")).lower() == "sum":
        return
    factor = config.get("gradient_predivide_factor", default=1.0)
    if factor != 1.0 and isinstance(factor, (int, float)):
        yield needs("scatter-scaling", ("gradient_predivide_factor",), "not with ZeRO stage 2 or 3 and reduce_scatter",
                    "take it out, or set reduce_scatter to false")
    if config.on("prescale_gradients"):
        yield needs("scatter-scaling", ("prescale_gradients",), "not with ZeRO stage 2 or 3 and reduce_scatter",
                    "take it out, or set reduce_scatter to false")


@RULES.add
def buckets(config: Config) -> Iterator[Problem]:
    """An odd all-gather bucket (stage_1_and_2.py: multiples of 2)."""
    size = config.get(ZERO, "allgather_bucket_size", default=0)
    if config.stage in (1, 2) and isinstance(size, (int, float)) and size % 2:
        yield needs("bad-value", (ZERO, "allgather_bucket_size"), f"{size:g} is odd", "write an even number")


@RULES.add
def gradient_norm(config: Config) -> Iterator[Problem]:
    """compute_grad_norm: false beside something that needs the norm (stage_1_and_2.py:212)."""
    if config.get(ZERO, "compute_grad_norm", default=True) is not False or config.stage not in (1, 2):
        return
    if config.get("gradient_clipping", default=1.0) != 0:
        yield needs("needs-norm", (ZERO, "compute_grad_norm"), "false needs gradient_clipping 0 (left out it is 1.0)",
                    "set gradient_clipping to 0")
    sixteen = config.on("bf16", "enabled") and config.get("data_types", "grad_accum_dtype") in ("fp32", "float32")
    if sixteen and config.stage == 1:
        yield needs("needs-norm", (ZERO, "compute_grad_norm"), "false does not go with bf16, fp32 gradients and "
                    "stage 1", "take it out, or set stage 2")
    if config.device("offload_optimizer") != "none" or config.get(ZERO, "zenflow"):
        yield needs("needs-norm", (ZERO, "compute_grad_norm"), "false does not go with offload or ZenFlow",
                    "take it out")


@RULES.add
def what_needs_cpu_offload(config: Config) -> Iterator[Problem]:
    """ZenFlow, super_offload and 16-bit masters (zenflow_stage_1_and_2.py, superoffload_stage3.py, :331)."""
    offloaded = config.device("offload_optimizer")
    if isinstance(config.get(ZERO, "zenflow"), dict) and config.stage == 0:
        yield Problem("wrong-stage", "error", (ZERO, "zenflow"), "needs ZeRO stage 1, 2 or 3", "set the stage", STEP)
    elif isinstance(config.get(ZERO, "zenflow"), dict) and offloaded != "cpu":
        yield needs("needs-offload", (ZERO, "zenflow"), "needs offload_optimizer with device cpu",
                    'add "offload_optimizer": {"device": "cpu"}')
    if config.on(ZERO, "offload_optimizer", "super_offload") and (config.stage != 3 or offloaded != "cpu"):
        yield Problem("no-effect", "warning", (ZERO, "offload_optimizer", "super_offload"),
                      "works at stage 3 with device cpu only", "set both, or take it out")
    torchs = config.get("optimizer", "params", "torch_adam") is True
    ratio = config.get(ZERO, "offload_optimizer", "ratio", default=1.0)
    if torchs and config.stage == 3 and isinstance(ratio, (int, float)) and ratio < 1 and offloaded != "none":
        yield needs("needs-cpu-adam", (ZERO, "offload_optimizer", "ratio"), "below 1 needs DeepSpeed's CPU Adam",
                    "set torch_adam to false")
    for path in (("fp16", "fp16_master_weights_and_grads"), ("bf16", "bf16_master_weights_and_grads")):
        if config.on(*path) and config.stage and offloaded != "none" and torchs:
            yield needs("needs-cpu-adam", path, "needs DeepSpeed's CPU Adam", "set torch_adam to false")
        if config.on(*path) and config.stage and offloaded == "none" and not (
                path[0] == "bf16" and config.on("bf16", "bf16_optimizer_states")):  # then all stays on the GPU
            yield needs("needs-offload", path, "needs offload_optimizer and DeepSpeed's CPU Adam",
                        'add "offload_optimizer": {"device": "cpu"}')


@RULES.add
def accumulation_by_hand(config: Config) -> Iterator[Problem]:
    """managed_gradient_accumulation: false with overlap_comm below stage 2, or DeepCompile (engine.py)."""
    if config.get("managed_gradient_accumulation", default=True) is False and config.on("compile", "deepcompile"):
        yield needs("bad-combination", ("managed_gradient_accumulation",), "false does not go with DeepCompile",
                    "switch one off")
    if config.get("managed_gradient_accumulation", default=True) is False and config.stage < 2 \
            and config.on(ZERO, "overlap_comm"):
        yield needs("bad-combination", ("managed_gradient_accumulation",), "false with overlap_comm needs ZeRO stage 2",
                    "set overlap_comm to false")


@RULES.add
def gone(config: Config) -> Iterator[Problem]:
    """Switches of things that DeepSpeed lost."""
    if config.on(ZERO, "legacy_stage1"):
        yield needs("gone", (ZERO, "legacy_stage1"), "the old stage 1 is gone", "take it out")
    if config.on(ZERO, "elastic_checkpoint") and config.stage == 3:
        yield Problem("gone", "warning", (ZERO, "elastic_checkpoint"), "at stage 3 saving fails with it",
                      "take it out; checkpoint.load_universal reads checkpoints of other numbers of ranks")


@RULES.add
def saving_at_stage_3(config: Config) -> Iterator[Problem]:
    """Weights that nobody gathers."""
    names = ("stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save",
             "stage3_gather_fp16_weights_on_model_save")
    if config.stage == 3 and not any(config.on(ZERO, name) or config.get(ZERO, name) == "auto" for name in names):
        at = next(((ZERO, name) for name in names if config.has(ZERO, name)), (ZERO,))
        yield Problem("not-gathered", "info", at, "at stage 3 a saved model has no weights unless they are gathered",
                      f"set {names[0]} to true (trainer/train.py does)")


