"""What transformers' TrainingArguments takes, for --set and --optim: read from its source, since importing it takes
seconds.

    python trainer/train.py --model_name_or_path tiny --set data_seed=7 --set 'lr_scheduler_kwargs={"num_cycles": 2}'
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import usage_error

# Fields that a flag of the trainer's own sets.
FLAGS = {
    "output_dir": "--output_dir", "per_device_train_batch_size": "--per_device_train_batch_size",
    "num_train_epochs": "--num_epochs", "max_steps": "--max_steps", "learning_rate": "--learning_rate",
    "lr_scheduler_type": "--lr_scheduler_type", "warmup_steps": "--warmup_steps", "optim": "--optim",
    "weight_decay": "--weight_decay", "adam_beta1": "--adam_beta1", "adam_beta2": "--adam_beta2",
    "adam_epsilon": "--adam_epsilon", "max_grad_norm": "--max_grad_norm", "bf16": "--precision", "fp16": "--precision",
    "gradient_accumulation_steps": "--gradient_accumulation_steps", "activation_checkpointing":
    "--activation_checkpointing", "gradient_checkpointing": "--activation_checkpointing", "torch_compile":
    "--torch_compile", "use_liger_kernel": "--liger", "neftune_noise_alpha": "--neftune_noise_alpha",
    "logging_steps": "--logging_steps", "report_to": "--report_to", "eval_steps": "--eval_steps",
    "save_steps": "--save_steps", "save_total_limit": "--save_total_limit", "seed": "--seed",
    "dataloader_num_workers": "--dataloader_workers", "deepspeed": "--deepspeed_config",
    "resume_from_checkpoint": "--resume_from_checkpoint", "load_best_model_at_end": "--early_stopping",
}
# Fields that would have no effect here, or break what the trainer promises, by why.
REFUSED = {reason: names.split() for reason, names in {
    "the loss is the trainer's own: of all trained tokens, over all ranks":
        "average_tokens_across_devices label_smoothing_factor label_names",
    "evaluations are the trainer's own: --eval_steps and the other --eval flags":
        "bf16_full_eval fp16_full_eval eval_strategy per_device_eval_batch_size prediction_loss_only eval_on_start "
        "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
        "metric_for_best_model greater_is_better do_train do_eval do_predict",
    "batches and their order are the trainer's own, and resume exactly":
        "auto_find_batch_size accelerator_config dataloader_drop_last dataloader_in_order remove_unused_columns "
        "train_sampling_strategy length_column_name ignore_data_skip",
    "checkpoints are the trainer's own, verified and resumed from: --save_steps":
        "save_only_model save_strategy save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint",
    "what is logged is the trainer's own: --logging_steps, --report_to":
        "logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen "
        "log_level log_level_replica disable_tqdm skip_memory_metrics",
    "how ranks meet is settled by `invoke train`":
        "ddp_backend ddp_timeout ddp_find_unused_parameters fsdp fsdp_config parallelism_config local_rank use_cpu",
    "packed documents stay apart without a cache only": "use_cache",
    "--torch_compile compiles each layer by itself": "torch_compile_backend torch_compile_mode",
    "--liger chooses its kernels by itself": "liger_kernel_config",
    "publish it when it is good: hf upload NAME RUN/model":
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
}.items()}
MUON = "muon"  # DeepSpeed's, which no other engine has
BITSANDBYTES = ("adamw_bnb_8bit", "adamw_8bit", "ademamix", "lion", "paged", "rmsprop_bnb")  # as names begin
# Optimizers that look at whole matrices, or drive the steps themselves: ZeRO hands them flat parts.
WHOLE = ("galore", "apollo", "lomo", "adalomo", "schedule_free", "grokadamw", "stable_adamw")
PACKAGES = {"galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim", "adalomo": "lomo_optim",
            "schedule_free": "schedulefree", "grokadamw": "grokadamw", "stable_adamw": "optimi",
            "adamw_torch_4bit": "torchao", "adamw_torch_8bit": "torchao",
            **dict.fromkeys(BITSANDBYTES, "bitsandbytes")}


def source() -> ast.Module | None:
    """Return the module that has TrainingArguments, parsed; None where transformers isn't installed."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return None
    return ast.parse(Path(found.origin).with_name("training_args.py").read_text(encoding="utf-8"))


