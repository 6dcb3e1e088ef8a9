"""Streams: each document once a pass and on one rank, none that is held out; gone on with at the very next row."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Train

from trainer.data.documents import Document
from trainer.data.held_out import digest_of
from trainer.data.rows import MESSAGES, TEXT
from trainer.data.tokenizer import own_tokenizer
from trainer.errors import UserError
from trainer.options import parse_options
from trainer.sequences import streaming
from trainer.sequences.packing import PackedSequence
from trainer.sequences.streaming import Stream, StreamPosition, StreamSettings

TEXTS = [f"document {number} " + "word " * (number % 17) for number in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return own_tokenizer(TEXTS)


def made(tokenizer: Any, rank: int = 0, ranks: int = 1, held_out: tuple[str, ...] = (), texts: list[str] = TEXTS,
         form: str = TEXT, capacity: int | None = 32) -> Stream:
    def read(start: int) -> Iterator[Document]:
        return (Document(text, "here") for text in texts[start:])

    digests = frozenset(map(digest_of, held_out))
    return Stream(StreamSettings(read, form, tokenizer, 32, digests, rank, ranks, 1), capacity)


def texts_of(rows: list[PackedSequence], tokenizer: Any) -> Counter[str]:
    return Counter(tokenizer.decode(ids, skip_special_tokens=True) for row in rows for ids in row.documents)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_pass_has_each_document_once_on_one_rank(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setattr(streaming, "BLOCK_SEQUENCES", 4)
    monkeypatch.setattr(streaming, "DOCUMENTS_AT_ONCE", 5)
    held_out = tuple(TEXTS[7:20])
    seen: Counter[str] = Counter()
    for rank in range(ranks):
        one = made(tokenizer, rank, ranks, held_out)
        rows: list[PackedSequence] = []
        for row in one:
            if one.position_after(10**9).turn:
                break
            rows.append(row)
        assert all(sum(map(len, row.documents)) <= 32 for row in rows)
        seen += texts_of(rows, tokenizer)
    expected = Counter(tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
                       for text in TEXTS if text not in held_out)
    assert seen == expected


@pytest.mark.parametrize("rows", [1, 30, 31, 97, 250])
def test_it_goes_on_with_the_very_next_row(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           rows: int) -> None:
    monkeypatch.setattr(streaming, "BLOCK_SEQUENCES", 8)
    monkeypatch.setattr(streaming, "DOCUMENTS_AT_ONCE", 7)
    first = made(tokenizer, 1, 2)
    whole = list(itertools.islice(first, rows + 20))
    again = made(tokenizer, 1, 2)
    list(itertools.islice(again, rows + 2))  # a loader may be ahead of what was trained
    streaming.save(again, rows, tmp_path, 1)
    later = made(tokenizer, 1, 2)
    streaming.load(later, tmp_path, 1)
    for expected, found in zip(whole[rows:], itertools.islice(later, 20), strict=True):
        assert [list(ids) for ids in expected.documents] == [list(ids) for ids in found.documents]
    streaming.save(later, rows + 20, tmp_path, 1)  # and again after that
    last = made(tokenizer, 1, 2)
    streaming.load(last, tmp_path, 1)
    more = list(itertools.islice(made(tokenizer, 1, 2), rows + 21))[-1]
    assert [list(ids) for ids in next(iter(last)).documents] == [list(ids) for ids in more.documents]


def test_conversations_carry_their_losses(tokenizer: Any) -> None:
    document = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
                           "trained": [1]})
    row = next(iter(made(tokenizer, texts=[document] * 20, form=MESSAGES)))
    assert row.loss_masks
    mask = row.loss_masks[0]
    assert len(mask) == len(row.documents[0]) and 0 < sum(mask) < len(mask)


def test_too_few_documents_and_states_of_others_are_told(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the data has no document for rank 3 of 4"):
        next(iter(made(tokenizer, 3, 4, texts=TEXTS[:2])))
    with pytest.raises(UserError, match="this checkpoint is of a run without --streaming"):
        streaming.load(made(tokenizer), tmp_path, 0)
    with pytest.raises(UserError, match="say --dataset_path D and --max_steps N"):
        parse_options(["--model_name_or_path", "tiny", "--streaming"])
    assert made(tokenizer).position_after(0) == StreamPosition()


@pytest.mark.parametrize(("ranks", "config"), [
    (1, None), pytest.param(2, "configs/zero1", marks=pytest.mark.slow)])
def test_a_streamed_run_goes_on_as_if_never_stopped(train: Train, texts: Path, ranks: int, config: str | None) -> None:
    words = ("--streaming", "--sequence_length", "64", "--per_device_train_batch_size", "2", "--save_steps", "3",
             "--lr_scheduler_type", "constant")
    whole = train(*words, "--max_steps", "6", ranks=ranks, config=config, name="whole")
    assert "streamed; the first 60 documents" in whole.output
    train(*words, "--max_steps", "3", ranks=ranks, config=config, name="parts")
    parts = train(*words, "--max_steps", "6", "--resume_from_checkpoint", "auto", ranks=ranks, config=config,
                  name="parts")
    assert parts.losses() == pytest.approx(whole.losses(), abs=1e-5)
    if ranks == 2:
        other = train(*words, "--max_steps", "8", "--resume_from_checkpoint", "auto", config=config, name="parts",
                      expect=1)
        assert "each with a stream of its own: resume with as many" in other.output


def test_few_documents_are_not_evaluated_on_what_is_trained(train: Train, tmp_path: Path) -> None:
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20]))
    run = train("--streaming", "--sequence_length", "32", "--max_steps", "1", data=data)
    assert "1 documents held out" in run.output


@pytest.mark.slow
def test_another_batch_gives_way_to_the_checkpoints(train: Train) -> None:
    words = ("--streaming", "--sequence_length", "64", "--save_steps", "2", "--lr_scheduler_type", "constant")
    whole = train(*words, "--per_device_train_batch_size", "2", "--max_steps", "4", name="whole")
    train(*words, "--per_device_train_batch_size", "2", "--max_steps", "2", name="parts")
    parts = train(*words, "--per_device_train_batch_size", "8", "--max_steps", "4", "--resume_from_checkpoint", "auto",
                  name="parts")
    assert "global batch 2 as before, 2 micro x 1 accumulation" in parts.output
    assert parts.losses() == pytest.approx(whole.losses(), abs=1e-5)


def test_a_dataset_of_the_hub_is_streamed_from_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "hf" / "hub" / "datasets--org--small"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / "b").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:9]))
    (folder / "snapshots" / "r1").mkdir(parents=True)
    (folder / "snapshots" / "r1" / "train.jsonl").symlink_to("../../blobs/b")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("r1")
    program = ("from trainer.options import parse_options; from trainer.data.sources import open_source\n"
               "o = parse_options(['--model_name_or_path', 'x', '--dataset_path', 'org/small', '--streaming', "
               "'--max_steps', '1'])\n"
               "source = open_source('org/small', o, list)\nprint(len(list(source.read())), list(source.after(7)))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100,
                          env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"})
    assert done.stdout.strip() == f"9 {TEXTS[7:9]}", done.stderr
