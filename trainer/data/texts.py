"""A source's documents as a table on disk: what is trained on, what is held out, and how far gzip packs it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.chat import conversation_text
from trainer.data.held_out import split
from trainer.data.rows import PREFERENCES, TEXT
from trainer.data.sources import Source
from trainer.errors import UserError
from trainer.options import Options


@dataclass
class Part:
    """One source's texts to train on and those held out (None: none), and their form."""

    train: Any
    form: str
    held_out: Any = None

    def words(self) -> Iterable[str]:
        """Return all text that is trained on."""
        return self.train["text"] if self.form == TEXT else map(conversation_text, self.train["text"])


def form_of(source: Source) -> str:
    """Return the form of a source that was read."""
    return source.extract.form or TEXT


def common_form(sources: list[Source], evaluation: Source | None) -> str:
    """Return the form of all sources, or all their forms; raise UserError for an evaluation of another form."""
    forms = sorted({form_of(source) for source in sources})
    if PREFERENCES in forms[1:] or forms[0] == PREFERENCES != forms[-1]:
        raise UserError(f"--dataset_path: {' and '.join(forms)} can't be trained together: one is learnt as text, the "
                        "other by comparison", shared=True)
    if evaluation and form_of(evaluation) not in forms:
        raise UserError(f"{evaluation.name} holds {form_of(evaluation)}, and {sources[0].name} {forms[0]}")
    return ", ".join(forms)


def divided(texts: Any, source: Source, options: Options) -> Part:
    """Return a source's texts with a share of them held out."""
    least = 1 if options.streaming and options.eval_fraction else 0  # pieces of what is read again won't do
    inside, outside = split(texts["text"], options.eval_fraction, options.seed, least)
    return Part(texts.select(inside), form_of(source), texts.select(outside))


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
