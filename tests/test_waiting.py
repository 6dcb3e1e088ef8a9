"""`trainer/waiting.py` and `progress.py`: whose time goes by in waiting, and what a rank says that it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer import progress
from trainer.waiting import shares


def test_the_rank_that_waits_least_is_the_slowest() -> None:
    found = shares([5.0, 2.0, 7.0], [10.0, 10.0, 10.0], ["gpu1", "gpu2", "gpu3"])
    assert found == {"network": 0.2, "slowest": 0.4, "slowest_rank": 1, "slowest_host": "gpu2"}


@pytest.mark.parametrize("steps", [[10.0], [0.0, 10.0], []])
def test_without_steps_of_several_ranks_nothing_is_said(steps: list[float]) -> None:
    assert shares([1.0] * len(steps), steps, ["gpu1"] * len(steps)) is None


def test_a_rank_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    progress.tell("to nobody")
    monkeypatch.setenv("LANSPEED_PROGRESS", str(tmp_path))
    progress.tell("saving")
    progress.tell("step 1/9", often=True)  # too soon after the other
    assert (tmp_path / "3").read_text() == "saving"
    progress.tell("step 2/9")
    assert (tmp_path / "3").read_text() == "step 2/9"
    monkeypatch.setenv("LANSPEED_PROGRESS", str(tmp_path / "gone"))
    progress.tell("to a folder that isn't there")
