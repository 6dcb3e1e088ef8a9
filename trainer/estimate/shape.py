"""The shape of a model by its configuration alone: how many weights, where, and how wide its layers are.

`of_config` counts the families that are trained most as transformers builds them, in microseconds and without it; for
others it returns None, and `python trainer/model_shape.py M` builds the model on torch's meta device instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model's weights and what its layers are made of.

    `parameters`: all weights; `active`: those that a token meets (of experts those that it is sent to); `linear`: rows
    plus columns of the layers' linear weights, all added up: an adapter of rank r has r times as many weights;
    `intermediate`: of all the experts of a token together; `positions`: the most tokens of a sequence, None unlimited.
    """

    parameters: float
    active: float
    linear: float
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    positions: int | None = None

    @property
    def embedding(self) -> int:
        """Weights of the input embedding that no product uses; 0 where the head shares them."""
        return 0 if self.tied else self.vocabulary * self.hidden

    def adapter(self, rank: int) -> float:
        """Return the weights of a LoRA adapter at all linear layers (arXiv 2106.09685, section 4.1)."""
        return rank * self.linear


@dataclass(frozen=True)
class Family:
    """How transformers 5 builds a family, where its configuration doesn't say.

    `qkv_bias`, `out_bias`, `mlp_bias`: of its linear layers; `gated`: three products a layer instead of two; `norms`: a
    layer, each with a bias if `norm_bias`; `head_norm`: of queries and keys, for each head or over all of them; `tied`:
    the head shares the embedding; `head_size`: numbers of a head.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    norms: int = 2
    norm_bias: bool = False
    head_norm: str = ""
    tied: bool = False
    head_size: int | None = None
    learned_positions: bool = False


BIASED = Family(qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, norm_bias=True)
FAMILIES: dict[str, Family] = {
    "llama": Family(), "mistral": Family(), "mixtral": Family(), "granite": Family(), "phi3": Family(),
    "arcee": Family(gated=False), "helium": Family(), "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norm="head", head_size=128), "qwen3_moe": Family(head_norm="head"),
    "smollm3": Family(tied=True), "olmo2": Family(head_norm="all"), "cohere": Family(norms=1, tied=True),
    "gemma": Family(tied=True, head_size=256), "gemma2": Family(norms=4, tied=True, head_size=256),
    "gemma3_text": Family(norms=4, head_norm="head", tied=True, head_size=256),
    "starcoder2": Family(**{**vars(BIASED), "tied": True}), "gpt_neox": BIASED,
    "gpt2": Family(**{**vars(BIASED), "tied": True, "learned_positions": True}),
}
GPT2_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
              "max_position_embeddings": "n_positions", "intermediate_size": "n_inner"}

# Chosen by what a minute on two cores teaches: fewer weights and more steps beat a bigger model.
TINY_SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
TINY_VOCABULARY = 2048


def tiny(vocabulary: int | None = None) -> Shape:
    """Return the shape of the built-in model."""
    return counted(FAMILIES["llama"], {"model_type": "llama", "vocab_size": vocabulary or TINY_VOCABULARY,
                                       **TINY_SHAPE})


def of_config(config: Mapping[str, Any]) -> Shape | None:
    """Return the shape that a config.json describes, None for a family or a form of it that isn't counted here."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or config.get("quantization_config"):
        return None
    try:
        return counted(family, {**config, **{ours: config[theirs] for ours, theirs in GPT2_NAMES.items()
                                             if theirs in config}})
    except (KeyError, TypeError, ValueError, ArithmeticError):  # what it leaves out isn't the same in all versions
        return None


def counted(family: Family, config: Mapping[str, Any]) -> Shape:
    """Return the shape of a family's configuration; raise KeyError for one that leaves out a width."""
    hidden, layers, heads = (int(config[name]) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    vocabulary, positions = int(config["vocab_size"]), config.get("max_position_embeddings")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or family.head_size or hidden // heads)
    queries, keys = heads * size, kv_heads * size
    inner, products = int(config.get("intermediate_size") or 4 * hidden), 3 if family.gated else 2
    chosen, routed = experts(config)
    bias = bool(config.get("attention_bias"))
    with_bias = {"qkv": family.qkv_bias or bias, "out": family.out_bias or bias,
                 "mlp": family.mlp_bias or bool(config.get("mlp_bias"))}
    attention = hidden * (2 * queries + 2 * keys) + with_bias["qkv"] * (queries + 2 * keys) + with_bias["out"] * hidden
    if routed:
        inner = int(config.get("moe_intermediate_size") or inner)
    one_mlp = products * hidden * inner + with_bias["mlp"] * ((products - 1) * inner + hidden)
    norms = family.norms * hidden * (2 if family.norm_bias else 1)
    norms += {"": 0, "head": 2 * size, "all": queries + keys}[family.head_norm]
    ends = vocabulary * hidden + hidden * (2 if family.norm_bias else 1)
    ends += int(positions) * hidden if family.learned_positions else 0  # type: ignore[arg-type]
    tied = bool(config.get("tie_word_embeddings", family.tied))
    ends += 0 if tied else vocabulary * hidden
    router = hidden * routed
    everything = layers * (attention + (routed or 1) * one_mlp + router + norms) + ends
    idle = layers * (routed - chosen) * one_mlp if routed else 0
    rows = attention_rows(str(config["model_type"]), hidden, queries, keys)
    fused = routed or config["model_type"] == "phi3"  # the two products that are gated are one
    rows += (routed or 1) * (2 * hidden + 3 * inner if fused else products * (hidden + inner))
    return Shape(everything, everything - idle, layers * rows, layers, hidden, inner * (chosen if routed else 1), heads,
                 kv_heads, size, vocabulary, tied, positions and int(positions))


def experts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many experts a token is sent to, and how many a layer has; (0, 0) without any.

    Raises KeyError where only some layers have them.
    """
    routed = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    if routed and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise KeyError("experts in some layers")
    return (int(config["num_experts_per_tok"]), routed) if routed else (0, 0)


def attention_rows(kind: str, hidden: int, queries: int, keys: int) -> int:
    """Return rows plus columns of a layer's attention; some families make queries, keys and values in one product."""
    fused = kind in ("gpt2", "gpt_neox", "phi3")
    return (hidden + queries + 2 * keys if fused else 3 * hidden + queries + 2 * keys) + queries + hidden


def of_numbers(parameters: float, layers: int, hidden: int, vocabulary: int, intermediate: int | None = None) -> Shape:
    """Return the shape of a Llama of so many parameters.

    Without `intermediate` it is what the other numbers leave for it: P = L (4 h^2 + 3 h i) + 2 V h.
    """
    left = (parameters - 2 * vocabulary * hidden) / layers - 4 * hidden**2
    inner = intermediate or max(hidden, round(left / (3 * hidden)))
    heads = max(1, hidden // 128)
    return Shape(parameters, parameters, layers * (4 * 2 * hidden + 3 * (hidden + inner)), layers, hidden, inner, heads,
                 heads, hidden // heads, vocabulary, False)
