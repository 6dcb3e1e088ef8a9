"""Small shapes of the model families that people train, and what the trainer does with each.

    python tests/families.py         prints the table that docs/trainer.md has
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 300
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADS = SHAPE | {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "bamba": SHAPE | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
                      "mamba_chunk_size": 16, "attn_layer_indices": [1]},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "deepseek_v3": SHAPE | EXPERTS | {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        "num_key_value_heads": 4},
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gemma2": HEADS | {"sliding_window": 16}, "gemma3_text": HEADS | {"sliding_window": 16},
    "gpt2": GPT, "gpt_neox": SHAPE | {"num_key_value_heads": None}, "granite": SHAPE,
    "llama4_text": HEADS | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64,
                            "attention_chunk_size": 16},
    "mamba2": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16, "num_heads": 4,
               "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "mistral": SHAPE | {"sliding_window": 8}, "mixtral": SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": SHAPE,
    "opt": {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "phi3": SHAPE, "qwen2": SHAPE, "qwen3": HEADS,
    "qwen3_moe": HEADS | EXPERTS | {"num_experts": 4, "decoder_sparse_step": 1},
}
STATE = "no: it carries a state across documents"
# How packed documents are kept apart, for the families in which it isn't by their positions.
OTHERWISE = {"bamba": STATE, "mamba2": STATE, "bloom": "no: its positions are counted along the whole sequence",
             "falcon": "by a mask (with `alibi` no)", "opt": "by a mask"}


def config(name: str) -> dict[str, Any]:
    """Return a family's configuration as config.json has it."""
    import transformers

    made: dict[str, Any] = transformers.AutoConfig.for_model(name, bos_token_id=0, eos_token_id=1, pad_token_id=1,
                                                             **SHAPES[name]).to_dict()
    return made


def table() -> str:
    """Return the table of docs/trainer.md."""
    rows = [f"| {name} | {OTHERWISE.get(name, 'by positions')} |" for name in sorted(SHAPES)]
    return "\n".join(["| family (`model_type`) | documents packed |", "|---|---|", *rows])


if __name__ == "__main__":
    print(table())
