"""Data for a training: read the documents, hold some out, tokenize once, keep the result for the next run."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer import cache
from trainer.data import python_docs
from trainer.data.documents import Document
from trainer.data.held_out import check_overlap, digest_of, same_data
from trainer.data.rows import PREFERENCES, TEXT
from trainer.data.sources import Source, hashed, open_source
from trainer.data.texts import Part, common_form, divided, form_of, gzip_bits, read_texts
from trainer.data.tokenization import joined, tokenize
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
    sources: list[str] = field(default_factory=list)  # the names of several, in the order of the column source
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
    epoch: Any = None  # the numbers of an epoch's pieces of `train`, where some are read several times

    def epoch_tokens(self) -> int:
        """Return the tokens of an epoch."""
        if not len(self.train):
            return 0
        lengths = self.train.with_format("numpy")["length"][:]
        return int((lengths if self.epoch is None else lengths[self.epoch]).sum())

    def largest_token(self) -> int:
        """Return the largest token's number."""
        return max((int(piece.max()) for table in (self.train, self.evaluation) if len(table)
                    for name in table.column_names if name.endswith("_ids")
                    for piece in table.with_format("numpy")[name]), default=0)


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
    sources = [open_source(part.name, options, built_in) for part in options.datasets] or \
        [open_source(None, options, built_in)]
    fingerprint, name = "+".join(source.fingerprint for source in sources), ", ".join(each.name for each in sources)
    evaluation = open_source(options.eval_dataset, options, built_in, True) if options.eval_dataset else None
    if evaluation and [evaluation.fingerprint] == [each.fingerprint for each in sources] and not options.eval_on_train:
        raise UserError(same_data(evaluation.name), shared=True)
    settings = {"data": short_hash(fingerprint), "tokenizer or chat template": short_hash(tokenizer_id),
                "evaluation data": short_hash(evaluation.fingerprint) if evaluation else None,
                "--sequence_length": sequence_length}
    settings |= {f"--{name}": getattr(options, name) for name in (
        "seed", "eval_fraction", "text_column", "streaming", "dataset_config", "dataset_split", "eval_config",
        "eval_split", "eval_on_train")}
    settings |= {f"--{name}": getattr(options, name) for name in ("method", "columns") if getattr(options, name)}
    key = hashed(json.dumps(part).encode() for part in (
        FORMAT, fingerprint, evaluation and evaluation.fingerprint, tokenizer_id, settings))[:32]
    if options.streaming:
        sources = [replace(source, read=partial(first_documents, source.read)) for source in sources]
    folder = cache_folder(options) / key
    if (folder / "info.json").exists():
        say(f"data: {name}, tokenized before ({folder})")
    else:
        say(f"data: {name}, tokenizing")
        os.makedirs(folder.parent, mode=0o700, exist_ok=True)  # private data is read by this user alone
        with cache.half_made(folder.parent) as scratch:
            info = DatasetInfo(key, name, settings, [each.name for each in sources] if len(sources) > 1 else [])
            made = build(scratch, info, sources, evaluation, options, make_tokenizer, sequence_length)
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
    sources: list[Source],
    evaluation: Source | None,
    options: Options,
    make_tokenizer: Callable[[Iterable[str]], Any],
    sequence_length: int,
) -> Path:
    """Make everything in `scratch` and return the folder that is complete."""
    read = [read_texts(source, scratch, f"texts-{number}") for number, source in enumerate(sources)]
    outside = read_texts(evaluation, scratch, "eval-texts") if evaluation else None
    info.documents, info.dropped = sum(map(len, read)), sum(texts.dropped for texts in read)
    info.form = common_form(sources, evaluation)
    notes = Counter[str]()
    for source in [*sources, *([evaluation] if evaluation else [])]:
        notes.update(source.extract.notes)
    if evaluation and outside is not None:
        check_overlap(itertools.chain(*(texts["text"] for texts in read)), outside["text"], evaluation.name,
                      options.eval_on_train, notes)
    parts = [divided(texts, source, options) if outside is None else Part(texts, form_of(source))
             for texts, source in zip(read, sources, strict=True)]
    if options.streaming and outside is None:
        info.held_out = sorted({digest_of(text) for text in parts[0].held_out["text"]})
    tokenizer = make_tokenizer(itertools.chain(*(part.words() for part in parts)))
    if evaluation and outside is not None:
        parts.append(Part(None, form_of(evaluation), outside))
    masked = info.form not in (TEXT, PREFERENCES)
    train = [tokenize(part.train, tokenizer, sequence_length, part.form, notes, masked) for part in parts
             if part.train is not None]
    info.cut = sum(cut for _, cut in train)
    pieces = joined([table for table, _ in train])
    held_out = joined([tokenize(part.held_out, tokenizer, sequence_length, part.form, notes, masked)[0]
                       for part in parts if part.held_out is not None], numbered=False)
    info.notes = dict(notes)
    unread = [part.held_out["text"] for part in parts if part.held_out is not None]
    info.eval_documents = sum(map(len, unread))
    info.gzip_bits_per_byte = gzip_bits(itertools.chain(*unread)) if info.form == TEXT else None
    if not info.eval_documents and options.eval_fraction and len(pieces) > 1 and not options.streaming:
        count = max(1, round(len(pieces) * options.eval_fraction))
        order = pieces.train_test_split(test_size=count, seed=options.seed)
        pieces, held_out, info.eval_by_pieces = order["train"], order["test"], True
        if info.form == TEXT:
            info.gzip_bits_per_byte = gzip_bits(tokenizer.batch_decode(order["test"]["input_ids"][:], True))
    if not len(pieces):
        raise UserError(f"{info.name}: nothing to train on: {info.documents} documents, none with two tokens or more")
    made = scratch / "made"
    pieces.save_to_disk(str(made / "train"))
    if len(held_out):  # datasets cannot load a table without rows
        held_out.save_to_disk(str(made / "eval"))
    tokenizer.save_pretrained(str(made / "tokenizer"))
    told = {name: value for name, value in asdict(info).items() if value or name != "sources"}  # for older versions
    (made / "info.json").write_text(json.dumps(told, indent=1))
    return made
