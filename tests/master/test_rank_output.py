"""`training/rank_output.py`: what of the ranks' words is shown, and how often."""

from __future__ import annotations

from pathlib import Path

import pytest

from master.training.rank_output import RankOutput


def test_what_ranks_warn_of_alike_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    screen = RankOutput(tmp_path)
    for rank in range(1, 5):
        screen.show(f"gpu{rank}", rank, f"[W{rank}12] Warning: slow path at 0x{rank}f")
    screen.show("gpu2", 2, "UserWarning: odd driver")
    screen.show("gpu2", 2, "nothing special")
    assert capfd.readouterr() == ("", "")
    screen.pass_time(0)
    assert capfd.readouterr().err.splitlines() == [
        "4 ranks: [W112] Warning: slow path at 0x1f", "gpu2, rank 2: UserWarning: odd driver"]
    screen.show("gpu3", 3, "[W99] Warning: slow path at 0x2")
    screen.close()
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "logs" / "gpu2.log").read_text().endswith(" [2] nothing special\n")


def test_the_first_rank_is_shown_without_codes_for_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    screen = RankOutput(tmp_path)
    screen.show("gpu1", 0, "step  3/9  loss 1\t2\x1b[31m")
    screen.show("gpu1", 0, "a warning of all")
    screen.show("gpu1", 1, "a warning of all")
    screen.show_progress(0, "step 4/9")
    screen.close()
    assert capfd.readouterr() == ("step  3/9  loss 1       2?[31m\na warning of all\n", "")
