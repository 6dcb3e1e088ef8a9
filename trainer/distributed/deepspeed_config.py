"""DeepSpeed's configuration and its traps: read the JSON, make it agree with the flags, compile nothing needlessly.

transformers' Trainer fills "auto" from its own arguments and refuses a value that differs from them, so values
that a config does say become the flags' values here, unless the user typed a flag that says otherwise.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.options import Options

# option -> the places in a DeepSpeed config that mean the same
SAME_AS_OPTION = {
    "per_device_train_batch_size": ["train_micro_batch_size_per_gpu"],
    "gradient_accumulation_steps": ["gradient_accumulation_steps"],
    "max_grad_norm": ["gradient_clipping"],
    "learning_rate": ["optimizer.params.lr", "scheduler.params.warmup_max_lr"],
    "weight_decay": ["optimizer.params.weight_decay"],
    "adam_beta1": ["optimizer.params.betas.0"],
    "adam_beta2": ["optimizer.params.betas.1"],
    "adam_epsilon": ["optimizer.params.eps"],
    "warmup_steps": ["scheduler.params.warmup_num_steps"],
    "max_steps": ["scheduler.params.total_num_steps"],
}
# DeepSpeed's schedulers and the --lr_scheduler_type that means the same
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
OF_CONFIG = "config"  # lr_scheduler_type where a DeepSpeed config's scheduler sets the learning rate
# optimizers that DeepSpeed compiles on first use, by the operator's name in torch's extension cache
COMPILED_OPTIMIZERS = {"lion": "lion", "adagrad": "cpu_adagrad", "lamb": "fused_lamb"}

DEEPSPEEDS_OWN = {"bias_correction", "set_grad_none"}  # arguments of its Adam that torch's doesn't take


def read_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed config; raise a UserError with file and line for what isn't strict JSON.

    DeepSpeed's own reader takes comments too, but transformers' does not, and here both read the same.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Presets: {path_list()}", shared=True) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", 1)
        reason = getattr(error, "msg", str(error))
        raise UserError(f"{path}:{line}: not JSON: {reason} (comments and trailing commas aren't allowed)",
                        shared=True) from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a DeepSpeed config is an object {{...}}, not a {type(config).__name__}", shared=True)
    config.pop("$schema", None)  # an editor's, and a path that is wrong in the run folder's copy
    return config


def path_list() -> str:
    """Return the presets' paths for a message."""
    folder = Path(__file__).resolve().parent.parent / "configs"
    return ", ".join(f"trainer/configs/{path.name}" for path in sorted(folder.glob("*.json")))


def lookup(config: dict[str, Any], dotted: str) -> Any:
    """Return the value at `a.b.c` (a number counts in a list), or None where a part is absent."""
    node: Any = config
    for key in dotted.split("."):
        if isinstance(node, list):
            node = node[int(key)] if key.isdecimal() and int(key) < len(node) else None
        else:
            node = node.get(key) if isinstance(node, dict) else None
    return node


def adopt_values(options: Options, config: dict[str, Any], world_size: int) -> Options:
    """Return the options with the config's values for those left open; raise a UserError where the two contradict."""
    for option, places in SAME_AS_OPTION.items():
        where = f"--{option} {getattr(options, option)} was given: drop the flag"
        for place in places:
            value = lookup(config, place)
            if value in (None, "auto"):
                continue
            said = getattr(options, option)
            if said is not None and said != value:
                raise UserError(
                    f"{options.deepspeed}: $.{place} is {value}, but {where}, or write "
                    '"auto" in the config', exit_code=2, shared=True)
            options = replace(options, **{option: value})
            where = f"$.{place} is {value}: give one value"
    total = lookup(config, "scheduler.params.total_num_steps")
    if total not in (None, "auto") and options.num_epochs is not None:
        raise UserError(f"{options.deepspeed}: $.scheduler.params.total_num_steps is {total}, but --num_epochs "
                        f'{options.num_epochs} was given: drop the flag, or write "auto" in the config',
                        exit_code=2, shared=True)
    return adopt_global_batch(adopt_precision(adopt_schedule(options, config), config), config, world_size)


def adopt_schedule(options: Options, config: dict[str, Any]) -> Options:
    """Return the options with the config's scheduler; raise a UserError where --lr_scheduler_type names another."""
    name = lookup(config, "scheduler.type")
    if name is None:
        return options
    if options.lr_scheduler_type not in (None, SCHEDULES.get(name)):
        raise UserError(f"{options.deepspeed}: $.scheduler.type is {name}, but --lr_scheduler_type "
                        f"{options.lr_scheduler_type} was given: drop the flag, or the section in the config",
                        exit_code=2, shared=True)
    return replace(options, lr_scheduler_type=OF_CONFIG)


def adopt_precision(options: Options, config: dict[str, Any]) -> Options:
    """Return the options with the precision that the config enables; raise a UserError for two, or another flag."""
    enabled = [kind for kind in ("bf16", "fp16") if lookup(config, f"{kind}.enabled") is True]
    if len(enabled) == 2:
        raise UserError(f"{options.deepspeed}: fp16 and bf16 are both enabled: keep one", shared=True)
    if enabled and options.precision not in ("auto", enabled[0]):
        raise UserError(f"{options.deepspeed}: $.{enabled[0]}.enabled is true, but --precision {options.precision} "
                        "was given: drop one", exit_code=2, shared=True)
    off = all(lookup(config, f"{kind}.enabled") is False for kind in ("bf16", "fp16"))
    if off and options.precision == "auto":
        return replace(options, precision="fp32")
    return replace(options, precision=enabled[0]) if enabled else options


