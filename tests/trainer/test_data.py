"""Prepared data: held out for good, cut without loss, cached by content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.dataset import TokenizedDataset, prepare_dataset
from trainer.data.held_out import split
from trainer.data.tokenization import cut_document
from trainer.data.tokenizer import own_tokenizer
from trainer.errors import UserError
from trainer.options import parse_options
from trainer.sequences.packing import PackedSequences

Prepare = Callable[..., TokenizedDataset]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """Prepare data with flags: prepare("--dataset_path", folder, length=32)."""

    def run(*words: str, length: int = 32, make: Any = own_tokenizer, built_in: Any = None) -> TokenizedDataset:
        options = parse_options(
            ["--model_name_or_path", "tiny", "--cache_dir", str(tmp_path / "cache"), *words])
        return prepare_dataset(options, "tiny", make, length, built_in, say=lambda line: None)

    return run


@given(st.integers(0, 400), st.integers(2, 50))
def test_each_token_but_the_first_is_predicted_once(length: int, longest: int) -> None:
    pieces = list(cut_document(length, longest))
    assert all(2 <= end - start <= longest for start, end in pieces)
    predicted = [token for start, end in pieces for token in range(start + 1, end)]
    assert predicted == list(range(1, length))


def test_an_evaluation_on_the_training_data_must_be_meant(prepare: Prepare, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"document number {number}"}) for number in range(20)]
    for name, chosen in (("train", rows), ("copy", rows[::-1]), ("part", rows[:5]), ("other", rows[:2] + rows[-2:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(chosen) + "\n")
    with (tmp_path / "other.jsonl").open("a") as file:
        file.write(json.dumps({"text": "another one"}) + "\n")
    words = ("--dataset_path", str(tmp_path / "train.jsonl"), "--eval_dataset")
    for name in ("train", "copy", "part"):
        with pytest.raises(UserError, match=rf"{name}\.jsonl .* is what is trained on: .* --eval_on_train"):
            prepare(*words, str(tmp_path / f"{name}.jsonl"))
    assert prepare(*words, str(tmp_path / "part.jsonl"), "--eval_on_train").info.eval_documents == 5
    assert prepare(*words, str(tmp_path / "other.jsonl")).info.notes == {
        "an evaluation document that is trained on too": 4}


@given(st.lists(st.text(max_size=4), min_size=1, max_size=120), st.sampled_from([0.0, 0.1, 0.5]), st.integers(0, 3))
def test_no_text_lies_on_both_sides(texts: list[str], share: float, seed: int) -> None:
    inside, outside = split(texts, share, seed)
    assert sorted(inside + outside) == list(range(len(texts)))
    assert inside
    assert not {texts[i] for i in inside} & {texts[o] for o in outside}


def test_the_share_is_exact_for_different_texts_and_hangs_on_the_seed() -> None:
    texts = [f"text {number}" for number in range(1000)]
    _, outside = split(texts, 0.02, seed=1)
    assert len(outside) == 20
    assert split(texts, 0.02, seed=1)[1] == outside != split(texts, 0.02, seed=2)[1]


def test_nothing_is_lost_between_text_and_rows(prepare: Prepare, texts: Path) -> None:
    made = prepare("--dataset_path", str(texts), "--eval_fraction", "0.1")
    facts = made.info
    assert (facts.documents, facts.eval_documents, facts.dropped) == (60, 6, 0)
    assert facts.cut > 0
    rows = PackedSequences(made.train, 32)
    assert sum(len(document) for row in map(rows.__getitem__, range(rows.filled)) for document in row.documents) \
        == rows.tokens == sum(made.train["length"])
    loss_bytes = sum(made.train["bytes"]) + sum(made.evaluation["bytes"])
    assert loss_bytes == sum(len(path.read_bytes()) for path in texts.iterdir())


def test_a_tokenizer_is_trained_without_the_held_out_text(prepare: Prepare, texts: Path) -> None:
    seen: list[str] = []

    def make(training: Any) -> Any:
        seen.extend(training)
        return own_tokenizer(seen)

    prepare("--dataset_path", str(texts), "--eval_fraction", "0.1", make=make)
    assert len(seen) == 54


def test_the_cache_hangs_on_content_and_settings(prepare: Prepare, texts: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in texts.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    first = prepare("--dataset_path", str(texts)).info.key
    assert prepare("--dataset_path", str(data)).info.key == first
    assert prepare("--dataset_path", str(data), "--seed", "7").info.key != first
    assert prepare("--dataset_path", str(data), length=64).info.key != first
    (data / "00.md").write_text("changed")
    assert prepare("--dataset_path", str(data)).info.key != first
    assert not list((tmp_path / "cache" / "data").glob("making-*"))


def test_few_long_documents_are_held_out_in_pieces(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"Sentence number {n} of a long book. " for n in range(3000)))
    made = prepare("--dataset_path", str(tmp_path / "book.txt"))
    assert made.info.eval_by_pieces and PackedSequences(made.evaluation, 32).text_bytes()
    assert made.info.gzip_bits_per_byte and 0 < made.info.gzip_bits_per_byte < 8
    assert len(made.evaluation) == pytest.approx(0.02 * (len(made.train) + len(made.evaluation)), rel=0.1)


def test_one_short_document_is_enough(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("A short note.")
    made = prepare("--dataset_path", str(tmp_path / "note.txt"))
    assert (len(made.train), len(made.evaluation)) == (1, 0)
    assert len(PackedSequences(made.train, 32)) == 1
    assert len(PackedSequences(made.evaluation, 32)) == 0
    assert PackedSequences(made.evaluation, 32).text_bytes() is None


def test_nothing_is_held_out_if_nothing_is_asked_for(prepare: Prepare, texts: Path) -> None:
    made = prepare("--dataset_path", str(texts), "--eval_fraction", "0")
    assert (made.info.eval_documents, len(made.evaluation)) == (0, 0)


def test_an_evaluation_set_of_its_own(prepare: Prepare, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text('{"text": "A held out text."}\n')
    made = prepare("--dataset_path", str(texts), "--eval_dataset", str(tmp_path / "eval.jsonl"))
    assert (made.info.documents, made.info.eval_documents) == (60, 1)
    assert PackedSequences(made.evaluation, 32).text_bytes() == len("A held out text.")


def test_python_s_own_text_is_there() -> None:
    from trainer.data.python_docs import python_documents

    texts = python_documents()
    assert len(texts) == len(set(texts)) > 1000
    assert sum(map(len, texts)) > 1_000_000


@pytest.mark.parametrize(("words", "message"), [
    (["--dataset_path", "no/such/folder"], "no/such/folder: no such file or folder"),
    (["--dataset_path", "{tmp}/empty.jsonl"], "no documents"),
    (["--dataset_path", "{tmp}/blank.jsonl"], "no documents: all 2 are empty"),
    (["--dataset_path", "{tmp}/bad.jsonl"], "bad.jsonl:2: not JSON"),
])
def test_bad_data_is_one_line(words: list[str], message: str, prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(UserError) as caught:
        prepare(*[word.format(tmp=tmp_path) for word in words])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_document_may_be_empty_among_others(prepare: Prepare, tmp_path: Path) -> None:
    lines = ['{"text": ""}'] + [f'{{"text": "some text {n}"}}' for n in range(99)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    made = prepare("--dataset_path", str(tmp_path / "a.jsonl"))
    assert (made.info.documents, made.info.dropped) == (99, 1)
