"""Rows: nothing cut that fits, nothing lost, nothing seen across documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.sequences.packing import FILLER, IGNORED, Collator, PackedSequence, best_fit


@given(st.integers(1, 300).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=200))))
def test_every_item_lies_in_one_bin_and_no_bin_overflows(case: tuple[int, list[int]]) -> None:
    room, lengths = case
    bins = best_fit(lengths, room)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in items) <= room for items in bins)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200))
def test_two_bins_never_fit_into_one(lengths: list[int]) -> None:
    loads = sorted(sum(lengths[item] for item in items) for items in best_fit(lengths, 100))
    assert len(loads) < 2 or loads[0] + loads[1] > 100


def test_the_tightest_bin_is_taken() -> None:
    assert best_fit([60, 70, 30, 40], 100) == [[1, 2], [0, 3]]


def test_an_item_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="101 does not fit into 100"):
        best_fit([5, 101], 100)


def test_tensors_of_a_packed_row_are_as_written_by_hand() -> None:
    batch = Collator(pad_token=9, width=7)([PackedSequence([np.array([1, 2, 3]), np.array([4, 5])]), FILLER])
    no = IGNORED
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9], [9] * 7]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], list(range(7))]
    assert batch["labels"].tolist() == [[no, 2, 3, no, 5, no, no], [no] * 7]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_without_a_width_rows_are_padded_to_the_longest() -> None:
    batch = Collator(pad_token=0, width=None)([PackedSequence([np.arange(1, 4)]), PackedSequence([np.arange(1, 6)])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
