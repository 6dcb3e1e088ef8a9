"""The shape of a model before it is built: from its configuration, or counted on torch's meta device."""

from __future__ import annotations

from typing import Any

import torch

from trainer.estimate.shape import Shape, of_config, tiny
from trainer.model import lora


def shape_of(config: Any, vocabulary: int | None = None) -> Shape | None:
    """Return the shape that a configuration of transformers describes (None: of tiny), None where it can't be told.

    `vocabulary`: of the tokenizer, where that decides.
    """
    if config is None:
        return tiny(vocabulary)
    described = config.to_dict() | ({"vocab_size": vocabulary} if vocabulary else {})
    try:
        return of_config(described) or of_model(config)
    except (ValueError, AttributeError, TypeError, RuntimeError, ImportError):
        return None


def of_model(config: Any) -> Shape:
    """Return the shape of the model that a configuration of transformers makes; no weights are made.

    Raises ValueError, AttributeError, TypeError, RuntimeError or ImportError for one that can't be built so.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    parameters, heads = model.num_parameters(), getattr(text, "num_attention_heads", None) or 1  # or it has a state
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    inner = max(inner) if isinstance(inner, list) else inner
    if chosen := getattr(text, "num_experts_per_tok", None):
        inner = chosen * (getattr(text, "moe_intermediate_size", None) or inner)
    linear = sum(sum(module.weight.shape) for module in lora.linear_modules(model).values())
    linear += sum(weight.shape[0] * sum(weight.shape[1:]) for weight in lora.expert_parameters(model).values())
    return Shape(parameters, lora.active_parameters(model, parameters), linear, text.num_hidden_layers,
                 text.hidden_size, inner, heads, getattr(text, "num_key_value_heads", None) or heads,
                 getattr(text, "head_dim", None) or text.hidden_size // heads, text.vocab_size,
                 bool(model.config.tie_word_embeddings), getattr(text, "max_position_embeddings", None))
