"""Options that change how a training learns: each has its effect, and a run that resumes keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Run, Train
from safetensors.torch import load_file

SHORT = ("--sequence_length", "64", "--eval_max_sequences", "1000")


def checkpoint(run: Run) -> Path:
    return max(run.path.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize(("name", "keys"), [("sgd", set()), ("adafactor", {"step", "exp_avg_sq", "RMS"}),
                                            pytest.param("rmsprop", {"step", "square_avg"}, marks=pytest.mark.slow)])
def test_an_optimizer_by_name_is_the_one_that_steps(train: Train, name: str, keys: set[str]) -> None:
    run = train("--optim", name, "--max_steps", "3", *SHORT, "--learning_rate", "1e-2")
    states = torch.load(checkpoint(run) / "optimizer.pt", weights_only=True)["state"]
    found: set[str] = set().union(*(state.keys() for state in states.values()))
    assert keys <= found and "exp_avg" not in found
    more = train("--optim", name, "--max_steps", "4", *SHORT, "--learning_rate", "1e-2", "--resume_from_checkpoint",
                 "auto")
    assert 4 in more.losses()
    other = train("--max_steps", "5", *SHORT, "--resume_from_checkpoint", "auto", expect=1)
    assert f"was trained with --optim {name}, and this training runs without --optim" in other.output


COMPILED = (pytest.mark.slow, pytest.mark.needs("g++"))  # as Muon is, when it is imported


@pytest.mark.parametrize(("name", "config"), [
    ("adafactor", "configs/zero2"), pytest.param("sgd", "configs/zero3", marks=pytest.mark.slow),
    *(pytest.param("muon", f"configs/zero{stage}", marks=COMPILED) for stage in (0, 2))])
def test_deepspeed_drives_an_optimizer_by_name(train: Train, name: str, config: str) -> None:
    run = train("--optim", name, "--max_steps", "8", *SHORT, "--learning_rate", "1e-2", ranks=2, config=config)
    first, last = run.losses("eval_loss")[0], run.losses("eval_loss")[8]
    assert last < first and "gradients checked" in run.output
    used = json.loads((run.path / "ds_config.json").read_text())
    assert used.get("optimizer", {}).get("type") == ("Muon" if name == "muon" else None)
    adam = train("--max_steps", "8", *SHORT, "--learning_rate", "1e-2", ranks=2, config=config, name="adam")
    assert abs(adam.losses()[8] - run.losses()[8]) > 1e-3


def test_states_that_cannot_be_split_anew_are_told(train: Train) -> None:
    words = ("--optim", "adafactor", *SHORT)
    train(*words, "--max_steps", "2", ranks=2, config="configs/zero1")
    run = train(*words, "--max_steps", "3", "--resume_from_checkpoint", "auto", config="configs/zero1", expect=1)
    assert "was written by 2 ranks with --optim adafactor, whose states can't be split anew" in run.output


@pytest.mark.parametrize(("words", "message"), [
    (["--optim", "muon"], "--optim muon is DeepSpeed's: add --deepspeed_config"),
    (["--optim", "paged_adamw_8bit"], "paged_adamw_8bit"),  # on a CPU, or not installed
    (["--optim", "muon", "--lan_compress", "--lan_compress_from_scratch", "--deepspeed", "--deepspeed_config",
      str(ROOT / "trainer" / "configs" / "zero1.json")], "has made updates of them by then"),
    (["--early_stopping", "2", "--eval_steps", "0"], "--early_stopping looks at evaluations"),
    (["--lora_alpha", "3"], "--lora_alpha without --lora"),
    (["--adapter", "x", "--lora", "4"], "--adapter brings settings of its own: leave out --lora"),
    (["--dpo_beta", "0.2"], "holds no pairs: --method dpo and --dpo_beta are for columns chosen and rejected"),
    (["--method", "dpo"], "--method dpo needs columns chosen and rejected"),
    (["--lora", "4", "--lora_targets", "nothing"], "--lora: ")])
def test_what_cannot_be_is_told_in_one_line(train: Train, words: list[str], message: str) -> None:
    run = train(*words, "--max_steps", "1", *SHORT, expect=None)
    assert run.code in (1, 2) and message in run.output and "Traceback" not in run.output


def test_a_field_of_the_arguments_is_set_and_kept(train: Train) -> None:
    words = (*SHORT, "--learning_rate", "1e-2", "--warmup_steps", "0", "--lr_scheduler_type", "cosine_with_restarts",
             "--set", 'lr_scheduler_kwargs={"num_cycles": 2}', "--set", "run_name=mine")
    rates = train(*words, "--max_steps", "8", name="parts").losses("learning_rate")
    assert rates[5] == pytest.approx(rates[1]) and rates[4] < rates[1] / 2  # begun again in the middle
    again = train(*words, "--max_steps", "12", "--resume_from_checkpoint", "auto", name="parts")
    whole = train(*words, "--max_steps", "12", name="whole").losses("learning_rate")
    found = again.losses("learning_rate")  # the first step has the checkpoint's own, of the shorter schedule
    assert [found[step] for step in range(10, 13)] == pytest.approx([whole[step] for step in range(10, 13)])


def test_noise_on_the_embeddings_changes_training_and_no_evaluation(train: Train) -> None:
    plain, noisy, same = (train("--max_steps", "3", *SHORT, *words, name=name, ranks=2) for name, words in (
        ("plain", ()), ("noisy", ("--neftune_noise_alpha", "5")), ("same", ("--neftune_noise_alpha", "5"))))
    assert plain.losses("eval_loss")[0] == noisy.losses("eval_loss")[0]
    assert plain.losses()[1] != noisy.losses()[1] and noisy.losses() == same.losses()
    assert "gradients checked against the sum of all ranks' own" in noisy.output


def test_early_stopping_keeps_the_best_model(train: Train) -> None:
    words = ("--early_stopping", "2", "--eval_steps", "2", *SHORT, "--learning_rate", "0.05", "--warmup_steps", "0",
             "--lr_scheduler_type", "constant", "--eval_fraction", "0.3", "--save_steps", "0")
    run = train(*words, "--max_steps", "60", ranks=2, config="configs/zero1")
    losses = run.losses("eval_loss")
    del losses[0]
    best = min(losses, key=lambda step: losses[step])
    last = max(losses)
    assert last == best + 4 < 60  # two evaluations without a lower one
    summary = json.loads((run.path / "run.json").read_text())["summary"]
    assert summary["best_step"] == best and summary["best_eval_loss"] == losses[best]
    assert f"at step {best}, whose weights are in model/; no lower one in 2 evaluations ended" in run.output
    kept, saved = (load_file(path / "model.safetensors") for path in (run.path / "model",
                                                                      run.path / "checkpoints" / f"checkpoint-{best}"))
    assert kept.keys() == saved.keys() and all(torch.equal(kept[name], saved[name]) for name in kept)
    again = train("--max_steps", "1", *SHORT, "--eval_fraction", "0.3", model=str(run.path / "model"), name="again")
    assert again.losses("eval_loss")[0] == pytest.approx(losses[best], abs=2e-3)


@pytest.mark.slow
def test_early_stopping_counts_on_after_a_resumption(train: Train) -> None:
    words = ("--early_stopping", "3", "--eval_steps", "1", *SHORT, "--learning_rate", "0.2", "--warmup_steps", "0",
             "--lr_scheduler_type", "constant", "--eval_fraction", "0.3", "--save_steps", "1", "--save_total_limit",
             "1")
    whole = train(*words, "--max_steps", "30", name="whole")
    end = max(whole.losses("eval_loss"))
    assert end < 30
    train(*words, "--max_steps", str(end - 1), name="parts")
    parts = train(*words, "--max_steps", "30", "--resume_from_checkpoint", "auto", name="parts")
    assert max(parts.losses("eval_loss")) == end
    best = json.loads((parts.path / "run.json").read_text())["summary"]["best_step"]
    assert (parts.path / "checkpoints" / f"checkpoint-{best}").exists()  # though a newer one is kept


def adapter_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    return found


def test_loras_options_reach_the_adapter(train: Train) -> None:
    words = ("--lora", "4", "--lora_alpha", "12", "--lora_targets", "q_proj", "v_proj", "--dora", "--rslora",
             "--lora_dropout", "0.2", *SHORT)
    run = train(*words, "--max_steps", "3", ranks=2, config="configs/zero1")
    found = adapter_of(run)
    assert (found["lora_alpha"], sorted(found["target_modules"]), found["use_dora"], found["use_rslora"],
            found["lora_dropout"]) == (12, ["q_proj", "v_proj"], True, True, 0.2)
    names = load_file(run.path / "adapter" / "adapter_model.safetensors").keys()
    assert any("lora_magnitude_vector" in name for name in names)
    assert all("q_proj" in name or "v_proj" in name for name in names)
    assert "rank 4, on 17% of the linear weights" in run.output
    other = train("--lora", "4", "--lora_alpha", "8", *SHORT, "--max_steps", "4", "--resume_from_checkpoint", "auto",
                  ranks=2, config="configs/zero1", expect=1)
    assert "was trained with --lora_alpha 12.0, and this training runs with --lora_alpha 8.0" in other.output


@pytest.mark.parametrize("config", [None, pytest.param("configs/zero3", marks=pytest.mark.slow)])
def test_modules_are_trained_whole_and_saved_with_the_adapter(train: Train, config: str | None) -> None:
    run = train("--lora", "4", "--lora_modules_to_save", "lm_head", *SHORT, "--max_steps", "3", "--learning_rate",
                "1e-2", ranks=2 if config else 1, config=config)
    saved = load_file(run.path / "adapter" / "adapter_model.safetensors")
    (head,) = [weight for name, weight in saved.items() if name.endswith("lm_head.weight")]
    merged = load_file(run.path / "model" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, merged)
    plain = train("--lora", "4", *SHORT, "--max_steps", "3", name="plain")
    assert not torch.equal(load_file(plain.path / "model" / "model.safetensors")["lm_head.weight"], merged)


@pytest.mark.slow
def test_an_adapter_is_trained_further(train: Train) -> None:
    base = train("--max_steps", "2", *SHORT, name="base").path / "model"
    first = train("--lora", "4", "--lora_alpha", "4", "--max_steps", "4", *SHORT, "--learning_rate", "1e-2",
                  model=str(base), name="first")
    words = ("--adapter", str(first.path / "model"), *SHORT, "--learning_rate", "1e-3")
    more = train(*words, "--max_steps", "2", model=str(base), name="more", ranks=2, config="configs/zero1")
    assert more.losses("eval_loss")[0] == pytest.approx(first.losses("eval_loss")[4], abs=2e-3)
    assert json.loads((more.path / "model" / "adapter_config.json").read_text())["lora_alpha"] == 4
    again = train(*words, "--max_steps", "3", "--resume_from_checkpoint", "auto", model=str(base), name="more",
                  ranks=2, config="configs/zero1")
    assert 3 in again.losses() and "rank 4" in again.output
    wrong = train("--adapter", str(base), "--max_steps", "1", model=str(base), name="wrong", expect=1)
    assert f"--adapter {base}: no adapter_model.safetensors there" in wrong.output


@pytest.mark.slow
def test_embeddings_of_added_tokens_are_trained_with_an_adapter(train: Train, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = train("--max_steps", "1", *SHORT, name="base").path / "model"
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = len(tokenizer)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(base)
    run = train("--lora", "4", "--resize_embeddings", "--merge_lora", "--max_steps", "2", *SHORT, model=str(base))
    assert sorted(adapter_of(run)["modules_to_save"]) == ["embed_tokens", "lm_head"]
    merged = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert merged.get_input_embeddings().num_embeddings == before + 1
