"""Documents as pieces: a document's tokens, or, of one longer than a row, parts that overlap by a single token.

So every token but a document's first is predicted exactly once. Of conversations each token has whether it carries
loss.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.data import chat, preferences
from trainer.data.chat import EncodedDocument
from trainer.data.documents import Document
from trainer.data.preferences import PAIR_COLUMNS
from trainer.data.rows import PREFERENCES, TEXT
from trainer.distributed import heartbeat

BATCH = 100  # documents tokenized at once: enough for all cores; more only takes memory


def tokenize(texts: Any, tokenizer: Any, sequence_length: int, form: str = TEXT, notes: Counter[str] | None = None,
             masked: bool = False) -> tuple[Any, int]:
    """Return the pieces of all texts (columns text and where), and how many documents were cut.

    `notes` counts what was left out, by what it was; `masked`: plain text has a conversation's columns too. Columns:
    input_ids; length in tokens; bytes, the UTF-8 bytes of the trained tokens (null if the tokenizer doesn't know where
    its tokens stand in the text); of conversations also loss_mask, 1 for a token that is trained, and loss_tokens, how
    many are. Of pairs: prompt_ids, chosen_ids, rejected_ids, length.
    """
    from datasets import Dataset, Features, List, Value

    features = Features({"input_ids": List(Value("int32")), "length": Value("int32"), "bytes": Value("int64")})
    if form == PREFERENCES:
        features = Features({name: List(Value("int32")) for name in PAIR_COLUMNS} | {"length": Value("int32")})
    elif form != TEXT or masked:
        features |= {"loss_mask": List(Value("int8")), "loss_tokens": Value("int32")}
    if not len(texts):  # datasets leaves the columns of an empty table as they were
        return Dataset.from_dict({name: [] for name in features}, features=features), 0
    cut = done = 0
    counted = Counter() if notes is None else notes

    def batch(columns: dict[str, list[str]]) -> dict[str, list[Any]]:
        nonlocal cut, done
        heartbeat.report(f"tokenizing, {(done := done + len(columns['text'])):,} of {len(texts):,} documents",
                         often=True)
        made: dict[str, list[Any]] = {name: [] for name in features}
        documents = [Document(text, where) for text, where in zip(columns["text"], columns["where"], strict=True)]
        for pieces in pieces_of(documents, tokenizer, sequence_length, form, counted):
            cut += len(pieces) > 1
            for piece in pieces:
                if masked and form == TEXT:  # all tokens but the first
                    piece["loss_tokens"] = piece["length"] - 1
                    piece["loss_mask"] = [0] + [1] * piece["loss_tokens"]
                for name, value in piece.items():
                    made[name].append(value)
        return made

    # A fingerprint of its own keeps datasets from hashing the function and the tokenizer that it refers to.
    pieces = texts.map(batch, batched=True, batch_size=BATCH, remove_columns=["text", "where"], features=features,
                       new_fingerprint=os.urandom(8).hex())
    return pieces, cut


def joined(tables: list[Any], numbered: bool = True) -> Any:
    """Return tables one after the other; of several each row says which it comes from (column source, from 0)."""
    from datasets import Value, concatenate_datasets

    if len(tables) > 1 and numbered:
        tables = [table.add_column("source", np.full(len(table), number, dtype=np.int32), feature=Value("int32"))
                  for number, table in enumerate(tables)]
    filled = [table for table in tables if len(table)]
    return concatenate_datasets(filled) if filled else tables[0]


def pieces_of(texts: list[Document], tokenizer: Any, sequence_length: int, form: str, notes: Counter[str] | None = None
              ) -> Iterator[list[dict[str, Any]]]:
    """Yield the pieces of each document, as in `tokenize`'s columns."""
    if form == PREFERENCES:
        yield from preferences.pieces(texts, tokenizer, sequence_length, notes)
    elif form == TEXT:
        yield from each_text(texts, tokenizer, sequence_length)
    else:
        for text in texts:
            made = chat.encode(text, tokenizer, notes)
            pieces = list(conversation_pieces(made, sequence_length))
            if notes is not None and len(pieces) < len(list(cut_document(len(made.ids), sequence_length))):
                notes["a conversation longer than a sequence, of which parts without a trained token are left out"] += 1
            yield pieces


def each_text(texts: Sequence[str], tokenizer: Any, longest: int) -> Iterator[list[dict[str, Any]]]:
    """Yield each text's pieces."""
    encoded = tokenizer(texts, return_offsets_mapping=tokenizer.is_fast, return_attention_mask=False, verbose=False)
    offsets = encoded.get("offset_mapping", [None] * len(texts))
    for text, ids, places in zip(texts, encoded["input_ids"], offsets, strict=True):
        if places is not None:
            ids, places = chat.without_doubles(ids, places, tokenizer)
        ends = [end for _, end in places] if places is not None else None
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        yield [{"input_ids": ids[start:end], "length": end - start,
                "bytes": None if ends is None else piece_bytes(text, ends, start, end)}
               for start, end in cut_document(len(ids), longest)]


def conversation_pieces(document: EncodedDocument, longest: int) -> Iterator[dict[str, Any]]:
    """Yield the pieces of a conversation; one in which nothing carries loss teaches nothing, and is left out."""
    for start, end in cut_document(len(document.ids), longest):
        loss_mask = [False, *document.loss_mask[start + 1 : end]]  # the first has nothing before it
        if any(loss_mask):
            sizes = document.sizes[start:end]
            yield {"input_ids": document.ids[start:end], "length": end - start, "loss_mask": loss_mask,
                   "loss_tokens": sum(loss_mask),
                   "bytes": sum(size for size, learnt in zip(sizes, loss_mask, strict=True) if learnt)}


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
