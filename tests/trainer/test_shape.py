"""A model's shape by its configuration: against what transformers and peft build."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import transformers
from conftest import ROOT

from trainer.estimate.flops import flops_per_token
from trainer.estimate.shape import FAMILIES, of_config, of_numbers, tiny
from trainer.model import lora
from trainer.model.shape import of_model, shape_of

# Small ones of families that tests/families.py doesn't have.
MORE: dict[str, dict[str, Any]] = {
    "llama": families.SHAPE, "arcee": families.SHAPE, "helium": families.HEADS, "smollm3": families.SHAPE,
    "cohere": families.SHAPE, "gemma": families.HEADS, "starcoder2": families.SHAPE, "stablelm": families.SHAPE,
    "olmo": families.SHAPE, "glm4": families.HEADS, "seed_oss": families.HEADS,
    "phi": families.SHAPE | {"num_key_value_heads": 4}}
SHAPES = families.SHAPES | MORE


def config_of(name: str, **others: Any) -> Any:
    shape = SHAPES[name] | others
    return transformers.AutoConfig.for_model(name, bos_token_id=0, eos_token_id=1, pad_token_id=1, **shape)


def test_there_are_thirty_architectures() -> None:
    assert len(SHAPES) >= 30 and len(set(SHAPES) & set(FAMILIES)) >= 15


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_parameters_are_those_that_transformers_makes(name: str) -> None:
    config = config_of(name)
    shape = shape_of(config)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert shape and shape.parameters == model.num_parameters()
    assert shape.active == lora.active_parameters(model, model.num_parameters())
    assert (shape.layers, shape.vocabulary) == (config.num_hidden_layers, config.vocab_size)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_of_real_width_is_counted_without_building_it(name: str) -> None:
    config = transformers.AutoConfig.for_model(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 2})
    assert of_config(json.loads(config.to_json_string(use_diff=False))) == of_model(config)


@pytest.mark.parametrize(("name", "others"), [
    ("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True}), ("gpt2", {"n_inner": 80}), ("mistral", {"head_dim": 16}),
    ("mixtral", {"num_local_experts": 3})])
def test_what_a_configuration_says_otherwise_counts(name: str, others: dict[str, Any]) -> None:
    config = config_of(name, **others)
    assert of_config(config.to_dict()) == of_model(config)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma2", "gpt_neox", "starcoder2"])
def test_an_adapter_is_as_large_as_peft_makes_it(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    config = config_of(name)
    shape = shape_of(config)
    model = get_peft_model(transformers.AutoModelForCausalLM.from_config(config),
                           LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shape and shape.adapter(4) == lora.trained(model)


def test_what_is_unknown_is_no_guess() -> None:
    assert of_config({"model_type": "mamba2", "hidden_size": 32}) is None
    assert of_config({"model_type": "llama"}) is None  # no widths
    assert of_config({"model_type": "llama", "hidden_size": "x", "num_hidden_layers": 2}) is None
    some = config_of("qwen3_moe", decoder_sparse_step=2)
    assert of_config(some.to_dict()) is None and shape_of(some) == of_model(some)


def test_a_shape_by_numbers_has_as_many_parameters() -> None:
    shape = of_numbers(7e9, 32, 4096, 32000)
    assert shape.parameters == 7e9 and abs(shape.intermediate - 11008) < 1500
    assert flops_per_token(shape, 1, frozen=False) == pytest.approx(6 * (7e9 - 32000 * 4096), rel=0.001)
    assert flops_per_token(shape, 1, frozen=True) == pytest.approx(4 * (7e9 - 32000 * 4096), rel=0.001)
    assert tiny().parameters == 614_880


def test_the_script_prints_a_shape(tmp_path: Path) -> None:
    config_of("olmo").save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, ROOT / "trainer" / "model_shape.py", tmp_path], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    expected = shape_of(config_of("olmo"))
    assert expected and json.loads(done.stdout)["parameters"] == expected.parameters
    done = subprocess.run([sys.executable, ROOT / "trainer" / "model_shape.py", tmp_path / "nowhere"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no such folder" in done.stderr
