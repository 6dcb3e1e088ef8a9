"""Flags that make the trainer more than the core: loggers, compiled models, samples, models from a configuration."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import Train

from trainer.data.tokenizer import own_vocabulary
from trainer.errors import UserError
from trainer.model.from_config import overridden
from trainer.model.loading import load_config
from trainer.options import parse_options, with_defaults
from trainer.training.arguments import check_compiler, check_packages

SHORT = ("--sequence_length", "64", "--per_device_train_batch_size", "2")
SHAPE = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 128, "n_embd": 768, "n_layer": 12, "n_head": 12}
SMALLER = ("--from_config", "--config_overrides", "n_embd=32,n_layer=2,n_head=2", "--vocab_size", "400")


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps(SHAPE))
    return path


def test_tensorboard_has_what_metrics_have(train: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(*SHORT, "--max_steps", "3", "--report_to", "tensorboard")
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    for key in ("loss", "tokens_per_second", "learning_rate"):
        found = {event.step: event.value for event in events.Scalars(f"train/{key}")}
        assert found == pytest.approx(run.losses(key), rel=1e-4)
    assert events.Scalars("eval/bits_per_byte")


def test_what_is_not_installed_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "liger_kernel"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there, whether it is or not
    check_packages(parse_options(["--model_name_or_path", "x", "--report_to", "tensorboard"]), is_first=True)
    options = parse_options(["--model_name_or_path", "x", "--report_to", "wandb", "--liger"])
    with pytest.raises(UserError, match="--report_to wandb: not installed here: pip install wandb"):
        check_packages(options, is_first=True)
    with pytest.raises(UserError, match="--liger: not installed here: pip install liger-kernel"):
        check_packages(options, is_first=False)  # another rank doesn't log


def test_each_evaluation_leaves_samples(train: Train) -> None:
    run = train(*SHORT, "--max_steps", "4", "--eval_steps", "2")
    names = sorted(path.name for path in (run.path / "samples").iterdir())
    assert names == ["step-0000000.txt", "step-0000002.txt", "step-0000004.txt"]
    last = (run.path / "samples" / names[-1]).read_text()
    assert last.startswith("after 4 steps\n\n[1] ") and (run.path / "sample.txt").read_text().strip() in last
    silent = train(*SHORT, "--max_steps", "4", "--eval_steps", "2", "--num_samples", "0", name="silent")
    assert silent.losses() == run.losses() and not (silent.path / "samples").exists()


def test_overrides_carry_what_hangs_on_them() -> None:
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    qwen = overridden(Qwen3Config(num_hidden_layers=4), "num_hidden_layers=6")
    assert len(qwen.layer_types) == 6
    llama = LlamaConfig(hidden_size=4096, num_attention_heads=32)
    assert overridden(llama, "hidden_size=512").head_dim == 16
    assert overridden(llama, "hidden_size=512,head_dim=64").head_dim == 64
    gpt2 = overridden(GPT2Config(), "n_inner=128,hidden_size=64,activation_function=relu")
    assert (gpt2.n_inner, gpt2.n_embd, gpt2.activation_function) == (128, 64, "relu")


def test_without_a_compiler_nothing_is_compiled_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for flag in (["--torch_compile"], ["--optim", "muon"]):
        with pytest.raises(UserError, match=rf"{' '.join(flag)} on a CPU needs a C\+\+ compiler"):
            check_compiler(parse_options(["--model_name_or_path", "x", *flag]), "cpu")


@pytest.mark.slow
@pytest.mark.needs("g++")
def test_a_compiled_model_learns_the_same(train: Train, environment: dict[str, str], tmp_path: Path) -> None:
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "inductor")
    plain = train(*SHORT, "--max_steps", "3", "--lr_scheduler_type", "constant")
    assert not list(tmp_path.glob("inductor/**/*.so"))
    compiled = train(*SHORT, "--max_steps", "3", "--lr_scheduler_type", "constant", "--torch_compile", name="compiled")
    assert list(tmp_path.glob("inductor/**/*.so"))  # what g++ made of the model
    assert compiled.losses() == pytest.approx(plain.losses(), abs=1e-3)
    assert (compiled.path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(("ranks", "config"), [
    (1, None), pytest.param(2, "configs/zero3", marks=pytest.mark.slow)])
def test_a_model_of_a_configuration_begins_anew(train: Train, shape: Path, ranks: int, config: str | None) -> None:
    run = train(*SHORT, *SMALLER, "--max_steps", "3", model=str(shape), ranks=ranks, config=config)
    made = json.loads((run.path / "model" / "config.json").read_text())
    assert (made["model_type"], made["n_embd"], made["n_layer"]) == ("gpt2", 32, 2) and made["vocab_size"] <= 400
    tokens = json.loads((run.path / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(tokens) == made["vocab_size"]
    again = train(*SHORT, "--max_steps", "1", model=str(run.path / "model"), name="again", ranks=ranks, config=config)
    assert again.losses("eval_loss")[0] == pytest.approx(run.losses("eval_loss")[3], abs=1e-3)


def test_flags_of_new_models(shape: Path) -> None:
    options = with_defaults(parse_options(["--model_name_or_path", str(shape), "--from_config"]))
    assert own_vocabulary(options, load_config(options)) == 32_000 and options.learning_rate == 6e-4
    for odd, reason in (("n_heads=2", "a key that this configuration has"), ("n_embd", "KEY=VALUE"),
                        ("n_embd=many", "--config_overrides n_embd=many: ")):
        with pytest.raises(UserError, match=reason):
            overridden(load_config(options), odd)
    for words, reason in ((["--vocab_size", "9"], "--from_config makes one"),
                          (["--from_config", "--lora"], "trains all of a new model"),
                          (["--lora", "--qlora"], "keep one")):
        with pytest.raises(UserError, match=reason):
            parse_options(["--model_name_or_path", str(shape), *words])
    with pytest.raises(UserError, match="no such folder"):
        load_config(parse_options(["--model_name_or_path", str(shape)]))
