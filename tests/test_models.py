"""Models: packed documents don't see each other, and where they would, it is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trainer import models
from trainer.fault import Fault
from trainer.options import parse_options
from trainer.packing import Collator, Row

TEXTS = ["one two three four five six seven", "eight nine ten", "eleven twelve thirteen fourteen"] * 40


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.own_tokenizer(TEXTS)


def other_models(name: str, vocabulary: int) -> Any:
    """A small model of another architecture, with random weights."""
    import transformers

    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config)
    shape: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=vocabulary, num_key_value_heads=2, head_dim=16, **shape))
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=vocabulary, **shape))


def build(name: str, tokenizer: Any) -> Any:
    model = models.build_tiny(tokenizer, 1) if name == "tiny" else other_models(name, len(tokenizer))
    return model.eval()


@pytest.mark.parametrize("name", ["tiny", "gpt2", "qwen3", "gpt-neox"])
def test_changing_one_document_of_a_row_changes_no_other(name: str, tokenizer: Any) -> None:
    model = build(name, tokenizer)
    collate = Collator(tokenizer.pad_token_id, 64)
    generator = np.random.default_rng(0)
    first, changed, last = generator.integers(0, 200, (3, 20))
    alone, packed, other = (collate([Row(list(row))]) for row in ([last], [first, last], [changed, last]))
    with torch.no_grad():
        logits = [model(input_ids=b["input_ids"], position_ids=b["position_ids"], use_cache=False).logits[0]
                  for b in (alone, packed, other)]
    assert torch.equal(logits[1][20:40], logits[2][20:40])
    assert torch.allclose(logits[0][:20], logits[1][20:40], atol=2e-6)
    assert not torch.allclose(logits[1][:20], logits[2][:20], atol=1e-2)


def test_the_check_passes_where_documents_are_apart(tokenizer: Any) -> None:
    model = build("tiny", tokenizer)
    with torch.no_grad():
        models.check_isolation(
            lambda ids, positions: model(input_ids=ids, position_ids=positions, use_cache=False).logits,
            len(tokenizer), "cpu")


@pytest.mark.parametrize("name", ["tiny", "gpt2", "qwen3", "gpt-neox"])
@pytest.mark.parametrize("leak", [{"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones(1, 24)}],
                         ids=["cache", "mask"])
def test_the_check_sees_a_leak(leak: dict[str, Any], name: str, tokenizer: Any) -> None:
    model = build(name, tokenizer)
    with torch.no_grad(), pytest.raises(Fault, match="train it with --no_packing"):
        models.check_isolation(
            lambda ids, positions: model(input_ids=ids, position_ids=positions, **leak).logits, len(tokenizer), "cpu")


def test_the_tiny_model_hangs_on_the_seed_alone(tokenizer: Any) -> None:
    one, same, other = (models.build_tiny(tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_own_tokenizer_knows_any_text(tokenizer: Any) -> None:
    text = "naïve — 漢字 \x00\t🙂"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(("words", "message"), [
    (["--model_name_or_path", "./nowhere"], "model './nowhere': no such folder"),
    (["--model_name_or_path", "no-such/model-anywhere"], "model 'no-such/model-anywhere': "),
])
def test_a_model_that_is_not_there_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(Fault) as caught:
        models.load_config(parse_options(words))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_safetensors_need_a_flag(tokenizer: Any, tmp_path: Any) -> None:
    model = build("gpt2", tokenizer)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(Fault, match="--allow_pickle"):
        models.load_model(parse_options(["--model_name_or_path", str(tmp_path)]), "float32")
    assert models.load_model(parse_options(["--model_name_or_path", str(tmp_path), "--allow_pickle"]), "float32")


@pytest.mark.parametrize(("words", "expected"), [([], 256), (["--sequence_length", "77"], 77)])
def test_the_sequence_length_has_a_default(words: list[str], expected: int) -> None:
    assert models.choose_sequence_length(parse_options(["--model_name_or_path", "tiny", *words]), None) == expected


def test_a_row_longer_than_the_model_is_refused() -> None:
    options = parse_options(["--model_name_or_path", "tiny", "--sequence_length", "9999"])
    with pytest.raises(Fault, match="takes 2 to 2,048 tokens"):
        models.choose_sequence_length(options, None)
