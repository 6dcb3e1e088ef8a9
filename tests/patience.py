"""Waiting for what a program under test is to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until a condition holds; fail after so many seconds, which only a program that hangs takes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def steps_made(path: Path) -> int:
    """Return how many steps the run in a folder has reported."""
    metrics = path / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.exists() else 0
