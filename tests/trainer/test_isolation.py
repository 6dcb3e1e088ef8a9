"""Packed documents don't see each other, in whichever way a model is told where they begin; where they would, it is
said.

The families are those of families.py; what flash attention does is emulated by torch, kernel by kernel.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import ROOT, Train
from safetensors.torch import load_file

from trainer.errors import UserError
from trainer.model import isolation
from trainer.model.isolation import Way
from trainer.sequences.packing import Collator, PackedSequence, varlen_bounds

QUICK = {"gpt2", "opt", "mixtral", "bloom"}


class Model:
    """A small model with random weights, told where documents begin."""

    def __init__(self, name: str, way: Way = "positions") -> None:
        import transformers

        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, bos_token_id=0, eos_token_id=1, pad_token_id=1,
                                                   **families.SHAPES[name])
        self.model, self.way = transformers.AutoModelForCausalLM.from_config(config).eval(), way

    def logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        more: dict[str, Any] = {"mask": {"attention_mask": isolation.document_mask(position_ids)},
                                "varlen": varlen_bounds(position_ids), "positions": {}}[self.way]
        with torch.no_grad():
            found: torch.Tensor = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False,
                                             **more).logits
        return found


def flash(*tensors: torch.Tensor, causal: bool = True, softmax_scale: float | None = None, **_: Any) -> torch.Tensor:
    """flash_attn_func: whole rows, [rows, width, heads, size]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


