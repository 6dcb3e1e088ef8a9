"""LoRA: weights of low rank are trained beside the frozen model's (Hu et al., arXiv 2106.09685), by peft.

The run's model/ then holds the adapter; with --merge_lora the whole model, and adapter/ the adapter.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.distributed.deepspeed_config import lookup
from trainer.errors import UserError, first_line
from trainer.model import loading
from trainer.options import Options

ALPHA = 2  # times the rank: peft scales what is learnt by alpha / rank
WEIGHTS = "adapter_model.safetensors"


def check(options: Options, ds_config: dict[str, Any] | None) -> None:
    """Raise a UserError for an adapter that can't be trained so."""
    if options.qlora and lookup(ds_config or {}, "zero_optimization.stage") == 3:
        raise UserError("--qlora: ZeRO-3 can't split weights of 4 bits: take trainer/configs/zero1.json, or --lora",
                        exit_code=2, shared=True)


def settle(options: Options) -> Options:
    """Return the options with the rank of the adapter that --adapter names. Raises UserError where it is none."""
    if not options.adapter:
        return options
    from peft import PeftConfig

    name = options.adapter
    if Path(name).is_dir() and not (Path(name) / WEIGHTS).exists():
        raise UserError(f"--adapter {name}: no {WEIGHTS} there (a merged run has it in its adapter/)", shared=True)
    try:
        rank = getattr(PeftConfig.from_pretrained(name), "r", None)
    except Exception as error:  # a file that somebody made up can raise anything
        raise UserError(f"--adapter {name}: {first_line(error)}", shared=True) from None
    if not isinstance(rank, int):
        raise UserError(f"--adapter {name}: not a LoRA adapter", shared=True)
    return replace(options, lora=rank)


def settings(options: Options) -> dict[str, Any]:
    """Return what an adapter is made by, beside its rank: a run that resumes it needs the same."""
    names = ("adapter", "lora_alpha", "lora_targets", "lora_modules_to_save", "dora", "rslora")
    return {f"--{name}": getattr(options, name) for name in names}


def add_adapter(model: Any, options: Options, split: bool, resized: bool = False) -> tuple[Any, float]:
    """Return the model with an adapter of rank --lora at all its linear layers but the head and routers, the rest
    frozen; or with --adapter.

    Experts that are kept as one parameter of three dimensions get one too: of families that peft knows, of others but
    where ZeRO-3 has `split` them, or dropout or DoRA needs layers. Embeddings that were `resized` are trained whole.
    Also return the share of the linear weights that have an adapter. Raises UserError for an architecture that has
    none.
    """
    experts = expert_parameters(model)
    every = sum(numel(module.weight) for module in linear_modules(model).values()) + sum(map(numel, experts.values()))
    try:
        found = with_adapter(model, options, {} if split else experts, resized)
    except (ValueError, NotImplementedError, RuntimeError, KeyError) as error:
        flag = f"--adapter {options.adapter}" if options.adapter else "--lora"
        raise UserError(f"{flag}: {first_line(error)}", shared=True) from None
    for config in found.peft_config.values():  # else it is found from this folder alone
        if os.path.isdir(config.base_model_name_or_path or ""):
            config.base_model_name_or_path = os.path.realpath(config.base_model_name_or_path)
    if options.activation_checkpointing:  # else nothing at the checkpoints' edges asks for gradients
        model.enable_input_require_grads()
    reached = {id(weight): numel(weight) for module in found.modules() if getattr(module, "lora_A", None)
               for weight in [module.get_base_layer().weight if not hasattr(module, "parameter_name") else
                              module.get_param()]}
    return found, min(1.0, sum(reached.values()) / max(every, 1))


def with_adapter(model: Any, options: Options, experts: dict[str, Any], resized: bool) -> Any:
    """Return the model with a new adapter at its linear layers and `experts`, or with the one that --adapter names."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if options.adapter:
        return PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
    rank, spoken = options.lora or 0, loading.language_weights(model)
    odd = sorted(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
                 and (type(module).__name__.endswith("Router") or id(module.weight) not in spoken))
    only_layers = options.lora_targets or options.lora_dropout or options.dora
    names = [] if only_layers else sorted({name.split(".layers.")[-1].split(".", 1)[1] for name in experts})
    whole = [*(options.lora_modules_to_save or ()), *(embedding_names(model) if resized else ())]
    alpha: Any = options.lora_alpha or ALPHA * rank  # a fraction too, whatever its annotation says
    return get_peft_model(model, LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=options.lora_dropout or 0.0,
        target_modules=options.lora_targets or "all-linear", target_parameters=names or None,
        exclude_modules=None if options.lora_targets else odd or None, modules_to_save=whole or None,
        ensure_weight_tying=bool(whole) and is_tied(model), use_dora=options.dora, use_rslora=options.rslora,
        task_type="CAUSAL_LM"))


def is_tied(model: Any) -> bool:
    """Return whether a model's head has the weights of its embeddings."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def embedding_names(model: Any) -> list[str]:
    """Return what a model calls its embeddings, and its head where that has weights of its own."""
    wanted = [model.get_input_embeddings(), *([] if is_tied(model) else [model.get_output_embeddings()])]
    return sorted({name.split(".")[-1] for name, module in model.named_modules()
                   if any(module is each for each in wanted)})


def linear_modules(model: Any) -> dict[str, Any]:
    """Return a model's linear layers but its head, by name."""
    head, spoken = model.get_output_embeddings(), loading.language_weights(model)
    return {name: module for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D", "Linear4bit") and module is not head
            and id(module.weight) in spoken}


def expert_parameters(model: Any) -> dict[str, Any]:
    """Return the weights of experts that are kept together [experts, ...], by name."""
    return {name: weight for name, weight in model.named_parameters()
            if len(getattr(weight, "ds_shape", weight.shape)) == 3 and ".experts" in name}


def active_parameters(model: Any, parameters: int) -> int:
    """Return how many of a model's parameters a token meets: of its experts only those that it is sent to."""
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    idle = sum(numel(weight) * (1 - chosen / getattr(weight, "ds_shape", weight.shape)[0])
               for weight in expert_parameters(model).values()) if chosen else 0
    return int(parameters - idle)


def numel(weight: Any) -> int:
    """Return the numbers of a weight, all ranks' together."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def trained(model: Any) -> int:
    """Return the number of weights that are trained."""
    return sum(numel(weight) for weight in model.parameters() if weight.requires_grad)


def gathered_gigabytes(parameters: int, weight_bytes: int, world_size: int) -> float:
    """Return what ZeRO-3 sends a rank at each micro step: the frozen weights, twice (2 b f P, f = (N - 1) / N)."""
    return 2 * weight_bytes * parameters * (world_size - 1) / world_size / 1e9


def save_adapter(model: Any, folder: Path, state_dict: dict[str, Any] | None) -> None:
    """Write the adapter out of the whole model's state."""
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)


def merged(options: Options, tokenizer: Any, dtype: str, adapter: Path) -> Any:
    """Return the whole model: the base, loaded anew, with the adapter's weights added. For rank 0 alone."""
    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 the base would be loaded in parts
    if options.model_name_or_path == loading.TINY:
        base = loading.build_tiny(tokenizer, options.seed)
    else:
        base = loading.load_model(options, dtype)
        loading.resize(base, options, tokenizer)
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
