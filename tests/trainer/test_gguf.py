"""GGUF files: llama.cpp finds the same tokens and computes the same odds as transformers does from the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SHAPE
from llama_cpp import ask_llama_cpp
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trainer.data.tokenizer import own_tokenizer
from trainer.errors import UserError
from trainer.export.gguf_file import difference, write_gguf
from trainer.export.vocabulary import PATTERNS, read_vocabulary
from trainer.model.trained import TrainedModel

TEXTS = ["Hello world", "  two  spaces\n\n\tand a tab ", "don't we'LL I'm 1234 3.14", "Grüße, мир! 日本 🙂", "a",
         "x=[1,2]; {y}", "ends with space ", "\n\n", "THE END's"]
WORDS = ["the quick brown fox jumps over the lazy dog and the end", "Hello world, don't we know 1234 of the things?",
         "Grüße aus der Welt", "two  spaces and\n\nlines"] * 8
HEADS = SHAPE | {"head_dim": 16, "max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
# family and what its config says beside the shape
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}), "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    "yarn": ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                           "original_max_position_embeddings": 64}}),
    "mistral": ("mistral", {"sliding_window": None}), "qwen2": ("qwen2", {"hidden_size": 64}), "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "sliding_window": 64, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"sliding_window": 64, "query_pre_attn_scalar": 16, "num_hidden_layers": 6})}
BYTES = own_tokenizer(WORDS, vocabulary=400)


def pieces(prefix: bool) -> Any:
    """A tokenizer like SentencePiece's: pieces of characters, bytes for what it hasn't seen."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = [normalizers.Replace(" ", "\u2581")]
    made.normalizer = normalizers.Sequence([*([normalizers.Prepend("\u2581")] if prefix else []), *spaces])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    made = Tokenizer.from_str(json.dumps(all_merges(json.loads(made.to_str()))))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def all_merges(described: dict[str, Any]) -> dict[str, Any]:
    """With every way to join a piece, as in tokenizers that come from SentencePiece."""
    model = described["model"]
    order = {"".join(merge): rank for rank, merge in reversed(list(enumerate(model["merges"])))}
    model["merges"] = [[piece[:cut], piece[cut:]] for piece, _ in sorted(order.items(), key=lambda each: each[1])
                       for cut in range(1, len(piece))
                       if piece[:cut] in model["vocab"] and piece[cut:] in model["vocab"]]
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["content"].startswith("<0x")]
    return described


def cut_by(pattern: str, whole_first: bool) -> Any:
    made = Tokenizer(models.BPE(ignore_merges=whole_first))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(WORDS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def digits_apart() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.train_from_iterator(WORDS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def model_of(family: str, tokenizer: Any, **shape: Any) -> TrainedModel:
    torch.manual_seed(1)
    size = HEADS | {"tie_word_embeddings": False, "vocab_size": len(tokenizer)} | shape
    config = AutoConfig.for_model(family, bos_token_id=0, eos_token_id=1, pad_token_id=1, **size)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # norms and biases that say something
            if weight.dim() == 1:
                weight += 0.3 * torch.randn(weight.shape)
            elif "embed" not in name:
                weight *= 8
    return TrainedModel(model, tokenizer, has_adapter=False)


def assert_same_odds(file: Path, trained: TrainedModel, within: float) -> None:
    rows = trained.model.config.vocab_size
    prompts = [[(7 * step + 3) % (rows - 4) + 2 for step in range(length)] for length in (2, 9, 50)]
    for prompt, odds in zip(prompts, ask_llama_cpp(file, prompts=prompts)["odds"], strict=True):
        with torch.inference_mode():
            ours = trained.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        theirs = torch.tensor([odds[str(token)] for token in range(rows)])
        assert ours.max() - ours.min() > 0.5  # a model that says something
        assert (ours - theirs).abs().max() < within


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(kind: str, tmp_path: Path) -> None:
    family, shape = KINDS[kind]
    trained = model_of(family, BYTES, **shape)
    write_gguf(tmp_path / "m.gguf", trained, "m", "f32")
    assert_same_odds(tmp_path / "m.gguf", trained, within=0.02)


@pytest.mark.parametrize(("kind", "within"), [("f16", 0.05), ("bf16", 0.3), ("q8_0", 0.5)])
def test_each_type_is_as_near_as_its_precision(kind: str, within: float, tmp_path: Path) -> None:
    trained = model_of("llama", BYTES)
    write_gguf(tmp_path / "m.gguf", trained, "m", kind)
    assert_same_odds(tmp_path / "m.gguf", trained, within)
    assert "the likeliest token is the same at" in difference(tmp_path / "m.gguf", trained)


@pytest.mark.parametrize("tokenizer", [
    pytest.param(BYTES, id="tiny"), pytest.param(digits_apart(), id="smollm"),
    pytest.param(pieces(True), id="pieces with a space before"), pytest.param(pieces(False), id="pieces without"),
    *(pytest.param(cut_by(pattern, name != "qwen2"), id=name) for pattern, name in PATTERNS.items())])
def test_llama_cpp_finds_the_same_tokens(tokenizer: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model_of("llama", tokenizer), "m", "f16")
    assert ask_llama_cpp(tmp_path / "m.gguf", texts=TEXTS)["tokens"] == [tokenizer(text).input_ids for text in TEXTS]


def test_llama_cpp_writes_a_conversation_by_the_same_template(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
             {"role": "user", "content": "Why"}]
    write_gguf(tmp_path / "m.gguf", model_of("llama", BYTES), "m", "f16")
    wanted = BYTES.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert BYTES.bos_token + ask_llama_cpp(tmp_path / "m.gguf", turns=turns)["conversation"] == wanted


@pytest.mark.parametrize(("family", "shape", "why"), [
    ("gpt2", {}, "its architecture, gpt2, is none of"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaled by dynamic"),
    ("qwen2", {}, "its heads have 16 numbers"),
    ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99"),
    ("gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 2}, "not every sixth")])
def test_what_it_does_otherwise_is_refused(family: str, shape: dict[str, Any], why: str, tmp_path: Path) -> None:
    trained = model_of(family, BYTES, **shape)
    with pytest.raises(UserError, match=why):
        write_gguf(tmp_path / "m.gguf", trained, "m", "f32")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused() -> None:
    with pytest.raises(UserError, match="cuts text in a way that llama"):
        read_vocabulary(cut_by(r"\p{L}+|\s+|.", False), 400)
    with pytest.raises(UserError, match="ignore_merges"):
        read_vocabulary(cut_by(next(iter(PATTERNS)), True), 400)
    with pytest.raises(UserError, match="rows for 10"):
        read_vocabulary(BYTES, 10)


def test_a_number_that_float16_cannot_hold_is_told(tmp_path: Path) -> None:
    trained = model_of("llama", BYTES)
    with torch.no_grad():
        trained.model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(UserError, match="--type bf16"):
        write_gguf(tmp_path / "m.gguf", trained, "m", "f16")
    assert list(tmp_path.iterdir()) == []