def flash_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens_q: torch.Tensor,
                 cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, causal: bool = True,
                 softmax_scale: float | None = None) -> torch.Tensor:
    """flash_attn_varlen_func: documents laid end to end, [tokens, heads, size]."""
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max()) and torch.equal(cu_seqlens_q, cu_seqlens_k)
    parts = zip(*(tensor.split(cu_seqlens_q.diff().tolist()) for tensor in (query, key, value)), strict=True)
    return torch.cat([flash(*(part[None] for part in each), causal=causal, softmax_scale=softmax_scale)[0]
                      for each in parts])


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of flash-attn, which runs on GPUs only, in their place in transformers."""
    from transformers import modeling_flash_attention_utils as used

    monkeypatch.setattr(used, "_loaded_implementation", "flash_attention_2")
    monkeypatch.setattr(used, "_flash_fn", flash)
    monkeypatch.setattr(used, "_flash_varlen_fn", flash_varlen)
    monkeypatch.setattr(used, "_process_flash_kwargs_fn", used._lazy_define_process_function(flash_varlen))
    for name in ("_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(used, name, None)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_flash_attention_keeps_documents_apart_in_any_number_of_rows(name: str, rows: int,
                                                                     flash_attention: None) -> None:
    told = Model(name, "varlen")
    expected = Model(name)
    told.model.config._attn_implementation = "flash_attention_2"
    ids = torch.randint(0, families.VOCABULARY, (rows, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(part) for part in (row + 3, 20, 17 - row)])
                             for row in range(rows)])
    assert torch.allclose(told.logits(ids, positions), expected.logits(ids, positions), atol=1e-5)
    isolation.check_isolation(told.logits, families.VOCABULARY, "cpu", rows)
    told.way = "positions"  # transformers takes them for one row only
    if rows == 1:
        isolation.check_isolation(told.logits, families.VOCABULARY, "cpu", rows)
    else:
        with pytest.raises(UserError, match="see each other"):
            isolation.check_isolation(told.logits, families.VOCABULARY, "cpu", rows)


def test_the_collator_adds_what_flash_attention_is_told() -> None:
    collate = Collator(0, 8)
    collate.varlen = True
    batch = collate([PackedSequence([torch.arange(3).numpy(), torch.arange(2).numpy()]), PackedSequence([])])
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 8, 16]
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["max_length_q"] == batch["max_length_k"] == 8


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", sorted(set(families.SHAPES) - {"bloom", "bamba", "mamba2"}))
def test_each_family_is_told_in_the_way_that_keeps_documents_apart(name: str, rows: int) -> None:
    model = Model(name)
    isolation.check_causal(model.logits, families.VOCABULARY, "cpu", rows, "fp32")
    isolation.settle(model, families.VOCABULARY, "cpu", rows, "fp32")
    assert model.way == ("mask" if "mask" in families.OTHERWISE.get(name, "") else "positions")
    change, alone, _ = isolation.leak(model.logits, families.VOCABULARY, "cpu", rows)
    assert change <= 1e-6 and alone <= 1e-6


@pytest.mark.parametrize("name", ["bloom", "bamba", "mamba2"])
def test_families_that_cannot_pack_are_refused_before_anything_is_loaded(name: str) -> None:
    model = Model(name)
    with pytest.raises(UserError, match=f"{name} can't be trained on packed documents: it.*--no_packing"):
        isolation.check_family(model.model.config)
    with pytest.raises(UserError, match="see each other"):
        isolation.settle(model, families.VOCABULARY, "cpu", 2, "fp32")
    assert model.way == "positions"


def test_falcon_with_alibi_is_one_of_them() -> None:
    import transformers

    isolation.check_family(transformers.FalconConfig())
    with pytest.raises(UserError, match="falcon can't be trained on packed documents"):
        isolation.check_family(transformers.FalconConfig(alibi=True))


@pytest.mark.parametrize("leak", [{"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones(2, 24)}])
def test_a_leak_is_seen(leak: dict[str, Any]) -> None:
    model = Model("qwen3").model

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        alone = {"attention_mask": None} if ids.shape[1] == isolation.HALF else {}
        found: torch.Tensor = model(input_ids=ids, position_ids=positions, **leak | alone).logits
        return found

    with torch.no_grad(), pytest.raises(UserError, match="train it with --no_packing"):
        isolation.check_isolation(logits, families.VOCABULARY, "cpu", 2)


def test_an_encoder_is_refused() -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(transformers.BertConfig(
        vocab_size=families.VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32)).eval()
    with torch.no_grad(), pytest.raises(UserError, match="it is an encoder"):
        isolation.check_causal(lambda ids, positions: model(input_ids=ids, position_ids=positions).logits,
                               families.VOCABULARY, "cpu", 2, "fp32")


def test_weights_that_are_not_finite_are_said_to_be() -> None:
    model = Model("gpt2")
    model.model.transformer.wte.weight.data[3] = math.nan
    with pytest.raises(UserError, match=r"logits aren't finite before the first step: its weights are damaged$"):
        isolation.check_causal(model.logits, families.VOCABULARY, "cpu", 2, "fp32")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                  for name in sorted(families.SHAPES)])
def test_a_family_trains_from_a_loss_that_knows_nothing(name: str, train: Train, tmp_path: Path) -> None:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(families.config(name)))
    words = ["--from_config", "--vocab_size", str(families.VOCABULARY), "--max_steps", "4", "--sequence_length", "48",
             "--per_device_train_batch_size", "4", "--logging_steps", "1"]
    refused = families.OTHERWISE.get(name, "").startswith("no")
    if refused:
        said = train(*words, model=str(tmp_path / "shape"), config="configs/zero1", expect=1, name="packed").output
        assert [line for line in said.splitlines() if "error" in line] and "--no_packing" in said
        words.append("--no_packing")
    run = train(*words, model=str(tmp_path / "shape"), config="configs/zero1")
    losses = run.losses()
    assert len(losses) == 4 and losses[1] == pytest.approx(math.log(families.VOCABULARY), rel=0.1)


@pytest.mark.parametrize("config", [None, "configs/zero1"])
def test_a_model_for_pictures_too_trains_its_language_model_alone(config: str | None, train: Train,
                                                                  tmp_path: Path) -> None:
    """With more sequences a step than there is text: micro batches of nothing give no NaN."""
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    shape = transformers.Gemma3Config(text_config=families.SHAPES["gemma3_text"], vision_config=vision,
                                      mm_tokens_per_image=4)
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(shape.to_dict()))
    (tmp_path / "short.txt").write_text("A short text, of one row only.")
    run = train("--from_config", "--vocab_size", "300", "--max_steps", "3", "--sequence_length", "48",
                "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4", "--logging_steps", "1",
                "--eval_fraction", "0", "--weight_decay", "0.1", ranks=2, config=config,
                model=str(tmp_path / "shape"), data=tmp_path / "short.txt")
    losses = run.losses()
    assert losses[1] == pytest.approx(math.log(300), rel=0.1) and losses[3] < losses[1]
    assert "what the model has for pictures or sound stays as it is" in run.output
    assert "gradients checked" in run.output
    adapter = train("--lora", "4", "--max_steps", "2", "--sequence_length", "48", "--eval_fraction", "0", ranks=2,
                    config=config, model=str(run.path / "model"), data=tmp_path / "short.txt", name="adapter")
    names = load_file(adapter.path / "model" / "adapter_model.safetensors")
    assert names and not any("vision" in name for name in names)


def test_the_table_of_families_is_in_the_docs() -> None:
    assert families.table() in (ROOT / "docs" / "trainer.md").read_text()


def test_rounding_that_hangs_on_the_shape_is_no_leak() -> None:
    """As in bf16: rows of another width are rounded otherwise, by 4 % of the logits' spread here."""
    table = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def logits(ids: torch.Tensor, positions: torch.Tensor, sees: float = 0.0) -> torch.Tensor:
        found = table[ids]
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(ids.shape[1]))
        return found + 0.04 * noise + sees * found.cumsum(1).roll(1, 1)

    isolation.check_isolation(logits, 64, "cpu", precision="bf16")
    with pytest.raises(UserError, match="see each other"):
        isolation.check_isolation(lambda ids, positions: logits(ids, positions, 0.05), 64, "cpu", precision="bf16")
