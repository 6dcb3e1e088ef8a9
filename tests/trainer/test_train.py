"""Real trainings on CPU: every preset, resume, damage, packing against padding, one rank against two."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT, Run, Train

SMALL = ("--sequence_length", "64", "--per_device_train_batch_size", "2", "--eval_fraction", "0.1")
PRESETS = sorted(path.stem for path in (ROOT / "trainer" / "configs").glob("*.json"))


def same_losses(one: Run, other: Run, within: float, key: str = "loss") -> None:
    expected, found = one.losses(key), other.losses(key)
    assert expected.keys() == found.keys()
    assert expected
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=within), f"step {step}"


def evaluation_of(model: Path, texts: Path) -> float:
    """The summed loss of some documents by a freshly loaded model, over their tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    nats = tokens = 0.0
    for path in sorted(texts.iterdir()):
        ids = torch.tensor([[*tokenizer(path.read_text())["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            nats += loaded(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return nats / tokens


OFTEN = ("ds_config", "configs/zero2_offload", "configs/zero3_offload")  # the others train in other tests too


@pytest.mark.parametrize("preset", [*OFTEN, *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in (f"configs/{stem}" for stem in PRESETS) if name not in OFTEN)])
def test_every_preset_trains_with_two_ranks(preset: str, train: Train) -> None:
    run = train(*SMALL, "--max_steps", "3", ranks=2, config=preset)
    assert [row["step"] for row in run.metrics if "loss" in row] == [1, 2, 3]
    record = json.loads((run.path / "run.json").read_text())
    assert (record["status"], record["exit"], record["world_size"]) == ("finished", 0, 2)
    assert record["engine"].startswith("DeepSpeed ZeRO-")
    assert json.loads((run.path / "ds_config.json").read_text())["train_batch_size"] == 4
    for name in ("model/model.safetensors", "model/tokenizer.json", "loss.png", "sample.txt"):
        assert (run.path / name).stat().st_size > 0, name
    assert "warning" not in run.output.lower()


def test_a_run_without_deepspeed_tells_all_it_should(train: Train, texts: Path) -> None:
    run = train("--max_steps", "12", "--sequence_length", "64", "--eval_fraction", "0.1", "--learning_rate", "1e-2")
    row = next(row for row in run.metrics if row["step"] == 12 and "loss" in row)
    assert set(row) == {"time", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
    assert row["tokens_per_second"] > 0 and 0 < row["tokens"] <= 12 * 8 * 64
    first, *_, last = [row for row in run.metrics if "eval_loss" in row]
    assert last["eval_loss"] < first["eval_loss"] - 0.1
    assert last["eval_bits_per_byte"] < first["eval_bits_per_byte"]
    for line in ("model ", "data ", "sequences ", "world size", "global batch ", "steps ", "precision", "engine",
                 "bits per byte"):
        assert line in run.output
    assert run.output.count("error") == 0


def test_one_rank_and_two_give_the_same_losses(train: Train) -> None:
    common = ("--sequence_length", "64", "--max_steps", "6", "--eval_fraction", "0.1", "--eval_steps", "3")
    one = train(*common, "--per_device_train_batch_size", "4", config="configs/zero1", name="one")
    two = train(*common, "--per_device_train_batch_size", "2", ranks=2, config="configs/zero1", name="two")
    saved_up = train(*common, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", ranks=2,
                     name="accumulated")
    for other in (two, saved_up):
        same_losses(one, other, 1e-4)
        same_losses(one, other, 1e-4, "eval_loss")
        assert [row["tokens"] for row in other.metrics if "tokens" in row] == \
               [row["tokens"] for row in one.metrics if "tokens" in row]


def test_packing_and_padding_give_the_same_loss(train: Train, texts: Path) -> None:
    common = ("--max_steps", "1", "--sequence_length", "64", "--eval_dataset", str(texts), "--eval_on_train",
              "--eval_max_sequences", "1000")
    packed = train(*common, name="packed")
    padded = train(*common, "--no_packing", "--per_device_train_batch_size", "3", name="padded")
    assert packed.losses("eval_loss")[0] == pytest.approx(padded.losses("eval_loss")[0], rel=1e-4)
    assert packed.losses("eval_tokens")[0] == padded.losses("eval_tokens")[0]
    assert "padded" in padded.output and "% full" in packed.output


def test_a_zero3_model_reloads_with_the_same_loss(train: Train, texts: Path) -> None:
    run = train("--sequence_length", "512", "--max_steps", "4", "--eval_dataset", str(texts), "--eval_on_train",
                "--eval_steps", "4", "--learning_rate", "1e-2", "--eval_max_sequences", "1000", ranks=2,
                config="configs/zero3")
    assert run.losses("eval_loss")[4] < run.losses("eval_loss")[0]
    final = [row["eval_loss"] for row in run.metrics if "eval_loss" in row][-1]
    assert evaluation_of(run.path / "model", texts) == pytest.approx(final, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_several_files_is_trained_under_zero3_and_saved_as_it_was(tied: bool, train: Train, texts: Path,
                                                                             tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    first = train(*SMALL, "--max_steps", "1", name="first")  # for its tokenizer
    tokenizer, base = AutoTokenizer.from_pretrained(first.path / "model"), tmp_path / "base"
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                 num_attention_heads=2, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied)
                     ).save_pretrained(base, max_shard_size="50KB")
    assert len(list(base.glob("model-*.safetensors"))) > 1
    tokenizer.save_pretrained(base)
    before = evaluation_of(base, texts)
    run = train("--sequence_length", "512", "--max_steps", "4", "--eval_dataset", str(texts), "--eval_on_train",
                "--eval_steps", "4", "--eval_max_sequences", "1000", "--learning_rate", "1e-2", ranks=2,
                config="configs/zero3", model=str(base))
    measured = run.losses("eval_loss")
    assert measured[0] == pytest.approx(before, rel=1e-4) and measured[4] < measured[0]
    assert evaluation_of(run.path / "model", texts) == pytest.approx(measured[4], rel=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


def test_one_short_document_trains_without_evaluation(train: Train, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("A short note.")
    run = train("--max_steps", "4", data=tmp_path / "note.txt")
    assert run.losses()[4] < run.losses()[1] and not run.losses("eval_loss")
    assert re.search(r"evaluation +none", run.output)


def test_training_goes_on_from_a_trained_model(train: Train) -> None:
    first = train(*SMALL, "--max_steps", "4", "--learning_rate", "1e-2", name="first")
    second = train(*SMALL, "--max_steps", "1", name="second", model=str(first.path / "model"))
    assert second.losses("eval_loss")[0] == pytest.approx(first.losses("eval_loss")[4], rel=1e-4)
    assert first.losses("eval_loss")[4] < 0.95 * first.losses("eval_loss")[0]  # it is not where it began


@pytest.mark.parametrize(("config", "ranks"), [
    ("configs/zero1", 2), pytest.param("configs/zero3", 2, marks=pytest.mark.slow),
    pytest.param("ds_config", 2, marks=pytest.mark.slow),
    pytest.param(None, 1, marks=pytest.mark.slow), pytest.param("configs/zero3_offload", 1, marks=pytest.mark.slow)])
def test_a_resumed_run_makes_the_same_losses(config: str | None, ranks: int, train: Train) -> None:
    common = (*SMALL, "--max_steps", "8", "--save_steps", "4", "--save_total_limit", "9", "--eval_steps", "2")
    whole = train(*common, ranks=ranks, config=config, name="whole")
    damaged = whole.path / "checkpoints" / "checkpoint-8"
    os.truncate(next(path for path in sorted(damaged.rglob("*.*")) if path.stat().st_size > 1000), 500)
    before = whole.metrics
    again = train(*common, "--resume_from_checkpoint", "auto", ranks=ranks, config=config, name="whole")
    assert "checkpoint-8 is damaged" in again.output
    assert "resuming after 4" in again.output
    first, rest = ([row for row in before if (row["step"] > 4) is late] for late in (False, True))
    assert again.metrics[: len(first)] == first  # what was measured before the checkpoint stays as it was
    assert [row["step"] for row in again.metrics if "loss" in row] == list(range(1, 9))
    for expected, found in zip(rest, again.metrics[len(first) :], strict=True):
        assert found["time"] != expected["time"]  # measured anew
        for key in {"step", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens"} & expected.keys():
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (key, expected)


@pytest.mark.parametrize(("words", "code", "message"), [
    (["--max_stepz", "3"], 2, "did you mean --max_steps?"),
    (["--dataset_path", "./nowhere"], 1, "error: nowhere: no such file or folder"),
    (["--deepspeed_config", "nowhere.json"], 1, "error: nowhere.json: No such file"),
    (["--precision", "fp16"], 1, "error: fp16 needs a GPU on every rank"),
    (["--sequence_length", "5000"], 1, "takes 2 to 2,048 tokens"),
    (["--resume_from_checkpoint", "runs/nothing"], 1, "no valid checkpoint there"),
    (["--output_dir", "/dev/null/run"], 1, "Not a directory: /dev/null/run"),
])
def test_a_mistake_is_one_line_without_a_traceback(words: list[str], code: int, message: str, train: Train) -> None:
    run = train(*words, expect=code)
    assert message in run.output
    assert "Traceback" not in run.output
    assert run.output.count("error:") == 1


def test_a_checkpoint_of_another_training_is_refused(train: Train) -> None:
    train(*SMALL, "--max_steps", "2")
    again = train(*SMALL, "--max_steps", "4", "--seed", "1", "--resume_from_checkpoint", "auto", expect=1)
    assert "was trained with --seed 42, and this training runs with --seed 1: give the same, or" in again.output
    padded = train(*SMALL, "--max_steps", "4", "--no_packing", "--resume_from_checkpoint", "auto", expect=1)
    assert "was trained without --no_packing, and this training runs with --no_packing" in padded.output
    fresh = train(*SMALL, "--max_steps", "4", expect=1)
    assert "holds an earlier run: --resume_from_checkpoint auto continues it" in fresh.output


def test_the_same_seed_makes_the_same_losses_with_activations_kept_or_not(train: Train) -> None:
    same_losses(train(*SMALL, "--max_steps", "3", name="a"),
                train(*SMALL, "--max_steps", "3", "--gradient_checkpointing", name="b"), 1e-6)


@pytest.mark.parametrize(("transformers", "engine"), [(1, 2), (2, 1), (1, 1)])
def test_ranks_that_are_counted_differently_stop_the_run(transformers: int, engine: int) -> None:
    from trainer.errors import UserError
    from trainer.training.preflight import check_world_sizes

    check_world_sizes(2, 2, 2)
    with pytest.raises(UserError, match="the launcher started 2 ranks"):
        check_world_sizes(2, transformers, engine)


def test_a_book_in_one_file_is_evaluated_in_pieces(train: Train, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"Sentence number {n} of a long book. " for n in range(3000)))
    run = train("--max_steps", "3", "--eval_max_sequences", "1000", data=tmp_path / "book.txt")
    assert "pieces of few documents held out" in run.output
    assert "gzip -9 of the same text" in run.output


def test_conversations_are_trained_on_and_shown(train: Train, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"question {n}"},
                          {"role": "assistant", "content": f"the answer to it is {n}"}]} for n in range(80)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train("--max_steps", "2", "--sequence_length", "64", data=tmp_path / "chat.jsonl")
    assert "80 documents, `messages`, " in run.output and "tokens are trained" in run.output
    assert "\n  assistant\n  »the answer to it is " in run.output and "<|end|>«" in run.output
    assert 0 < max(row.get("tokens", 0) for row in run.metrics) < 2 * 8 * 64 / 2  # of rows that are full
    assert (run.path / "model" / "chat_template.jinja").exists()


def test_tokens_that_the_model_has_no_rows_for_are_told_before_it_is_loaded(train: Train, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = train(*SMALL, "--max_steps", "1", name="first").path / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(model)
    unused = train(*SMALL, "--max_steps", "1", model=str(model), name="unused")
    assert unused.losses()[1] > 0
    (tmp_path / "more.txt").write_text("Something <|new|> in a text. " * 50)
    words = (*SMALL, "--max_steps", "1", "--eval_fraction", "0")
    refused = train(*words, model=str(model), data=tmp_path / "more.txt", expect=1, name="refused")
    assert f"has {rows:,} rows for tokens, and its tokenizer makes token {rows} (<|new|>)" in refused.output
    resized = train(*words, "--resize_embeddings", model=str(model), data=tmp_path / "more.txt", name="resized")
    assert AutoModelForCausalLM.from_pretrained(resized.path / "model").config.vocab_size == rows + 1


def test_without_zero_the_gradients_norm_is_told_too(train: Train, tmp_path: Path) -> None:
    (tmp_path / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}, "gradient_clipping": "auto",
                                                     "train_micro_batch_size_per_gpu": "auto"}))
    words = (*SMALL, "--max_steps", "2", "--logging_steps", "1", "--lr_scheduler_type", "constant")
    without = train(*words, "--deepspeed", str(tmp_path / "zero0.json"), name="zero0")
    plain = train(*words, name="plain")
    assert without.losses("grad_norm")[1] == pytest.approx(plain.losses("grad_norm")[1], rel=1e-4)
