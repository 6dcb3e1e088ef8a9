"""Data that is read while it is trained on: an endless stream of sequences, one per rank, which can be resumed.

Documents are numbered as they come; rank r of n takes each n-th. It packs as many as fill a few hundred sequences,
shuffles those, and continues; after the last document it starts again. Where a sequence came from is known, so a run
resumes with the very next one: the documents before it are read past, not tokenized.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.data.documents import Document
from trainer.data.held_out import digest_of
from trainer.data.rows import TEXT
from trainer.data.tokenization import pieces_of
from trainer.errors import UserError
from trainer.sequences.packing import PackedSequence, best_fit

BLOCK_SEQUENCES = 512  # are packed together: enough to fill them, few enough to hold
DOCUMENTS_AT_ONCE = 100  # are tokenized together


@dataclass(frozen=True)
class StreamPosition:
    """Where a block of sequences begins: pass over the source, next document in it, sequences before it."""

    turn: int = 0
    document: int = 0
    sequences: int = 0


@dataclass(frozen=True)
class StreamSettings:
    """What a rank reads: documents from a number on, their form, how they become tokens, which are held out."""

    read: Callable[[int], Iterator[Document]]
    form: str
    tokenizer: Any
    length: int
    held_out: frozenset[str]
    rank: int
    world_size: int
    seed: int


class Stream(torch.utils.data.IterableDataset[PackedSequence]):
    """This rank's sequences, without end. `capacity`: tokens per sequence, None for one document in each."""

    def __init__(self, reading: StreamSettings, capacity: int | None) -> None:
        self._reading, self._capacity = reading, capacity
        self._start, self._skip = StreamPosition(), 0
        self._begun: deque[StreamPosition] = deque([self._start], maxlen=64)

    def position_after(self, sequences: int) -> StreamPosition:
        """Return the position of the block that holds the next sequence after so many."""
        return [place for place in self._begun if place.sequences <= sequences][-1]

    def resume_at(self, place: StreamPosition, sequences: int) -> None:
        """Begin after so many sequences, in the block that begins at `place`."""
        self._start, self._skip = place, sequences - place.sequences
        self._begun = deque([place], maxlen=64)

    def __iter__(self) -> Iterator[PackedSequence]:
        place, skip = self._start, self._skip
        with ThreadPoolExecutor(1) as ahead:  # tokenizers let go of Python's lock: the next block comes meanwhile
            blocks = self._blocks(place)
            coming = ahead.submit(next, blocks)
            while True:
                sequences, before, after = coming.result()
                coming = ahead.submit(next, blocks)
                self._begun.append(StreamPosition(before.turn, before.document, place.sequences))
                yield from sequences[skip:]
                skip, place = 0, StreamPosition(after.turn, after.document, place.sequences + len(sequences))

    def _blocks(self, place: StreamPosition) -> Iterator[tuple[list[PackedSequence], StreamPosition, StreamPosition]]:
        """Yield blocks of sequences, each with the positions where it begins and ends (without their sequences)."""
        pieces: list[dict[str, Any]] = []
        waiting: list[Document] = []
        before, reading = place, self._reading
        enough = BLOCK_SEQUENCES * (self._capacity or reading.length)
        for text, after in self._documents(place):
            if text is not None:
                waiting.append(text)
            if text is None or len(waiting) == DOCUMENTS_AT_ONCE:
                made = pieces_of(waiting, reading.tokenizer, reading.length, reading.form) if waiting else ()
                pieces += [piece for each in made for piece in each]
                waiting = []
            if text is None or (not waiting and sum(piece["length"] for piece in pieces) >= enough):
                if pieces:
                    yield self._sequences(pieces, before), before, after
                pieces, before = [], after

    def _sequences(self, pieces: list[dict[str, Any]], place: StreamPosition) -> list[PackedSequence]:
        lengths = [piece["length"] for piece in pieces]
        order = best_fit(lengths, self._capacity) if self._capacity else [[number] for number in range(len(pieces))]
        seed = f"{self._reading.seed} {self._reading.rank} {place.turn} {place.document}"
        random.Random(seed).shuffle(order)  # noqa: S311
        masked = self._reading.form != TEXT
        return [PackedSequence([np.array(pieces[number]["input_ids"]) for number in row],
                    [np.array(pieces[number]["loss_mask"]) for number in row] if masked else None) for row in order]

    def _documents(self, place: StreamPosition) -> Iterator[tuple[Document | None, StreamPosition]]:
        """Yield this rank's documents, each with the place after it, over and over; None at the end of each pass."""
        reading, start = self._reading, place.document
        for turn in itertools.count(place.turn):
            found = False
            for number, text in enumerate(reading.read(start), start):
                if number % reading.world_size != reading.rank or not text.strip():
                    continue
                if digest_of(text) not in reading.held_out:
                    found = True
                    yield text, StreamPosition(turn, number + 1)
            if not found and not start:
                raise UserError(f"the data has no document for rank {reading.rank} of {reading.world_size}")
            start = 0
            yield None, StreamPosition(turn + 1)


def state_file(checkpoint: Path, rank: int) -> Path:
    """Return the file of a checkpoint that has a rank's place in its stream."""
    return checkpoint / f"stream_{rank}.json"


def save(stream: Stream, sequences: int, checkpoint: Path, rank: int) -> None:
    """Write where this rank is in its stream after so many sequences."""
    at = stream.position_after(sequences)
    state = {"turn": at.turn, "document": at.document, "rows": at.sequences, "read": sequences}
    state_file(checkpoint, rank).write_text(json.dumps(state))


def load(stream: Stream, checkpoint: Path, rank: int) -> None:
    """Have a stream continue after the sequences that were trained on. Raises UserError where a checkpoint doesn't
    say."""
    try:
        state = json.loads(state_file(checkpoint, rank).read_text())
        stream.resume_at(StreamPosition(state["turn"], state["document"], state["rows"]), state["read"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{state_file(checkpoint, rank)}: {error}: this checkpoint is of a run without --streaming, "
                        "or of other ranks") from None
