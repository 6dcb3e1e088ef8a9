"""Data for a training: read the documents, hold some out, tokenize once, keep the result for the next run.

What comes out is a table of pieces: a document's tokens, or, of one longer than a row, parts that overlap by a
single token, so that every token but a document's first is predicted exactly once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer import corpus, progress
from trainer.fault import Fault
from trainer.sources import Source, hashed, open_source

FORMAT = 1  # part of the cache's key: raise it when what is stored changes
BATCH = 100  # documents tokenized at once: enough for all cores; more only takes memory


@dataclass
class Facts:
    """What is known of prepared data; stored beside it. `gzip_bits_per_byte` is of the held-out text, gzip -9."""

    key: str
    name: str
    documents: int = 0
    dropped: int = 0
    cut: int = 0
    eval_documents: int = 0
    eval_by_pieces: bool = False
    eval_bytes: int | None = None
    gzip_bits_per_byte: float | None = None


@dataclass
class Prepared:
    """Tokenized pieces for training and evaluation (columns input_ids, length, bytes), and facts about them."""

    facts: Facts
    train: Any
    evaluation: Any
    folder: Path = field(default_factory=Path)


def cache_folder(options: argparse.Namespace) -> Path:
    """Return the folder that keeps prepared data."""
    home = options.cache_dir or os.environ.get("LANSPEED_CACHE") or Path.home() / ".cache" / "lanspeed"
    return Path(home).expanduser() / "data"


def prepare_dataset(
    options: argparse.Namespace,
    tokenizer_id: str,
    make_tokenizer: Callable[[Iterable[str]], Any],
    sequence_length: int,
    built_in: Callable[[], list[str]] = corpus.python_documents,
    say: Callable[[str], None] = print,
) -> Prepared:
    """Return the data that `options` name, tokenized into pieces of at most `sequence_length` tokens.

    `make_tokenizer` gets the training documents (a tokenizer may be trained on them) and returns one;
    `tokenizer_id` tells tokenizers apart in the cache. Raises Fault for data that can't be read or is empty.
    """
    source = open_source(options.dataset_path, options, built_in)
    evaluation = open_source(options.eval_dataset, options, built_in) if options.eval_dataset else None
    key = hashed(json.dumps(part).encode() for part in (
        FORMAT, source.fingerprint, evaluation and evaluation.fingerprint, tokenizer_id, sequence_length,
        options.eval_fraction, options.seed, options.text_column))[:32]
    folder = cache_folder(options) / key
    if (folder / "facts.json").exists():
        say(f"data: {source.name}, tokenized before ({folder})")
    else:
        say(f"data: {source.name}, tokenizing")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="making-", dir=folder.parent) as scratch:
            made = build(Path(scratch), Facts(key, source.name), source, evaluation, options,
                         make_tokenizer, sequence_length)
            try:
                os.rename(made, folder)
            except OSError:
                if not (folder / "facts.json").exists():  # else another run was faster
                    raise
    return load_prepared(folder)


def load_prepared(folder: Path) -> Prepared:
    """Open what `prepare_dataset` stored."""
    from datasets import load_from_disk

    facts = Facts(**json.loads((folder / "facts.json").read_text()))
    train = load_from_disk(str(folder / "train"))
    evaluation = load_from_disk(str(folder / "eval")) if (folder / "eval").exists() else train.select([])
    return Prepared(facts, train, evaluation, folder)


def build(
    scratch: Path,
    facts: Facts,
    source: Source,
    evaluation: Source | None,
    options: argparse.Namespace,
    make_tokenizer: Callable[[Iterable[str]], Any],
    sequence_length: int,
) -> Path:
    """Make everything in `scratch` and return the folder that is complete."""
    texts = read_texts(source, scratch, "texts")
    facts.documents, facts.dropped = len(texts), texts.dropped
    train, held_out = texts, read_texts(evaluation, scratch, "eval-texts") if evaluation else None
    if held_out is None:
        inside, outside = split(texts["text"], options.eval_fraction, options.seed)
        train, held_out = texts.select(inside), texts.select(outside)
    tokenizer = make_tokenizer(train["text"])
    train, facts.cut = tokenize(train, tokenizer, sequence_length)
    held_out_pieces, _ = tokenize(held_out, tokenizer, sequence_length)
    facts.eval_documents = len(held_out)
    facts.gzip_bits_per_byte = gzip_bits(held_out["text"])
    if not len(held_out) and options.eval_fraction and len(train) > 1:
        count = max(1, round(len(train) * options.eval_fraction))
        order = train.train_test_split(test_size=count, seed=options.seed)
        train, held_out_pieces, facts.eval_by_pieces = order["train"], order["test"], True
        facts.gzip_bits_per_byte = gzip_bits(tokenizer.batch_decode(order["test"]["input_ids"][:], True))
    if not len(train):
        raise Fault(f"{source.name}: nothing to train on: {facts.documents} documents, none with two tokens or more")
    sizes = held_out_pieces["bytes"][:]
    facts.eval_bytes = sum(sizes) if sizes and None not in sizes else None
    made = scratch / "made"
    train.save_to_disk(str(made / "train"))
    if len(held_out_pieces):  # datasets cannot load a table without rows
        held_out_pieces.save_to_disk(str(made / "eval"))
    tokenizer.save_pretrained(str(made / "tokenizer"))
    (made / "facts.json").write_text(json.dumps(asdict(facts), indent=1))
    return made


def read_texts(source: Source, scratch: Path, name: str) -> Any:
    """Read a source into a table on disk with the column `text`, without empty documents (counted in `.dropped`).

    Raises Fault if nothing is left.
    """
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    dropped, kept = 0, 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal dropped, kept
        for text in source.read():
            if text.strip():
                kept += 1
                yield {"text": text}
            else:
                dropped += 1

    try:
        # A name of its own keeps datasets from hashing the generator and everything that it refers to.
        table = Dataset.from_generator(rows, features=Features({"text": Value("large_string")}),
                                       cache_dir=str(scratch / name), fingerprint=name)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, Fault):
            raise error.__cause__ from None
        raise
    except ValueError:
        if kept:  # else: datasets cannot make a table without rows
            raise
        raise Fault(f"{source.name}: no documents" + (f": all {dropped:,} are empty" if dropped else "")) from None
    table.dropped = dropped
    return table


def split(texts: Iterable[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the documents to train on and of those held out, about `share` of all.

    A document's fate hangs on a hash of seed and text: equal documents stay on the same side, so that nothing held
    out is seen in training. Fewer documents than 1/share hold nothing out.
    """
    scores = [hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest() for text in texts]
    wanted = int(len(scores) * share)
    if not wanted:
        return list(range(len(scores))), []
    limit = sorted(scores)[wanted - 1]
    outside = [number for number, score in enumerate(scores) if score <= limit]
    if len(outside) == len(scores):  # all the same text
        return outside, []
    return [number for number, score in enumerate(scores) if score > limit], outside


