"""--from_config: a model with random weights in the shape of a configuration, for a tokenizer trained on the data."""

from __future__ import annotations

import json
from typing import Any

from trainer.errors import UserError, first_line, is_out_of_memory
from trainer.model.loading import with_attention
from trainer.options import Options

# What a configuration works out from other values, and keeps: another value makes it wrong.
DERIVED = {"layer_types": {"num_hidden_layers"}, "head_dim": {"hidden_size", "num_attention_heads"}}


def overridden(config: Any, text: str) -> Any:
    """Return a configuration with other values, `text` being K=V,... Raises UserError for what it doesn't take."""
    values, wanted = config.to_dict(), {}
    for word in text.split(","):
        key, equals, value = map(str.strip, word.partition("="))
        key = (config.attribute_map or {}).get(key, key)
        if not equals or key not in values:
            raise UserError(f"--config_overrides {word}: KEY=VALUE, a key that this configuration has, like "
                            f"{', '.join(sorted(name for name in values if 'hidden' in name or 'n_' in name)[:3])}",
                            shared=True)
        try:
            wanted[key] = json.loads(value)
        except ValueError:
            wanted[key] = value
    for name, hangs_on in DERIVED.items():
        if name not in wanted and hangs_on & wanted.keys():
            values.pop(name, None)
    try:
        return type(config).from_dict({**values, **wanted})
    except Exception as error:  # each class has its own way to refuse
        raise UserError(f"--config_overrides {text}: {first_line(error)}", shared=True) from None


def build_model(options: Options, config: Any, tokenizer: Any, dtype: str, flash: bool = False) -> Any:
    """Return a model with random weights in the shape of `config`, its vocabulary the tokenizer's.

    `flash`: flash attention may be tried. The weights hang on the seed alone; under ZeRO-3 each rank keeps its part.
    Raises UserError for a shape that can't be.
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    text = config.get_text_config()
    text.vocab_size = max(len(tokenizer), text.vocab_size if options.measure else 0)  # as wide as it will be
    for part in {id(config): config, id(text): text}.values():
        part.bos_token_id, part.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        part.pad_token_id = tokenizer.pad_token_id

    def build(attention: str | None) -> Any:
        set_seed(options.seed)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention,
                                                trust_remote_code=options.trust_remote_code)

    try:
        return with_attention(options, flash, dtype, build)
    except Exception as error:  # a shape that can't be shows in many ways
        if is_out_of_memory(error):
            raise
        raise UserError(f"model '{options.model_name_or_path}': {first_line(error)}", shared=True) from None
