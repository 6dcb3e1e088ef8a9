"""The arguments of transformers' Trainer, the loggers beside metrics.jsonl, faster kernels."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Any

from transformers import TrainingArguments

from trainer.distributed import deepspeed_config
from trainer.errors import UserError, first_line
from trainer.flags.transformers_fields import BITSANDBYTES, MUON, begins, package_of
from trainer.options import Options
from trainer.results.setup import Setup

NEVER = 10**9
LOGGING_STEPS = 10
# What a flag needs beside what is always installed, by the name of the module.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "liger": "liger_kernel",
            "qlora": "bitsandbytes"}
# What pip calls a module that it has under another name.
INSTALLED_AS = {"liger_kernel": "liger-kernel", "galore_torch": "galore-torch", "apollo_torch": "apollo-torch",
                "lomo_optim": "lomo-optim", "optimi": "torch-optimi"}


def training_arguments(setup: Setup, kind: type[TrainingArguments] = TrainingArguments, **more: Any
                       ) -> TrainingArguments:
    """Return the Trainer's arguments, of a `kind` that takes `more`.

    Raises UserError for one that transformers refuses, or a config that differs.
    """
    o, path = setup.options, setup.run.path
    if o.report_to:
        place_loggers(path)
    by_config = o.lr_scheduler_type == deepspeed_config.OF_CONFIG
    more |= {"metric_for_best_model": "eval_loss", "greater_is_better": False,
             "restore_callback_states_from_checkpoint": True} if o.early_stopping else {}
    more |= {"optim": o.optim} if o.optim not in (None, MUON) else {}
    try:
        made = kind(**{**dict(
            output_dir=str(setup.run.checkpoints), num_train_epochs=o.num_epochs, max_steps=o.max_steps,
            per_device_train_batch_size=o.per_device_train_batch_size,
            per_device_eval_batch_size=o.per_device_train_batch_size,
            gradient_accumulation_steps=o.gradient_accumulation_steps, learning_rate=o.learning_rate,
            lr_scheduler_type="constant" if by_config else o.lr_scheduler_type, warmup_steps=o.warmup_steps,
            weight_decay=o.weight_decay, adam_beta1=o.adam_beta1, adam_beta2=o.adam_beta2,
            adam_epsilon=o.adam_epsilon, max_grad_norm=o.max_grad_norm, bf16=setup.precision == "bf16",
            fp16=setup.precision == "fp16", activation_checkpointing=o.activation_checkpointing,
            seed=o.seed, use_cpu=setup.device == "cpu", logging_steps=o.logging_steps or LOGGING_STEPS,
            logging_first_step=True, logging_nan_inf_filter=False,
            eval_strategy="steps" if setup.evaluates else "no", eval_steps=o.eval_steps or NEVER,
            eval_on_start=setup.evaluates and not setup.resume_step, save_steps=o.save_steps or NEVER,
            save_strategy="no" if o.measure else "steps",
            save_on_each_node=not setup.shared_disk, report_to=o.report_to or "none", run_name=path.name,
            ignore_data_skip=o.streaming, project="lanspeed", disable_tqdm=True, remove_unused_columns=False,
            dataloader_num_workers=dataloader_workers(o, setup.device), dataloader_pin_memory=setup.device != "cpu",
            neftune_noise_alpha=o.neftune_noise_alpha, ddp_find_unused_parameters=False, deepspeed=setup.ds_config,
            log_level="error", log_level_replica="error"), **more, **o.set_fields})
    except (ValueError, TypeError) as error:
        raise UserError(first_line(error), exit_code=2, shared=True) from None
    if setup.ds_config is not None and (differ := made.hf_deepspeed_config.mismatches):
        raise UserError(f"{o.deepspeed}: differs from what the trainer does: {'; '.join(differ)}: write \"auto\" there",
                        shared=True)
    return made


def dataloader_workers(options: Options, device: str) -> int:
    """Return how many processes make a rank's batches: on a GPU the next ones are made while it computes."""
    if options.dataloader_workers is not None:
        return options.dataloader_workers
    return 0 if device == "cpu" or options.streaming else 2


def check_packages(options: Options, is_first: bool) -> None:
    """Raise a UserError for a package that a flag needs and that isn't there; only the first rank logs."""
    wanted = [(f"--report_to {name}", name) for name in options.report_to if is_first]
    wanted += [(f"--{name}", name) for name in ("liger", "qlora") if getattr(options, name)]
    modules = [(flag, PACKAGES[name]) for flag, name in wanted]
    if module := package_of(options.optim):
        modules.append((f"--optim {options.optim}", module))
    for flag, module in modules:
        if find_spec(module) is None:
            raise UserError(f"{flag}: not installed here: pip install {INSTALLED_AS.get(module, module)}")


def check_optimizer(options: Options, device: str) -> None:
    """Raise a UserError for bitsandbytes' optimizers on a CPU."""
    if device == "cpu" and begins(options.optim, BITSANDBYTES):
        raise UserError(f"--optim {options.optim} runs on a GPU, and this training is on CPUs: leave it out",
                        shared=True)


def place_loggers(path: Any) -> None:
    """Have the loggers write below the run folder, and name the project, unless the environment says otherwise."""
    for name, value in (("TENSORBOARD_LOGGING_DIR", f"{path}/tensorboard"), ("WANDB_DIR", str(path)),
                        ("TRACKIO_DIR", f"{path}/trackio"), ("WANDB_PROJECT", "lanspeed")):
        os.environ.setdefault(name, value)


def check_compiler(options: Options, device: str) -> None:
    """Raise a UserError for what is compiled on a CPU without a C++ compiler: --torch_compile, Muon."""
    flag = "--torch_compile" if options.torch_compile else "--optim muon" if options.optim == MUON else None
    if flag and device == "cpu" and not (shutil.which("c++") or shutil.which("g++")):
        raise UserError(f"{flag} on a CPU needs a C++ compiler: install g++, or leave the flag out", shared=True)
