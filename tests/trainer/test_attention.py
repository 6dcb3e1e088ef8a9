"""Attention by documents: the same numbers and gradients as the usual way, and given up where they aren't the same."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import Train

from trainer.model import document_attention
from trainer.options import parse_options
from trainer.sequences.packing import varlen_bounds

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


def loss_and_gradients(model: Any, **bounds: Any) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ROWS, position_ids=POSITIONS, labels=ROWS, use_cache=False, **bounds).loss
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(("name", "more"), [
    ("llama", {"num_key_value_heads": 4}), ("llama", {"num_key_value_heads": 2}), ("gpt2", {})])
def test_numbers_and_gradients_are_the_usual_ones(name: str, more: dict[str, Any]) -> None:
    model = model_of(name, **more).eval()
    expected, gradients = loss_and_gradients(model)
    model.set_attn_implementation(document_attention.DOCUMENTS)
    found, others = loss_and_gradients(model)
    assert found == pytest.approx(expected, abs=1e-6)
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    with document_attention.original_attention(model):
        assert model.config._attn_implementation == document_attention.USUAL
    assert model.config._attn_implementation == document_attention.DOCUMENTS


@pytest.fixture
def torch_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's varlen attention, which needs a GPU, computed document by document."""
    from torch.nn.attention import varlen

    def varlen_attn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
                    cu_seq_k: torch.Tensor, max_q: int, max_k: int, *, scale: float | None = None,
                    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False) -> torch.Tensor:
        ends = cu_seq_q.tolist()
        assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k) and ends[-1] == len(query) == len(key)
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert max_q == max_k >= max(end - start for start, end in pairwise(ends))
        parts = []
        for start, end in pairwise(ends):
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
            seen = (distance >= -window_size[1]) & ((window_size[0] < 0) | (distance <= window_size[0]))
            q, k, v = (each[None, start:end].transpose(1, 2) for each in (query, key, value))
            parts.append(torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa).transpose(1, 2)[0])
        return torch.cat(parts)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


@pytest.mark.usefixtures("torch_kernel")
@pytest.mark.parametrize(("name", "more"), [
    ("llama", {"num_key_value_heads": 4}), ("llama", {"num_key_value_heads": 2}), ("gpt2", {}),
    ("mistral", {"sliding_window": 4, "num_key_value_heads": 2})])
def test_the_varlen_kernel_is_given_what_makes_the_usual_numbers(name: str, more: dict[str, Any]) -> None:
    model = model_of(name, **more).eval()
    expected, gradients = loss_and_gradients(model)
    model.set_attn_implementation(document_attention.VARLEN)
    found, others = loss_and_gradients(model, **varlen_bounds(POSITIONS))
    assert found == pytest.approx(expected, abs=1e-6)
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.usefixtures("torch_kernel")
def test_a_model_that_passes_no_bounds_or_wants_more_is_told_so() -> None:
    states = torch.ones(1, 2, 4, 8)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    for more in ({}, {"cu_seq_lens_q": bounds, "softcap": 30.0}, {"cu_seq_lens_q": bounds, "dropout": 0.1}):
        with pytest.raises(ValueError, match="varlen attention"):
            document_attention.attend_varlen(torch.nn.Module(), states, states, states, None, **more)  # type: ignore[arg-type]


def test_older_torches_get_what_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    given: dict[str, Any] = {}

    def of_2_10(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
                cu_seq_k: torch.Tensor, max_q: int, max_k: int, is_causal: bool = False) -> torch.Tensor:
        given.update(query=query, key=key, causal=is_causal)
        return query

    monkeypatch.setattr(varlen, "varlen_attn", of_2_10)
    query, key = torch.ones(6, 4, 16), torch.ones(6, 2, 16)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    document_attention.varlen_kernel(query, key, key, bounds, 6, 0.5, None)
    assert given["causal"] and given["key"].shape == (6, 4, 16)
    assert given["query"][0, 0, 0] == 0.5 * 16 ** 0.5  # times the kernel's own 16 ** -0.5 it is the scale
    with pytest.raises(ValueError, match="windows"):
        document_attention.varlen_kernel(query, key, key, bounds, 6, None, 3)


@pytest.mark.parametrize(("name", "more", "kept"), [
    ("llama", {}, True), ("gpt2", {}, True), ("opt", {}, False),
    ("mistral", {"sliding_window": 4, "num_key_value_heads": 2}, False)])
def test_it_is_given_up_where_it_is_not_the_same(name: str, more: dict[str, Any], kept: bool) -> None:
    model = model_of(name, **more).eval()

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return found

    model.set_attn_implementation(document_attention.DOCUMENTS)
    document_attention.fall_back_unless_equal(model, model.set_attn_implementation, logits, VOCABULARY, "cpu", "fp32")
    assert model.config._attn_implementation == (document_attention.DOCUMENTS if kept else document_attention.USUAL)


def test_where_it_is_tried() -> None:
    options = parse_options(["--model_name_or_path", "x"])
    model = model_of("mistral", sliding_window=64)
    assert document_attention.choose(model, options, "cpu", "fp32", False, 64) == document_attention.DOCUMENTS
    assert document_attention.choose(model, options, "cpu", "fp32", False, 65) is None
    asked = parse_options(["--model_name_or_path", "x", "--attn_implementation", "eager"])
    assert document_attention.choose(model, asked, "cpu", "fp32", False, 64) is None


@pytest.mark.parametrize(("device", "precision", "modern", "words", "runs", "expected"), [
    ("cuda", "bf16", True, [], True, "varlen"), ("cuda", "fp16", True, [], True, "varlen"),
    ("cuda", "bf16", True, [], False, None),  # the kernel fails on this card
    ("cuda", "fp16", False, [], True, None), ("cuda", "fp32", True, [], True, None),
    ("xpu", "bf16", True, [], True, None),
    ("cuda", "bf16", True, ["--no_packing"], True, None),
    ("cuda", "bf16", True, ["--attn_implementation", "sdpa"], True, None)])
def test_which_attention_a_gpu_gets(device: str, precision: str, modern: bool, words: list[str], runs: bool,
                                    expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_attention, "runs_here", lambda *_: runs)
    options = parse_options(["--model_name_or_path", "x", *words])
    model = model_of("mistral", sliding_window=16)  # the kernel knows windows
    assert document_attention.choose(model, options, device, precision, modern, 64) == expected


def test_a_kernel_that_is_not_there_does_not_run() -> None:
    assert not document_attention.runs_here(model_of("llama").config, torch.device("cpu"), torch.bfloat16)


def test_a_training_learns_the_same_and_saves_a_usual_model(train: Train) -> None:
    words = ("--max_steps", "3", "--sequence_length", "64", "--lr_scheduler_type", "constant")
    ours = train(*words)
    original_attention = train(*words, "--attn_implementation", "sdpa", model="tiny", name="usual")
    assert ours.losses() == pytest.approx(original_attention.losses(), abs=1e-5)
    assert "documents" not in (ours.path / "model" / "config.json").read_text()
