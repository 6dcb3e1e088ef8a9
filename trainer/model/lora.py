"""LoRA: weights of low rank are trained beside the frozen model's (Hu et al., arXiv 2106.09685), by peft.

The run's model/ then holds the adapter; with --merge_lora the whole model, and adapter/ the adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.distributed.deepspeed_config import lookup
from trainer.errors import UserError, first_line
from trainer.model import loading
from trainer.options import Options

ALPHA = 2  # times the rank: peft scales what is learnt by alpha / rank


def check(options: Options, ds_config: dict[str, Any] | None) -> None:
    """Raise a UserError for an adapter that can't be trained so."""
    if options.qlora and lookup(ds_config or {}, "zero_optimization.stage") == 3:
        raise UserError("--qlora: ZeRO-3 can't split weights of 4 bits: take trainer/configs/zero1.json, or --lora",
                        exit_code=2, shared=True)


def add_adapter(model: Any, options: Options) -> Any:
    """Return the model with an adapter of rank --lora at all its linear layers but the head, all else frozen.

    Raises UserError for an architecture that has none.
    """
    from peft import LoraConfig, get_peft_model

    rank = options.lora or 0
    try:
        found = get_peft_model(model, LoraConfig(
            r=rank, lora_alpha=ALPHA * rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"--lora: {first_line(error)}", shared=True) from None
    if options.activation_checkpointing:  # else nothing at the checkpoints' edges asks for gradients
        model.enable_input_require_grads()
    return found


def trained(model: Any) -> int:
    """Return the number of weights that are trained."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def gathered_gigabytes(parameters: int, weight_bytes: int, world_size: int) -> float:
    """Return what ZeRO-3 sends a rank at each micro step: the frozen weights, twice (2 b f P, f = (N - 1) / N)."""
    return 2 * weight_bytes * parameters * (world_size - 1) / world_size / 1e9


def save_adapter(model: Any, folder: Path, state_dict: dict[str, Any]) -> None:
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
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
