"""Models: packed documents don't see each other, and where they would, it is reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.tokenizer import own_tokenizer
from trainer.errors import UserError
from trainer.model import isolation, loading
from trainer.options import parse_options
from trainer.sequences.packing import Collator, PackedSequence

ARCHITECTURES = ["tiny", "gpt2", "qwen3", "gpt-neox"]
TEXTS = ["one two three four five six seven", "eight nine ten", "eleven twelve thirteen fourteen"] * 40


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return own_tokenizer(TEXTS)


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
    model = loading.build_tiny(tokenizer, 1) if name == "tiny" else other_models(name, len(tokenizer))
    return model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changing_one_document_of_a_row_changes_no_other(name: str, tokenizer: Any) -> None:
    model = build(name, tokenizer)
    collate = Collator(tokenizer.pad_token_id, 64)
    generator = np.random.default_rng(0)
    first, changed, last = generator.integers(0, 200, (3, 20))
    for rows in (1, 3):  # the same row several times: a batch has kernels of its own
        alone, packed, other = (collate([PackedSequence(list(row))] * rows)
                                for row in ([last], [first, last], [changed, last]))
        with torch.no_grad():
            logits = [model(input_ids=b["input_ids"], position_ids=b["position_ids"], use_cache=False).logits
                      for b in (alone, packed, other)]
        assert torch.equal(logits[1][:, 20:40], logits[2][:, 20:40])
        assert torch.allclose(logits[0][:, :20], logits[1][:, 20:40], atol=2e-6)
        assert not torch.allclose(logits[1][:, :20], logits[2][:, :20], atol=1e-2)


@pytest.mark.parametrize("odd", [1, 3])
def test_the_check_looks_at_as_many_rows_as_are_trained(odd: int, tokenizer: Any) -> None:
    model = build("tiny", tokenizer)

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Leaks between documents where there are `odd` rows, as a kernel may that has a path of its own for them."""
        mask = torch.ones_like(ids) if len(ids) == odd and ids.shape[1] > isolation.HALF else None
        found: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False, attention_mask=mask).logits
        return found

    with torch.no_grad():
        isolation.check_isolation(logits, len(tokenizer), "cpu", 4 - odd)
        with pytest.raises(UserError, match="train it with --no_packing"):
            isolation.check_isolation(logits, len(tokenizer), "cpu", odd)


def test_the_tiny_model_hangs_on_the_seed_alone(tokenizer: Any) -> None:
    one, same, other = (loading.build_tiny(tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
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
    with pytest.raises(UserError) as caught:
        loading.load_config(parse_options(words))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_safetensors_need_a_flag(tokenizer: Any, tmp_path: Any) -> None:
    model = build("gpt2", tokenizer)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="--allow_pickle"):
        loading.load_model(parse_options(["--model_name_or_path", str(tmp_path)]), "float32")
    assert loading.load_model(parse_options(["--model_name_or_path", str(tmp_path), "--allow_pickle"]), "float32")


@pytest.mark.parametrize("there", [False, True])
def test_flash_attention_is_tried_where_it_is_there(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: there)

    def chosen(dtype: str, flash: bool = True, named: str | None = None, has_it: bool = True) -> str | None:
        def build(attention: str | None) -> str | None:
            if attention == "flash_attention_2" and not has_it:
                raise ValueError("this model does not support Flash Attention 2 yet")
            return attention

        words = ["--model_name_or_path", "x", *(["--attn_implementation", named] if named else [])]
        return loading.with_attention(parse_options(words), flash, dtype, build)

    taken = "flash_attention_2" if there else None
    assert [chosen(dtype) for dtype in ("float32", "bfloat16", "float16")] == [None, taken, taken]
    assert chosen("bfloat16", flash=False) is None and chosen("bfloat16", has_it=False) is None
    assert chosen("bfloat16", named="eager") == "eager"
    with pytest.raises(ValueError, match="does not support"):  # what was named is tried as it was named
        chosen("float32", named="flash_attention_2", has_it=False)


def test_the_limit_of_a_model_of_text_and_pictures_is_that_of_its_text() -> None:
    import transformers

    config = transformers.Gemma3Config(text_config={"max_position_embeddings": 96})
    assert loading.choose_sequence_length(parse_options(["--model_name_or_path", "x"]), config) == 96


def test_weights_in_4_bits_are_asked_for_on_one_device() -> None:
    assert loading.quantized("bfloat16", None) == {}
    found = loading.quantized("bfloat16", "cuda:1")
    config = found["quantization_config"]
    assert found["device_map"] == {"": "cuda:1"}
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    # ZeRO and FSDP move the weights around as numbers of this kind.
    assert config.bnb_4bit_compute_dtype == config.bnb_4bit_quant_storage == torch.bfloat16


def test_weights_in_several_files_are_the_same_weights(tokenizer: Any, tmp_path: Any) -> None:
    model = build("qwen3", tokenizer)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    loaded = loading.load_model(parse_options(["--model_name_or_path", str(tmp_path)]), "float32")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


@pytest.mark.parametrize(("words", "expected"), [([], 256), (["--sequence_length", "77"], 77)])
def test_the_sequence_length_has_a_default(words: list[str], expected: int) -> None:
    assert loading.choose_sequence_length(parse_options(["--model_name_or_path", "tiny", *words]), None) == expected


def test_a_row_longer_than_the_model_is_refused() -> None:
    options = parse_options(["--model_name_or_path", "tiny", "--sequence_length", "9999"])
    with pytest.raises(UserError, match="takes 2 to 2,048 tokens"):
        loading.choose_sequence_length(options, None)
