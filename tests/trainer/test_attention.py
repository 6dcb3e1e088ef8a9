"""Attention by documents: the same numbers and gradients as the usual way, and given up where they aren't the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Train

from trainer.model import document_attention
from trainer.options import parse_options

VOCABULARY = 100
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                         "num_attention_heads": 4}


def model_of(name: str, **more: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1))
    if name == "opt":  # tells no positions
        return transformers.OPTForCausalLM(transformers.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=64))
    config, kind = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
                    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM)}[name]
    return kind(config(**SHAPE, **more))


ROWS = torch.randint(0, VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.stack([torch.cat([torch.arange(part) for part in parts])
                         for parts in ((32,), (5, 1, 26), (10, 10, 12))])


def loss_and_gradients(model: Any) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ROWS, position_ids=POSITIONS, labels=ROWS, use_cache=False).loss
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(("name", "more"), [
    ("llama", {"num_key_value_heads": 4}), ("llama", {"num_key_value_heads": 2}), ("gpt2", {})])
def test_numbers_and_gradients_are_the_usual_ones(name: str, more: dict[str, Any]) -> None:
    model = model_of(name, **more).eval()
    expected, gradients = loss_and_gradients(model)
    document_attention.set_attention(model, document_attention.NAME)
    found, others = loss_and_gradients(model)
    assert found == pytest.approx(expected, abs=1e-6)
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    with document_attention.original_attention(model):
        assert model.config._attn_implementation == document_attention.USUAL
    assert model.config._attn_implementation == document_attention.NAME


@pytest.mark.parametrize(("name", "more", "kept"), [
    ("llama", {}, True), ("gpt2", {}, True), ("opt", {}, False),
    ("mistral", {"sliding_window": 4, "num_key_value_heads": 2}, False)])
def test_it_is_given_up_where_it_is_not_the_same(name: str, more: dict[str, Any], kept: bool) -> None:
    model = model_of(name, **more).eval()

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return found

    document_attention.set_attention(model, document_attention.NAME)
    document_attention.fall_back_unless_equal(model, logits, VOCABULARY, "cpu")
    assert model.config._attn_implementation == (document_attention.NAME if kept else document_attention.USUAL)


def test_where_it_is_tried() -> None:
    options = parse_options(["--model_name_or_path", "x"])
    model = model_of("mistral", sliding_window=64)
    assert document_attention.can_use_varlen(model, options, "cpu", 64)
    assert not document_attention.can_use_varlen(model, options, "cpu", 65)
    assert not document_attention.can_use_varlen(model, options, "cuda", 64)
    asked = parse_options(["--model_name_or_path", "x", "--attn_implementation", "eager"])
    assert not document_attention.can_use_varlen(model, asked, "cpu", 64)


def test_a_training_learns_the_same_and_saves_a_usual_model(train: Train) -> None:
    words = ("--max_steps", "3", "--sequence_length", "64", "--lr_scheduler_type", "constant")
    ours = train(*words)
    original_attention = train(*words, "--attn_implementation", "sdpa", model="tiny", name="usual")
    assert ours.losses() == pytest.approx(original_attention.losses(), abs=1e-5)
    assert "documents" not in (ours.path / "model" / "config.json").read_text()
