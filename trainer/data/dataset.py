"""Data for a training: read the documents, hold some out, tokenize once, keep the result for the next run."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer import cache
from trainer.data import python_docs
from trainer.data.chat import conversation_text
from trainer.data.documents import Document
from trainer.data.held_out import check_overlap, digest_of, same_data, split
from trainer.data.rows import TEXT
from trainer.data.sources import Source, hashed, open_source
from trainer.data.tokenization import tokenize
from trainer.data.tokenizer import TOKENIZER_CHARACTERS, first_characters
from trainer.errors import UserError
from trainer.options import Options

SAMPLE_DOCUMENTS = 2000  # documents of a stream, or as many as train a tokenizer if those are fewer
FORMAT = 6  # part of the cache's key: raise it when what is stored changes


@dataclass
class DatasetInfo:
    """What is known of prepared data; stored beside it. `gzip_bits_per_byte` is of the held-out text, gzip -9."""

    key: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)  # what decides what a step sees, by name
    form: str = TEXT  # or what rows.py calls it
    documents: int = 0
    dropped: int = 0
    cut: int = 0
    eval_documents: int = 0
    eval_by_pieces: bool = False
    gzip_bits_per_byte: float | None = None
    notes: dict[str, int] = field(default_factory=dict)  # what was left out or replaced, and in how many rows
    held_out: list[str] = field(default_factory=list)  # digests of held-out documents, for data that is streamed


@dataclass
class TokenizedDataset:
    """Tokenized pieces (see tokenization.tokenize) for training and evaluation, and what is known of them."""

    info: DatasetInfo
    train: Any
    evaluation: Any
    folder: Path = field(default_factory=Path)

    def largest_token(self) -> int:
        """Return the largest token's number."""
        return max((int(piece.max()) for table in (self.train, self.evaluation) if len(table)
                    for piece in table.with_format("numpy")["input_ids"]), default=0)


def cache_folder(options: Options) -> Path:
    """Return the folder that keeps prepared data."""
    home = options.cache_dir or os.environ.get("LANSPEED_CACHE") or Path.home() / ".cache" / "lanspeed"
    return Path(home).expanduser() / "data"


def prepare_dataset(
    options: Options,
    tokenizer_id: str,
    make_tokenizer: Callable[[Iterable[str]], Any],
    sequence_length: int,
    built_in: Callable[[], list[str]] = python_docs.python_documents,
    say: Callable[[str], None] = print,
) -> TokenizedDataset:
    """Return the data that `options` name, tokenized into pieces of at most `sequence_length` tokens.

    `make_tokenizer` gets the training documents (a tokenizer may be trained on them) and returns one;
    `tokenizer_id` tells tokenizers apart in the cache. Raises UserError for data that can't be read or is empty.
    """
    source = open_source(options.dataset_path, options, built_in)
    evaluation = open_source(options.eval_dataset, options, built_in, True) if options.eval_dataset else None
    if evaluation and evaluation.fingerprint == source.fingerprint and not options.eval_on_train:
        raise UserError(same_data(evaluation.name), shared=True)
    settings = {"data": short_hash(source.fingerprint), "tokenizer or chat template": short_hash(tokenizer_id),
                "evaluation data": short_hash(evaluation.fingerprint) if evaluation else None,
                "--sequence_length": sequence_length}
    settings |= {f"--{name}": getattr(options, name) for name in (
        "seed", "eval_fraction", "text_column", "streaming", "dataset_config", "dataset_split", "eval_config",
        "eval_split", "eval_on_train")}
    key = hashed(json.dumps(part).encode() for part in (
        FORMAT, source.fingerprint, evaluation and evaluation.fingerprint, tokenizer_id, settings))[:32]
    if options.streaming:
        source = replace(source, read=partial(first_documents, source.read))
    folder = cache_folder(options) / key
    if (folder / "info.json").exists():
        say(f"data: {source.name}, tokenized before ({folder})")
    else:
        say(f"data: {source.name}, tokenizing")
        os.makedirs(folder.parent, mode=0o700, exist_ok=True)  # private data is read by this user alone
        with cache.half_made(folder.parent) as scratch:
            made = build(scratch, DatasetInfo(key, source.name, settings), source, evaluation, options,
                         make_tokenizer, sequence_length)
            try:
                os.rename(made, folder)
            except OSError:
                if not (folder / "info.json").exists():  # else another run was faster
                    raise
        cache.use(folder)
        for old in cache.shrink(folder.parent):
            say(f"data: removed {old}, used longest ago (LANSPEED_CACHE_GB is {cache.limit_bytes() / 1e9:g})")
    return load_tokenized(folder)


def short_hash(text: str) -> str:
    """Return a digest of 8 characters, to tell one text from another."""
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def first_documents(read: Callable[[], Iterable[Document]]) -> Iterator[Document]:
    """Return the documents of a stream that are looked at before: they train the tokenizer, and some are held out."""
    return itertools.islice(first_characters(read(), TOKENIZER_CHARACTERS), SAMPLE_DOCUMENTS)


