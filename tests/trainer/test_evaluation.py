"""What an evaluation takes of the held-out text: a share of the training's work, spread evenly, the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Train
from datasets import Dataset

from trainer.options import parse_options, with_defaults
from trainer.sequences.packing import PackedSequences
from trainer.steps.evaluation import affordable_sequences


def affordable(steps: int, batch: int, *words: str) -> int:
    options = with_defaults(parse_options(["--model_name_or_path", "tiny", *words]))
    return affordable_sequences(options, steps, batch)


@pytest.mark.parametrize(("steps", "batch", "words", "expected"), [
    (100, 8, [], 24),  # 5 % of 20 steps is one step: 8 sequences forward and back, or 24 forward alone
    (1000, 8, [], 24),  # the one before step 1 may cost a step
    (1000, 8, ["--eval_steps", "0"], 24),
    (1000, 8, ["--eval_steps", "10"], 12),
    (5, 8, [], 2),  # a quarter of a batch at least
    (1000, 8, ["--eval_max_sequences", "500"], 500),
    (1000, 1, [], 3),
])
def test_an_evaluation_costs_a_share_of_the_training(steps: int, batch: int, words: list[str], expected: int) -> None:
    assert affordable(steps, batch, *words) == expected


def test_the_sequences_are_spread_and_their_bytes_are_theirs() -> None:
    lengths = [60, 50, 40, 30, 20, 10, 10, 9]
    pieces = Dataset.from_dict({"input_ids": [[number] * length for number, length in enumerate(lengths)],
                                "length": lengths, "bytes": [length * 3 for length in lengths]})
    whole = PackedSequences(pieces, 64)
    assert whole.spread(100) is whole and whole.text_bytes() == 3 * sum(lengths)
    part = whole.spread(2)
    assert len(part) == part.filled == 2
    documents = [document for number in range(2) for document in part[number].documents]
    assert part.tokens == sum(map(len, documents)) and part.text_bytes() == 3 * part.tokens
    assert part.loss_tokens == part.tokens - len(documents)
    for number, place in enumerate((0, whole.filled // 2)):
        assert [each.tolist() for each in part[number].documents] == [each.tolist() for each in whole[place].documents]


def test_it_is_told_how_many_and_the_same_are_taken_each_time(train: Train) -> None:
    run = train("--max_steps", "10", "--sequence_length", "64", "--eval_fraction", "0.3", "--eval_steps", "5",
                "--per_device_train_batch_size", "2", "--eval_max_sequences", "3")
    record = json.loads((Path(run.path) / "run.json").read_text())["summary"]
    assert record["eval_sequences"] == 3 < record["held_out_sequences"]
    assert f"each evaluation takes 3 of their {record['held_out_sequences']} sequences, the same each time" in \
        " ".join(run.output.split())
    assert f"(3 of {record['held_out_sequences']} held-out sequences)" in run.output
    assert len({row["eval_tokens"] for row in run.metrics if "eval_loss" in row}) == 1
