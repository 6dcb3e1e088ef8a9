"""What llama.cpp must know of a model, by family: its figures, the names of its tensors, how they differ there.

Keys are GGUF's (github.com/ggml-org/ggml/blob/master/docs/gguf.md); the tensors' names come from gguf's table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    import torch

CONVERTER = "convert_hf_to_gguf.py of github.com/ggml-org/llama.cpp"
GEMMA3_PERIOD, GEMMA3_LOCAL_BASE = 6, 10_000.0  # llama.cpp has both fixed: every sixth layer sees all tokens
HEADS_OF_27B = {"gemma2": 46, "gemma3": 62}  # layers of the sizes whose attention llama.cpp scales by hidden / heads


@dataclass(frozen=True)
class Family:
    """`arch`: llama.cpp's name. `pairs`: its RoPE turns neighbouring rows of q and k, where transformers turns halves.
    `adds_one`: its norms scale by the weight, where transformers scales by 1 + weight.
    """

    arch: str
    pairs: bool = False
    adds_one: bool = False


FAMILIES = {"llama": Family("llama", pairs=True), "mistral": Family("llama", pairs=True),
            "qwen2": Family("qwen2"), "qwen3": Family("qwen3"), "gemma": Family("gemma", adds_one=True),
            "gemma2": Family("gemma2", adds_one=True), "gemma3_text": Family("gemma3", adds_one=True)}


def family_named(model_type: str) -> Family:
    """Return a family by config.json's name for it. Raises UserError for one that can't be written here."""
    if model_type not in FAMILIES:
        raise refused(f"its architecture, {model_type}, is none of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def family_of(config: Any) -> Family:
    """Return a model's family. Raises UserError for one, or a form of one, that can't be written here."""
    family = family_named(config.model_type)
    if why := why_not(config, family):
        raise refused(why)
    return family


def refused(why: str) -> UserError:
    """Return the error for a model that can't be written, which says what can."""
    return UserError(f"lanspeed can't write this model as GGUF: {why}; {CONVERTER} knows more: python "
                     "convert_hf_to_gguf.py FOLDER, of an adapter the one that --to merged writes")


def why_not(config: Any, family: Family) -> str | None:
    """Return what of a model llama.cpp does in another way, None for nothing."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != ("gelu_pytorch_tanh" if family.adds_one else "silu"):
        return f"its activation is {activation}"
    if family.arch == "qwen2" and head_size(config) * config.num_attention_heads != config.hidden_size:
        return f"its heads have {head_size(config)} numbers, not {config.hidden_size} / {config.num_attention_heads}"
    if (kind := rope(config).get("rope_type", "default")) not in ("default", "linear", "yarn", "llama3"):
        return f"its positions are scaled by {kind}"
    scale = getattr(config, "query_pre_attn_scalar", None)
    large = config.num_hidden_layers == HEADS_OF_27B.get(family.arch)
    expected = config.hidden_size // config.num_attention_heads if large else head_size(config)
    if family.arch in HEADS_OF_27B and scale is not None and scale != expected:
        return f"query_pre_attn_scalar is {scale}, and llama.cpp takes {expected}"
    if family.arch == "gemma3":
        local = (config.rope_parameters or {}).get("sliding_attention") or {}
        if local.get("rope_theta", GEMMA3_LOCAL_BASE) != GEMMA3_LOCAL_BASE:
            return f"its local rope_theta is {local['rope_theta']}"
        wanted = ["full_attention" if (layer + 1) % GEMMA3_PERIOD == 0 else "sliding_attention"
                  for layer in range(config.num_hidden_layers)]
        if list(config.layer_types) != wanted:
            return "not every sixth of its layers, and only those, sees all tokens"
    return None


def rope(config: Any) -> dict[str, Any]:
    """Return how positions are turned, where layers differ, in those that see all tokens."""
    found = config.rope_parameters or {}
    return dict(found.get("full_attention", found))


def head_size(config: Any) -> int:
    """Return the numbers of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def notes(config: Any) -> Iterator[str]:
    """Yield what the file can't say, and a user should know."""
    window = getattr(config, "sliding_window", None)
    slides = config.model_type == "mistral" or getattr(config, "use_sliding_window", False)
    if window and slides and window < config.max_position_embeddings:
        yield f"llama.cpp lets every token see all before it; this model was made for the last {window:,}"


def add_figures(writer: Any, config: Any, rows: int) -> None:
    """Write the model's figures; `rows`: of its embedding."""
    size = head_size(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(rows)
    add_positions(writer, config)
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
        for value, add in ((getattr(config, "attn_logit_softcapping", None), writer.add_attn_logit_softcapping),
                           (getattr(config, "final_logit_softcapping", None), writer.add_final_logit_softcapping)):
            if value:
                add(value)


def add_positions(writer: Any, config: Any) -> None:
    """Write how positions are turned."""
    from gguf import RopeScalingType

    turned = rope(config)
    writer.add_rope_freq_base(float(turned.get("rope_theta", 10_000.0)))
    if turned.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(turned["factor"]))
    elif turned.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(turned["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(turned.get("original_max_position_embeddings")
                                                 or config.max_position_embeddings / turned["factor"]))


def frequency_factors(config: Any) -> torch.Tensor | None:
    """Return by what llama3's scaling divides each frequency [head / 2], None for another scaling.

    transformers computes the scaled frequencies; without scaling they are theta ** (-2 i / head).
    """
    turned = rope(config)
    if turned.get("rope_type") != "llama3":
        return None
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    plain = torch.exp(torch.arange(0, size, 2).float() * (-math.log(turned["rope_theta"]) / size))
    return plain / scaled.float()


def tensors(model: Any, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a whole model's weights by their names in GGUF. Raises UserError for one that has none there."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.config
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    assert isinstance(arch, MODEL_ARCH)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight
    for name, weight in model.state_dict().items():
        if is_tied and name == "lm_head.weight":
            continue
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise UserError(f"GGUF has no name for {name} of this model: {CONVERTER} may know it")
        yield there, turned_weight(weight, there, config, family)
    if (factors := frequency_factors(config)) is not None:
        yield "rope_freqs.weight", factors


def turned_weight(weight: torch.Tensor, name: str, config: Any, family: Family) -> torch.Tensor:
    """Return a weight as llama.cpp wants it."""
    if family.adds_one and name.endswith("norm.weight"):
        return weight.float() + 1
    if family.pairs and ".attn_q." in name:
        return paired(weight, config.num_attention_heads)
    if family.pairs and ".attn_k." in name:
        return paired(weight, config.num_key_value_heads)
    return weight


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows of heads, [heads * size, ...], with row i of a head beside row i + size / 2."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
