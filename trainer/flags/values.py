"""What the trainer's flags take as values: numbers of a range, intervals."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Read an integer above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def natural(text: str) -> int:
    """Read an integer from 0 up."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return int(text)


def fraction(text: str) -> float:
    """Read a number from 0 up to, but without, 1."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return float(text)


def every(text: str) -> float:
    """Read an interval: whole steps, or a share of all steps below 1 (0 for never)."""
    value = float(text)
    if value < 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text} is neither whole steps nor a share of them below 1")
    return value


# Those that rows are read by (trainer/data/rows.py).
COLUMNS = ("text", "messages", "prompt", "completion", "instruction", "input", "output", "conversations", "chosen",
           "rejected", "system", "tools", "history")


def column_names(text: str) -> dict[str, str]:
    """Read prompt=question,completion=answer as {"question": "prompt", "answer": "completion"}."""
    found = {}
    for pair in text.split(","):
        ours, _, theirs = pair.partition("=")
        if ours not in COLUMNS or not theirs:
            raise argparse.ArgumentTypeError(f"{pair}: write NAME=COLUMN with a NAME of {', '.join(COLUMNS)}")
        found[theirs] = ours
    return found


def layer_counts(text: str) -> tuple[int, ...]:
    """Read 32,16 (or [32,16]) as the layers of each rank."""
    try:
        found = tuple(int(word) for word in text.strip("[]").split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: write the layers of each rank, as in 32,16")
    return found
