"""Several datasets in one training: each has its share, one that runs out starts again, and both are told."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import Train
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import UserError
from trainer.sequences.mixture import epoch_pieces, times_read
from trainer.sequences.packing import Collator, PackedSequences


def table(*lengths: list[int]) -> Dataset:
    """Pieces of several datasets: of the first its token is 0, of the second 1, ..."""
    rows = [{"input_ids": [source] * size, "length": size, "bytes": size, "source": source}
            for source, sizes in enumerate(lengths) for size in sizes]
    return Dataset.from_list(rows)


@given(st.lists(st.floats(1, 1e9), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_an_epoch_reads_each_dataset_at_least_once_and_one_of_them_once(tokens: list[float], choose: random.Random
                                                                        ) -> None:
    weights = [choose.uniform(0.01, 1) for _ in tokens]
    shares = [weight / sum(weights) for weight in weights]
    times = times_read(tokens, shares)
    assert min(times) == pytest.approx(1)
    read = [often * count for often, count in zip(times, tokens, strict=True)]
    assert [each / sum(read) for each in read] == pytest.approx(shares)


def test_shares_hold_in_an_epoch_and_in_global_batches() -> None:
    choose = random.Random(4)
    pieces = table([choose.randint(2, 40) for _ in range(300)], [choose.randint(2, 30) for _ in range(80)])
    chosen = epoch_pieces(pieces, ["a", "b"], [0.3, 0.7], seed=1)
    counts = np.bincount(chosen, minlength=len(pieces))
    assert set(counts[:300]) == {1}  # every one once, since the other dataset is short
    assert counts[300:].min() >= 1 and counts[300:].max() - counts[300:].min() <= 1
    sequences = PackedSequences(pieces, 64, epoch=chosen)
    batches = [Collator(0, 64, sources=2)([sequences[number] for number in choose.sample(range(len(sequences)), 16)])
               for _ in range(60)]
    by_source = sum(batch["by_source"] for batch in batches)
    assert by_source[0] / by_source.sum() == pytest.approx(0.3, abs=0.03)
    whole = Collator(0, 64, sources=2)([sequences[number] for number in range(len(sequences))])["by_source"]
    assert whole[0] / whole.sum() == pytest.approx(0.3, abs=0.01)
    again = epoch_pieces(pieces, ["a", "b"], [0.3, 0.7], seed=1)
    assert (again == chosen).all() and len(epoch_pieces(pieces, ["a", "b"], [0.3, 0.7], seed=2))


def test_shares_that_repeat_a_dataset_for_ever_are_refused() -> None:
    pieces = table([50] * 1000, [2])
    with pytest.raises(UserError, match=r"an epoch would read b .* times .* smaller weight"):
        epoch_pieces(pieces, ["a", "b"], [1e-7, 1 - 1e-7], seed=0)
    with pytest.raises(UserError, match="c: nothing to train on"):
        epoch_pieces(table([5], [5]), ["a", "b", "c"], [0.2, 0.3, 0.5], seed=0)


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """A file of text and a short one of conversations."""
    choose = random.Random(1)
    texts = [{"text": " ".join(choose.choices(["red", "green", "blue"], k=choose.randint(5, 60)))} for _ in range(200)]
    chats = [{"messages": [{"role": "user", "content": f"how much is {number}"},
                           {"role": "assistant", "content": f"it is {number}"}]} for number in range(30)]
    for name, rows in (("text", texts), ("chat", chats)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [str(tmp_path / "text.jsonl"), str(tmp_path / "chat.jsonl")]


def test_text_and_conversations_are_trained_together(train: Train, two: list[str]) -> None:
    words = ("--dataset_path", f"{two[0]}:0.4", two[1], "--sequence_length", "64", "--max_steps")
    run = train(*words, "30", "--save_steps", "15", data=None, ranks=2)
    assert f"{two[0]} 40%, {two[1]} 60% (read " in run.output
    counted = json.loads((run.path / "run.json").read_text())["summary"]["tokens_by_dataset"]
    assert counted[two[0]] / sum(counted.values()) == pytest.approx(0.4, abs=0.06)
    assert f"{two[1]} " in run.output and "times)" in run.output.split("datasets ")[1].splitlines()[0]
    assert [row for row in run.metrics if "loss" in row][-1]["tokens_by_dataset"] == list(counted.values())
    more = train(*words, "32", "--resume_from_checkpoint", "auto", data=None, ranks=2)
    after = json.loads((more.path / "run.json").read_text())["summary"]["tokens_by_dataset"]
    assert 0 < sum(after.values()) - sum(counted.values()) < 0.2 * sum(counted.values())  # counted on
    other = train(*words[:1], f"{two[0]}:0.5", *words[2:], "34", "--resume_from_checkpoint", "auto", data=None, ranks=2,
                  expect=1)
    assert "was trained with weights of datasets 0.4 0.6, and this training runs with weights of datasets 0.5 0.5" \
        in other.output


def test_without_weights_each_is_read_once(train: Train, two: list[str]) -> None:
    run = train("--dataset_path", *two, "--sequence_length", "64", "--max_steps", "2", data=None)
    (line,) = [line for line in run.output.splitlines() if line.strip().startswith("mixture")]
    assert "read" not in line and line.count("%") == 2
