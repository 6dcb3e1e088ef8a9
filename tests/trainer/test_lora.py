"""Adapters: trained under each engine, saved as adapter and as merged model, resumed, and cheap to send."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
from conftest import Train
from safetensors.torch import load_file

from trainer.errors import UserError
from trainer.model import loading, lora, weights
from trainer.model.lora import gathered_gigabytes, merged
from trainer.options import parse_options

SHORT = ("--sequence_length", "64", "--learning_rate", "1e-2")


@pytest.mark.parametrize(("ranks", "config"), [
    (1, None), (2, "configs/zero1"), pytest.param(2, "configs/zero2", marks=pytest.mark.slow),
    pytest.param(2, "configs/zero3", marks=pytest.mark.slow)])
def test_an_adapter_is_trained_and_merged(train: Train, ranks: int, config: str | None) -> None:
    run = train("--lora", "4", "--max_steps", "4", *SHORT, ranks=ranks, config=config)
    facts = json.loads((run.path / "run.json").read_text())
    assert facts["lora"] == 4 and 0 < facts["trained_parameters"] < facts["parameters"] / 5
    assert "of an adapter are trained (LoRA, rank 4, on 100% of the linear weights)" in run.output
    assert (run.path / "adapter" / "adapter_model.safetensors").exists()
    before, after = run.losses("eval_loss")[0], run.losses("eval_loss")[4]
    assert after < before
    # The merged model begins where the adapter's training has ended.
    again = train("--max_steps", "1", *SHORT, model=str(run.path / "model"), name="again")
    assert again.losses("eval_loss")[0] == pytest.approx(after, abs=2e-3)


@pytest.mark.slow
def test_an_adapter_of_a_model_in_a_folder_loads_by_itself(train: Train) -> None:
    from transformers import AutoModelForCausalLM

    base = train("--max_steps", "1", *SHORT, name="base")
    run = train("--lora", "--max_steps", "2", *SHORT, model=str(base.path / "model"))
    assert (run.path / "model" / "adapter_config.json").exists() and not (run.path / "adapter").exists()
    whole = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert any("lora" in name for name, _ in whole.named_parameters())
    merged = train("--lora", "--merge_lora", "--max_steps", "2", *SHORT, model=str(base.path / "model"), name="merged")
    plain = AutoModelForCausalLM.from_pretrained(merged.path / "model")
    ids = torch.arange(20)[None]
    assert torch.allclose(whole(ids).logits, plain(ids).logits, atol=1e-4)


def test_an_adapter_of_a_model_in_16_bits_is_merged_in_16_bits(train: Train) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = train("--max_steps", "1", *SHORT, name="base").path / "model"
    run = train("--lora", "--max_steps", "2", *SHORT, model=str(base))
    whole = AutoModelForCausalLM.from_pretrained(run.path / "model")  # the base with its adapter, in 32 bits
    adapter = run.path / "model"
    # As a training on a GPU without bf16 merges it.
    half = merged(parse_options(["--model_name_or_path", str(base)]), AutoTokenizer.from_pretrained(base), "float16",
                  adapter)
    assert {weight.dtype for weight in half.state_dict().values()} == {torch.float16}
    assert not any("lora" in name for name, _ in half.named_parameters())
    ids = torch.arange(20)[None]
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert torch.allclose(half(ids).logits.float(), whole(ids).logits, atol=2e-2)
    assert not torch.allclose(plain(ids).logits, whole(ids).logits, atol=2e-2)  # the adapter makes a difference


@pytest.mark.slow
def test_a_resumed_adapter_goes_on_as_if_never_stopped(train: Train) -> None:
    whole = train("--lora", "4", "--max_steps", "4", *SHORT, "--lr_scheduler_type", "constant", name="whole")
    words = ("--lora", "4", *SHORT, "--lr_scheduler_type", "constant")
    train(*words, "--max_steps", "2", name="parts")
    parts = train(*words, "--max_steps", "4", "--resume_from_checkpoint", "auto", name="parts")
    assert parts.losses()[4] == pytest.approx(whole.losses()[4], abs=1e-4)
    more = ("--max_steps", "6", "--resume_from_checkpoint", "auto")
    other = train("--lora", "8", *SHORT, *more, name="parts", expect=None)
    assert "LoRA of rank 4" in other.output and "Traceback" not in other.output


def test_flags_and_costs() -> None:
    assert parse_options(["--model_name_or_path", "tiny", "--lora"]).lora == 16
    with pytest.raises(UserError, match="nothing to merge"):
        parse_options(["--model_name_or_path", "tiny", "--merge_lora"])
    # A 7 B model in 16 bits on two hosts: both times half of 14 GB.
    assert gathered_gigabytes(7_000_000_000, 2, 2) == 14.0


@pytest.mark.parametrize(("name", "share"), [("mixtral", 1.0), ("llama4_text", 1.0), ("gpt2", 1.0)])
def test_experts_have_an_adapter_too(name: str, share: float) -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **families.SHAPES[name]))
    options = parse_options(["--model_name_or_path", "x", "--lora", "4"])
    found, covered = lora.add_adapter(model, options, split=False)
    assert covered == share
    ids = torch.randint(0, 100, (2, 8))
    found(input_ids=ids, labels=ids).loss.backward()
    learning = [key for key, weight in found.named_parameters()
                if weight.requires_grad and weight.grad is not None and weight.grad.abs().sum() > 0]
    assert any("experts" in key for key in learning) == bool(lora.expert_parameters(found))


@pytest.mark.parametrize(("name", "words", "part"), [
    ("llama4_text", [], ""), ("mixtral", ["--lora_targets", "q_proj", "v_proj"], "q_proj v_proj")])
def test_weights_without_an_adapter_are_counted(name: str, words: list[str], part: str) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **families.SHAPES[name]))
    linear = {key: module.weight.numel() for key, module in lora.linear_modules(model).items()}
    every = sum(linear.values()) + sum(weight.numel() for weight in lora.expert_parameters(model).values())
    reached = sum(size for key, size in linear.items() if not part or key.split(".")[-1] in part.split())
    found, covered = lora.add_adapter(
        model, parse_options(["--model_name_or_path", "x", "--lora", "4", *words]), split=True)
    assert covered == pytest.approx(reached / every) and 0.05 < covered < 0.95
    assert not any("experts" in key for key, weight in found.named_parameters() if weight.requires_grad)


def test_a_token_meets_the_experts_that_it_is_sent_to() -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("mixtral", **families.SHAPES["mixtral"]))  # 2 of 4
    experts = sum(weight.numel() for weight in lora.expert_parameters(model).values())
    parameters = model.num_parameters()
    assert lora.active_parameters(model, parameters) == parameters - experts // 2


def test_a_folder_with_an_adapter_alone_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(UserError, match=r"is an adapter of org/base \(adapter_config.json\): .* --merge_lora"):
        loading.load_config(parse_options(["--model_name_or_path", str(tmp_path)]))


def test_the_frozen_model_is_kept_in_16_bits_without_deepspeed(train: Train) -> None:
    base = train("--max_steps", "1", *SHORT, name="base").path / "model"
    wide = train("--lora", "4", "--max_steps", "3", *SHORT, model=str(base), name="wide")
    narrow = train("--lora", "4", "--max_steps", "3", "--precision", "bf16", *SHORT, model=str(base), name="narrow")
    needs = [json.loads((run.path / "run.json").read_text())["memory"]["needs"]["weights"] for run in (wide, narrow)]
    assert needs[0] == 2 * needs[1]
    assert narrow.losses()[1] == pytest.approx(wide.losses()[1], rel=0.01)
    saved = load_file(narrow.path / "model" / "adapter_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


def test_only_the_rank_that_writes_holds_weights_to_save() -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("qwen2", **families.SHAPES["qwen2"]))
    assert weights.to_save(model, model, writes=False) is None
    whole = weights.to_save(model, model, writes=True)
    assert whole and whole.keys() == model.state_dict().keys()
    assert whole["lm_head.weight"].data_ptr() == model.lm_head.weight.data_ptr()  # no copy
    adapted, _ = lora.add_adapter(model, parse_options(["--model_name_or_path", "x", "--lora", "4"]), split=False)
    found = weights.to_save(adapted, adapted, writes=True)
    assert found and all("lora" in name for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "ds_config", "configs/zero1", "configs/zero2"])
def test_an_adapter_beside_weights_of_4_bits_is_trained_merged_and_resumed(config: str | None, train: Train,
                                                                           tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, whose kernels run on a CPU too")
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 400}))
    base = str(train("--from_config", "--max_steps", "3", "--sequence_length", "64", name="base",
                     model=str(tmp_path / "shape")).path / "model")
    words = ("--qlora", "8", "--merge_lora", "--sequence_length", "64", "--save_steps", "2", "--max_steps", "4",
             "--lr_scheduler_type", "constant", "--per_device_train_batch_size", "2")
    run = train(*words, model=base, ranks=2, config=config, name="adapter")
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (run.path / name).stat().st_size > 0
    again = train(*words, "--resume_from_checkpoint", str(run.path / "checkpoints/checkpoint-2"), model=base, ranks=2,
                  config=config, name="adapter")
    for step in (3, 4):
        assert again.losses()[step] == pytest.approx(run.losses()[step], rel=1e-4)