def members(name: str) -> dict[str, ast.expr]:
    """Return the annotations of a dataclass's fields, or the values of an enumeration's, by name; {} if unknown."""
    module = source()
    for node in module.body if module else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {part.target.id: part.annotation for part in node.body
                    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)} or {
                    part.targets[0].id: part.value for part in node.body
                    if isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name)}
    return {}


def fields_set(words: Sequence[str]) -> dict[str, Any]:
    """Return the fields that `--set NAME=VALUE`s name, with values of their types.

    Raises UserError for a field that there isn't, that a flag sets, or that would break what the trainer promises.
    """
    known = members("TrainingArguments") if words else {}
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise usage_error(f"--set {word}: NAME=VALUE, like --set data_seed=7")
        if name in FLAGS:
            raise usage_error(f"--set {name}: {FLAGS[name]} is the flag for it")
        for reason, names in REFUSED.items():
            if name in names:
                raise usage_error(f"--set {name}: {reason}")
        if known and name not in known:
            raise usage_error(f"--set {name}: transformers' TrainingArguments has no such field" + nearest(name, known))
        found[name] = typed(name, value, ast.unparse(known[name]) if known else "str")
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ': did you mean X?', or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ""


def typed(name: str, text: str, annotation: str) -> Any:
    """Return a value of a field's type, given as in Python's source. Raises UserError for text that isn't one."""
    parts = {part.partition("[")[0].strip() for part in annotation.split("|")}
    if "None" in parts and text.lower() in ("none", "null"):
        return None
    try:
        if "dict" in parts or ("list" in parts and text.startswith("[")):
            return json.loads(text)
        if "bool" in parts and text.lower() in ("true", "false"):
            return text.lower() == "true"
        for kind, read in (("int", int), ("float", float)):
            if kind in parts:
                return read(text)
    except ValueError:
        pass
    else:
        if parts & {"str", "list"}:
            return text.split(",") if "list" in parts and "str" not in parts else text
    raise usage_error(f"--set {name}={text}: a value of {annotation} is needed")


def check_optimizer(name: str | None) -> None:
    """Raise UserError for an optimizer that transformers doesn't know."""
    if name in (None, MUON):
        return
    known = [ast.literal_eval(value) for value in members("OptimizerNames").values()]
    if known and name not in known:
        raise usage_error(f"--optim {name}: transformers has no such optimizer" + nearest(str(name), [*known, MUON]))


def begins(name: str | None, starts: Iterable[str]) -> str | None:
    """Return which of `starts` a name begins with, None for none of them."""
    return next((start for start in starts if (name or "").startswith(start)), None)


def check_engine(name: str | None, ds_config: dict[str, Any] | None, offloads: bool) -> None:
    """Raise UserError for an optimizer that the engine can't drive; `offloads`: its states are on the host."""
    if name == MUON and ds_config is None:
        raise usage_error("--optim muon is DeepSpeed's: add --deepspeed_config trainer/configs/zero1.json")
    if name is None or ds_config is None:
        return
    if "optimizer" in ds_config:
        raise usage_error(f"--optim {name}: the DeepSpeed config has an optimizer of its own: take that section out "
                          "(trainer/configs/ have none), or drop the flag")
    if begins(name, WHOLE):
        raise usage_error(f"--optim {name} needs whole weights, and DeepSpeed hands its optimizer flat parts: train "
                          "with `torchrun trainer/train.py` and without --deepspeed")
    if offloads and (name == MUON or begins(name, BITSANDBYTES)):
        raise usage_error(f"--optim {name} runs on a GPU, and this config offloads the optimizer to the CPU: take "
                          "trainer/configs/zero1.json or zero2.json")


def package_of(name: str | None) -> str | None:
    """Return the module that an optimizer comes from, None for torch's and transformers' own."""
    start = begins(name, PACKAGES)
    return PACKAGES[start] if start else None
