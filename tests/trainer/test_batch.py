"""The batch that nobody asked for: as many tokens a step whatever the ranks, in micro batches that fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import transformers
from conftest import Train

from trainer.errors import UserError
from trainer.estimate.batch import GLOBAL_TOKENS, LEAST_STEPS, choose_batch, default_global_batch, share
from trainer.estimate.memory import USABLE, inputs_of, total
from trainer.estimate.shape import of_numbers
from trainer.options import parse_options

ONE_B = inputs_of(of_numbers(1.1e9, 22, 2048, 32000), 1.1e9, sequence=1024, micro=1, accumulation=2, ranks=1, stage=0,
                  number=2, chunk=2048)


def test_a_step_has_65536_tokens_or_an_epoch_50_steps() -> None:
    assert default_global_batch(1024, None) * 1024 == GLOBAL_TOKENS == default_global_batch(1024, 10**6) * 1024
    assert default_global_batch(100_000, None) == 1 == default_global_batch(1024, 3)
    for sequences in (60, 500, 2400, 5000):
        found = default_global_batch(1024, sequences)
        assert sequences // found >= min(LEAST_STEPS, sequences) and found & (found - 1) == 0


@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 16, 100])
def test_the_global_batch_hangs_little_on_the_ranks(ranks: int, most: int) -> None:
    micro, accumulation = share(64, ranks, most)
    assert 1 <= micro <= max(most, 1)
    made = micro * accumulation * ranks
    assert made == 64 if 64 % ranks == 0 else abs(made - 64) <= max(ranks, 0.3 * 64)


@pytest.mark.parametrize("memory", [16e9, 24e9, 48e9, 141e9])
def test_the_largest_micro_batch_that_fits_is_taken(memory: float) -> None:
    found = choose_batch(ONE_B, 64, memory, on_gpu=True)
    load = replace(ONE_B, micro=found.micro, checkpoints=found.checkpoints)
    if memory >= 24e9:
        assert total(load) <= USABLE * memory and found.micro * found.accumulation == 64
        assert found.micro == 16 or total(replace(load, micro=2 * found.micro)) > USABLE * memory
    assert found.checkpoints is (memory < 24e9)  # only where not even one sequence fits without
    if memory == 24e9:
        assert found.reason.startswith("a micro batch of 16 would need ") and found.reason.endswith(" of 24.0 GB")
    if memory == 16e9:
        assert found.reason.startswith("nothing fits: one sequence needs ")
    if memory == 141e9:
        assert found.reason == ""


def test_activations_are_computed_anew_where_nothing_else_fits() -> None:
    long = replace(ONE_B, sequence=16_384)
    found = choose_batch(long, 4, 40e9, on_gpu=True)
    assert found.checkpoints and found.micro == 1 and found.reason.startswith("activations are recomputed: a micro")
    assert "nothing fits" in choose_batch(long, 4, 40e9, on_gpu=True, may_checkpoint=False).reason


def test_a_training_without_batch_flags_takes_it(train: Train) -> None:
    one, two = (train("--sequence_length", "32", "--max_steps", "2", ranks=ranks, config="configs/cpu",
                      name=f"r{ranks}") for ranks in (1, 2))
    batches = [next(line for line in run.output.splitlines() if "global batch" in line) for run in (one, two)]
    assert batches[0].split()[2] == batches[1].split()[2]  # as many sequences
    asked = train("--global_batch_size", "12", "--max_steps", "1", ranks=2, config="configs/cpu", name="asked")
    assert "12 sequences = 6 micro x 1 accumulation x 2 ranks" in asked.output
    given = train("--global_batch_size", "12", "--per_device_train_batch_size", "2", "--max_steps", "1", name="given")
    assert "12 sequences = 2 micro x 6 accumulation x 1 ranks" in given.output


def test_three_numbers_that_make_one_another_are_refused() -> None:
    with pytest.raises(UserError, match="give two of the three"):
        parse_options(["--model_name_or_path", "tiny", "--global_batch_size", "8", "--per_device_train_batch_size", "2",
                       "--gradient_accumulation_steps", "4"])


def test_measuring_keeps_nothing(train: Train, tmp_path: Path) -> None:
    run = train("--measure", "3", "--global_batch_size", "4")
    assert '@@STEPS {"tokens_per_second": ' in run.output and '"micro": 4' in run.output
    assert not run.path.exists()
    families_config("llama").save_pretrained(tmp_path / "shape")  # no weights: an adapter on random ones
    run = train("--measure", "2", "--from_config", "--lora", "4", "--sequence_length", "32", "--global_batch_size", "4",
                model=str(tmp_path / "shape"), name="adapter")
    assert "@@STEPS " in run.output and not run.path.exists()


def families_config(name: str) -> Any:
    return transformers.AutoConfig.for_model(name, **families.SHAPE)