def adopt_global_batch(options: Options, config: dict[str, Any], world_size: int) -> Options:
    """Return the options with the micro batch or accumulation that a numeric train_batch_size leaves."""
    total = config.get("train_batch_size")
    if total in (None, "auto"):
        return options
    if options.global_batch_size not in (None, total):
        raise UserError(f"{options.deepspeed}: $.train_batch_size is {total}, but --global_batch_size "
                        f'{options.global_batch_size} was given: drop the flag, or write "auto" in the config',
                        exit_code=2, shared=True)
    micro: int | None = options.per_device_train_batch_size
    accumulation: int | None = options.gradient_accumulation_steps
    if micro is None:
        micro = min(8, total // world_size) if accumulation is None else total // (world_size * accumulation)
    if accumulation is None:
        accumulation = total // (world_size * max(micro, 1))
    if total != world_size * micro * accumulation:
        raise UserError(
            f"{options.deepspeed}: $.train_batch_size is {total}, which is not world size {world_size} x micro batch "
            f'{micro} x accumulation {accumulation}: write "auto" there', shared=True)
    return replace(options, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)


def complete_config(config: dict[str, Any], on_cpu: bool) -> list[str]:
    """Fill in what a config leaves out for this trainer; return the names of the operators that will be compiled.

    - Adam and AdamW become torch's own fused ones, which need no compiler. On a CPU they are as fast as DeepSpeed's
      (`python benchmarks/offload_adam.py`), which cost a minute or two of g++ on first use. "torch_adam": false in
      the config asks for DeepSpeed's, and so does an argument that only theirs take.
    - Without an optimizer section the Trainer makes torch's fused AdamW; DeepSpeed refuses to offload that one
      unless told that it's meant.
    - Stage 3 gathers the weights when a model is saved; without that nothing loadable is written.
    """
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if not isinstance(zero, dict):
        zero = config["zero_optimization"] = {"stage": int(zero)}
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if "optimizer" not in config:
        config["zero_force_ds_cpu_optimizer"] = False
        return []
    offloaded = offloads_optimizer(config)
    name = str(config["optimizer"].get("type", "")).lower()
    if name in ("adam", "adamw"):
        params = config["optimizer"].setdefault("params", {})
        if params.setdefault("torch_adam", not DEEPSPEEDS_OWN & params.keys()):
            params.setdefault("fused", True)
            return []
        return ["cpu_adam"] if offloaded else ["fused_adam"]
    compiled = name in COMPILED_OPTIMIZERS and (offloaded or on_cpu or name != "adagrad")
    return [COMPILED_OPTIMIZERS[name]] if compiled else []


def send_gradients_in_bf16(config: dict[str, Any], precision: str) -> None:
    """Have ZeRO-0 in 32 bits send gradients in bf16, half the bytes, unless the config says otherwise.

    bf16 has 8 bits of precision; gradients of 8 bits cost 0.01 % of loss (a Llama of 0.41 million weights, two hosts).
    """
    if precision == "fp32" and not lookup(config, "zero_optimization.stage"):
        config.setdefault("communication_data_type", "bf16")


def set_environment(on_cpu: bool, offloads: bool, local_world_size: int) -> None:
    """Set what DeepSpeed and accelerate read from the environment; call it before they are imported.

    Where the CPU computes, all of it or (`offloads`) the optimizer's steps, each rank gets its share of the cores.

    The environment's own bin folder goes first on PATH, since a non-login shell hides ninja. A node whose GPU
    driver is broken must fail, not train on its CPU in silence, so the accelerator is named.
    """
    import torch

    here = str(Path(sys.executable).parent)
    if here not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = here + os.pathsep + os.environ.get("PATH", "")
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if on_cpu or offloads:
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_world_size)))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def skip_shared_memory_operator() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives, which it does at every first start on a CPU."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def adopt_process_group() -> None:
    """Have DeepSpeed take torch's process group as its own: ZeRO-3 counts ranks before its engine is there."""
    import deepspeed

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def offloads_optimizer(ds_config: dict[str, Any] | None) -> bool:
    """Return whether a config keeps the optimizer's states on the host or its disk."""
    config = ds_config or {}
    return lookup(config, "zero_optimization.offload_optimizer.device") in ("cpu", "nvme") or \
        lookup(config, "zero_optimization.cpu_offload") is True


def engine_name(ds_config: dict[str, Any] | None) -> str:
    """Return what trains: 'DeepSpeed ZeRO-2', ... or 'PyTorch'."""
    if ds_config is None:
        return "PyTorch"
    stage = lookup(ds_config, "zero_optimization.stage") or 0
    return f"DeepSpeed ZeRO-{stage}"


def keep_gradient_norm(engine: Any) -> None:
    """Have an engine without ZeRO in 32 bits tell its gradients' norm, which DeepSpeed 0.19.8 computes and forgets."""
    from deepspeed.runtime.utils import clip_grad_norm_

    if engine.zero_optimization_stage() or engine.bfloat16_enabled() or engine.fp16_enabled():
        return

    def clip() -> None:
        engine._global_grad_norm = clip_grad_norm_(
            parameters=engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu)

    engine.clip_fp32_gradients = clip