def tokenize(texts: Any, tokenizer: Any, sequence_length: int) -> tuple[Any, int]:
    """Return the pieces of all texts, and how many documents were cut.

    Columns: input_ids; length in tokens; bytes, the UTF-8 bytes of the tokens that carry loss (null if the tokenizer
    doesn't know where its tokens stand in the text).
    """
    from datasets import Dataset, Features, List, Value

    features = Features({"input_ids": List(Value("int32")), "length": Value("int32"), "bytes": Value("int64")})
    if not len(texts):  # datasets leaves the columns of an empty table as they were
        return Dataset.from_dict({name: [] for name in features}, features=features), 0
    cut = done = 0

    def batch(columns: dict[str, list[str]]) -> dict[str, list[Any]]:
        nonlocal cut, done
        progress.tell(f"tokenizing, {(done := done + len(columns['text'])):,} of {len(texts):,} documents", often=True)
        made: dict[str, list[Any]] = {"input_ids": [], "length": [], "bytes": []}
        encoded = tokenizer(columns["text"], return_offsets_mapping=tokenizer.is_fast,
                            return_attention_mask=False, verbose=False)
        offsets = encoded.get("offset_mapping", [None] * len(columns["text"]))
        for text, ids, places in zip(columns["text"], encoded["input_ids"], offsets, strict=True):
            ends = [end for _, end in places] if places is not None else None
            if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
                ids = [*ids, tokenizer.eos_token_id]
            pieces = list(cut_document(len(ids), sequence_length))
            cut += len(pieces) > 1
            for start, end in pieces:
                made["input_ids"].append(ids[start:end])
                made["length"].append(end - start)
                made["bytes"].append(None if ends is None else piece_bytes(text, ends, start, end))
        return made

    # A fingerprint of its own keeps datasets from hashing the function and the tokenizer that it refers to.
    pieces = texts.map(batch, batched=True, batch_size=BATCH, remove_columns=["text"], features=features,
                       new_fingerprint=os.urandom(8).hex())
    return pieces, cut


def cut_document(length: int, longest: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the pieces of a document of `length` tokens; each begins with the last one's last token.

    A document of fewer than two tokens has nothing to predict and yields nothing.
    """
    step = max(longest - 1, 1)
    for start in range(0, length - 1, step):
        yield start, min(start + longest, length)


def piece_bytes(text: str, ends: list[int], start: int, end: int) -> int:
    """Return the UTF-8 bytes of tokens start+1 to end-1, given each token's end in the text, in characters."""
    first = ends[start]
    last = len(text) if end > len(ends) else max(ends[start:end])
    return len(text[first:last].encode())


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