def load_prepared(options: Options, key: Any) -> TokenizedDataset:
    """Open what `prepare_dataset` stored on this machine. Raises UserError for a key that no data has."""
    if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{32}", key):
        raise UserError(f"no data has the key {str(key)[:40]!r}", shared=True)
    return load_tokenized(cache_folder(options) / key)


def load_tokenized(folder: Path) -> TokenizedDataset:
    """Open what `prepare_dataset` stored."""
    from datasets import load_from_disk

    cache.use(folder)
    info = DatasetInfo(**json.loads((folder / "info.json").read_text()))
    train = load_from_disk(str(folder / "train"))
    evaluation = load_from_disk(str(folder / "eval")) if (folder / "eval").exists() else train.select([])
    return TokenizedDataset(info, train, evaluation, folder)


def build(
    scratch: Path,
    info: DatasetInfo,
    source: Source,
    evaluation: Source | None,
    options: Options,
    make_tokenizer: Callable[[Iterable[str]], Any],
    sequence_length: int,
) -> Path:
    """Make everything in `scratch` and return the folder that is complete."""
    texts = read_texts(source, scratch, "texts")
    info.documents, info.dropped = len(texts), texts.dropped
    info.form = source.extract.form or TEXT
    train, held_out = texts, read_texts(evaluation, scratch, "eval-texts") if evaluation else None
    if evaluation and (evaluation.extract.form or TEXT) != info.form:
        raise UserError(f"{evaluation.name} holds {evaluation.extract.form}, and {source.name} {info.form}")
    notes = Counter(source.extract.notes)
    if evaluation and held_out is not None:
        notes.update(evaluation.extract.notes)
        check_overlap(texts["text"], held_out["text"], evaluation.name, options.eval_on_train, notes)
    if held_out is None:
        least = 1 if options.streaming and options.eval_fraction else 0  # pieces of what is read again won't do
        inside, outside = split(texts["text"], options.eval_fraction, options.seed, least)
        train, held_out = texts.select(inside), texts.select(outside)
        if options.streaming:
            info.held_out = sorted({digest_of(text) for text in held_out["text"]})
    tokenizer = make_tokenizer(train["text"] if info.form == TEXT else map(conversation_text, train["text"]))
    train, info.cut = tokenize(train, tokenizer, sequence_length, info.form, notes)
    held_out_pieces, _ = tokenize(held_out, tokenizer, sequence_length, info.form, notes)
    info.notes = dict(notes)
    info.eval_documents = len(held_out)
    info.gzip_bits_per_byte = gzip_bits(held_out["text"]) if info.form == TEXT else None
    if not len(held_out) and options.eval_fraction and len(train) > 1 and not options.streaming:
        count = max(1, round(len(train) * options.eval_fraction))
        order = train.train_test_split(test_size=count, seed=options.seed)
        train, held_out_pieces, info.eval_by_pieces = order["train"], order["test"], True
        if info.form == TEXT:
            info.gzip_bits_per_byte = gzip_bits(tokenizer.batch_decode(order["test"]["input_ids"][:], True))
    if not len(train):
        raise UserError(f"{source.name}: nothing to train on: {info.documents} documents, none with two tokens or more")
    made = scratch / "made"
    train.save_to_disk(str(made / "train"))
    if len(held_out_pieces):  # datasets cannot load a table without rows
        held_out_pieces.save_to_disk(str(made / "eval"))
    tokenizer.save_pretrained(str(made / "tokenizer"))
    (made / "info.json").write_text(json.dumps(asdict(info), indent=1))
    return made


def read_texts(source: Source, scratch: Path, name: str) -> Any:
    """Read a source into a table on disk with the columns `text` and `where`, without empty documents.

    These are counted in `.dropped`. Raises UserError if nothing is left.
    """
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    dropped, kept = 0, 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal dropped, kept
        for text in source.read():
            if text.strip():
                kept += 1
                yield {"text": str(text), "where": text.where}
            else:
                dropped += 1

    try:
        # A name of its own keeps datasets from hashing the generator and everything that it refers to.
        columns = Features({"text": Value("large_string"), "where": Value("string")})
        table = Dataset.from_generator(rows, features=columns, cache_dir=str(scratch / name), fingerprint=name)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    except ValueError:
        if kept:  # else: datasets cannot make a table without rows
            raise
        raise UserError(f"{source.name}: no documents" + (f": all {dropped:,} are empty" if dropped else "")) from None
    table.dropped = dropped
    return table


def gzip_bits(texts: Iterable[str]) -> float | None:
    """Return the bits per byte that `gzip -9` needs for the texts, one after the other; None for no text at all."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    before = after = 0
    for text in texts:
        raw = text.encode()
        before += len(raw)
        after += len(packer.compress(raw))
    after += len(packer.flush())
    return 8 * after / before if before else None
