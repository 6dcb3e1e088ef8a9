"""Sequences for training: whole documents packed side by side, or one per sequence, and the tensors made of them.

Documents in one sequence are isolated in two ways: positions start anew with each, and the first label of each is
masked. transformers then builds an attention mask that keeps them apart, but only if the model is called with
`use_cache=False` and without an attention_mask; otherwise they leak into each other silently
(`trainer/model/isolation.py` looks).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

IGNORED = -100  # the label that torch's cross entropy leaves out


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items of the given lengths into bins of `capacity`; return each bin's item numbers, nothing cut or lost.

    Best-fit decreasing: the longest item first, each into the fullest bin where it still fits. The bins'
free space is kept as bits of one integer, so that the tightest fit is a shift and a lowest-bit search.
    Raises ValueError for an item longer than the capacity.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free space -> bins that have exactly so much
    rooms = 0  # bit r is set where by_room[r] has a bin
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"an item of {sizes.max()} does not fit into {capacity}")
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        by_room.setdefault(room - size, []).append(number)
        rooms |= 1 << (room - size)
    return bins


class PackedSequence(NamedTuple):
    """One sequence before it becomes tensors: the token lists of its documents (none in a filler).

    `loss_masks` has for each of them which tokens are trained; None: all but the first. `sources`: of which dataset
    each is, by number; None where there is one.
    """

    documents: list[np.ndarray]
    loss_masks: list[np.ndarray] | None = None
    sources: list[int] | None = None


FILLER = PackedSequence([])


class PackedSequences(torch.utils.data.Dataset[PackedSequence]):
    """Rows over a table of tokenized pieces, made when they are asked for.

    `pieces` has the columns input_ids, length and bytes, and of conversations loss_mask and loss_tokens. The number of
    sequences is a multiple of `multiple_of`: filler sequences without documents are added, so that no sequence is
    repeated and every rank has the same work.
    """

    def __init__(self, pieces: Any, capacity: int | None, multiple_of: int = 1, order: list[list[int]] | None = None,
                 epoch: np.ndarray | None = None) -> None:
        """Pack to `capacity` tokens per sequence, or with None put one piece in each.

        `order`: the numbers of each sequence's pieces, where they were packed before; `epoch`: those of an epoch,
        where it isn't each piece once.
        """
        self._table = pieces.with_format("numpy") if len(pieces) else pieces
        lengths: Any = self._table["length"][:] if len(pieces) else np.zeros(0, dtype=np.int64)
        if order is None:
            numbers = np.arange(len(lengths)) if epoch is None else epoch
            bins = best_fit(lengths[numbers], capacity) if capacity else [[number] for number in range(len(numbers))]
            order = bins if epoch is None else [numbers[each].tolist() for each in bins]
        self._order, self.filled = order, len(order)
        columns = ["input_ids", *(name for name in ("loss_mask", "source") if name in pieces.column_names)]
        self._masked, self._mixed = len(pieces) > 0 and "loss_mask" in columns, "source" in columns
        self._pieces = pieces.with_format("numpy", columns=columns)
        chosen = self._chosen()
        self.tokens = int(lengths[chosen].sum())
        self.loss_tokens = int(self._table["loss_tokens"][:][chosen].sum()) if self._masked else \
            self.tokens - len(chosen)  # the first token of each piece has nothing before it
        self._count = -(-len(order) // multiple_of) * multiple_of

    def _chosen(self) -> np.ndarray:
        """Return the numbers of all pieces of the sequences."""
        return np.fromiter(itertools.chain.from_iterable(self._order), dtype=np.int64)

    def spread(self, most: int) -> PackedSequences:
        """Return `most` of the sequences, evenly spread (the first ones have the longest documents), or all."""
        if self.filled <= most:
            return self
        return PackedSequences(self._table, None, order=[self._order[at * self.filled // most] for at in range(most)])

    def text_bytes(self) -> int | None:
        """Return the UTF-8 bytes of what is trained, None if they are unknown."""
        every = self._table.with_format(None)["bytes"][:] if self.filled else []
        sizes = [every[number] for number in self._chosen()]
        return int(sum(sizes)) if sizes and None not in sizes else None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> PackedSequence:
        if not 0 <= number < self._count:
            raise IndexError(number)
        if number >= self.filled:
            return FILLER
        chosen = self._pieces[self._order[number]]
        return PackedSequence(list(chosen["input_ids"]), list(chosen["loss_mask"]) if self._masked else None,
                              chosen["source"].tolist() if self._mixed else None)


def varlen_bounds(positions: torch.Tensor) -> dict[str, Any]:
    """Return what flash attention is told of documents laid end to end, from positions [sequences, width] on the CPU.

    cu_seq_lens_q and cu_seq_lens_k: where each begins, and the end, [documents + 1], int32; max_length_q and
    max_length_k: tokens of the longest. transformers makes them of positions itself for a single sequence only.
    """
    starts = (positions.reshape(-1) == 0).nonzero().flatten().to(torch.int32)
    bounds = torch.cat([starts, torch.tensor([positions.numel()], dtype=torch.int32)])
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


class Collator:
    """Make tensors of sequences: input_ids, position_ids and labels, each [sequences, width]; tokens, how many;
    trained, the numbers (counted over all sequences) of the tokens whose next one is trained; of several datasets
    by_source, the tokens of each. int64.

    `width` pads every sequence to the same width; None pads to the longest of the batch. Padding comes last, counts
    positions of its own and isn't trained, so it needs no attention mask.
    """

    def __init__(self, pad_token: int, width: int | None, sources: int = 1) -> None:
        self._pad_token, self._width, self._sources = pad_token, width, sources
        self.varlen = False  # add what flash attention is told

    def __call__(self, sequences: Iterable[PackedSequence]) -> dict[str, Any]:
        sequences = list(sequences)
        longest = max(sum(map(len, sequence.documents)) for sequence in sequences)
        width = self._width or max(longest, 2)
        shape = (len(sequences), width)
        tokens = np.full(shape, self._pad_token, dtype=np.int64)
        positions = np.empty(shape, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        for number, sequence in enumerate(sequences):
            start = 0
            for place, document in enumerate(sequence.documents):
                end = start + len(document)
                tokens[number, start:end] = document
                learnt = document if sequence.loss_masks is None else np.where(sequence.loss_masks[place], document,
                                                                               IGNORED)
                labels[number, start + 1 : end] = learnt[1:]
                positions[number, start:end] = np.arange(end - start)
                start = end
            positions[number, start:] = np.arange(width - start)
        trained = np.flatnonzero(np.pad(labels[:, 1:] != IGNORED, ((0, 0), (0, 1))))
        arrays = {"trained": trained, "input_ids": tokens, "position_ids": positions, "labels": labels}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self._sources > 1:
            tensors["by_source"] = torch.zeros(self._sources, dtype=torch.int64)
            for sequence in sequences:
                for document, source in zip(sequence.documents, sequence.sources or (), strict=False):
                    tensors["by_source"][source] += len(document)
        tensors["tokens"] = torch.tensor(sum(len(each) for sequence in sequences for each in sequence.documents))
        return tensors | (varlen_bounds(tensors["position_ids"]) if self.varlen else {})
