"""`training/hang_detector.py`: when a training counts as hanging, and what is said of it."""

from __future__ import annotations

from master.diagnosis.hang_detector import LEAST, HangDetector


def test_signs_of_life_put_it_off() -> None:
    watch = HangDetector(10)
    assert watch.overdue(9) is None
    watch.line("gpu1", 9)
    assert watch.overdue(18) is None
    assert watch.overdue(20) == ("NO PROGRESS for 11 s: no step, evaluation, checkpoint or output. Last activity: "
                                 "gpu1: a line, 11 s ago. Ctrl-C stops")
    assert watch.overdue(25) is None and watch.overdue(31) is not None  # told again after as long


def test_ranks_that_tell_what_they_do_count_by_that() -> None:
    watch = HangDetector(10)
    watch.progress("gpu1", 0, 1, "step 3/9")
    watch.line("gpu1", 9)
    watch.progress("gpu2", 1, 2, "saving checkpoint-3")
    said = watch.overdue(13)
    assert said and "gpu1: step 3/9, 12 s ago; gpu2: saving checkpoint-3, 11 s ago" in said


def test_long_steps_have_a_longer_limit() -> None:
    watch = HangDetector(None)
    assert watch.limit == LEAST
    for number in range(5):
        watch.progress("gpu1", 0, 60.0 * 2 * number, f"step {2 * number}/100")
    assert watch.limit == 600
    assert watch.overdue(480 + 590) is None and watch.overdue(480 + 610)
    assert HangDetector(0).overdue(1e9) is None
