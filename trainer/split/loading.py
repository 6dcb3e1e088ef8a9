"""A stage's weights, read from the model's files: those of other stages aren't, nor ever in memory."""

from __future__ import annotations

from typing import Any

from trainer.errors import UserError, first_line, is_out_of_memory
from trainer.model import loading
from trainer.options import Options
from trainer.split.stage import Cut, leave_out, stage_class, stage_config


def load_stage(options: Options, config: Any, cut: Cut, in_tuple: bool, dtype: str, tokenizer: Any) -> Any:
    """Return a model with the layers of a stage alone; `in_tuple`: its layers return tuples. Raises UserError."""
    import torch

    if config is None:  # tiny, which is made from a seed
        made = loading.build_tiny(tokenizer, options.seed).to(getattr(torch, dtype))
        leave_out(made, cut)
        return made
    name = options.model_name_or_path
    try:
        return stage_class(config, cut, in_tuple).from_pretrained(
            name, config=stage_config(config, cut), dtype=getattr(torch, dtype),
            attn_implementation=options.attn_implementation, use_safetensors=True)
    except Exception as error:  # a file that somebody made up can raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"model '{name}': {first_line(error)}") from None
