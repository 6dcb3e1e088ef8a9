"""The newest figures of a run's metrics.jsonl, read on from where the last look ended: it may grow to a gigabyte."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path
from typing import Any

from master.core.json_schema import loads

BLOCK = 1 << 20
LATELY = 10  # rows of losses


class MetricsFile:
    """What the lines so far say, the newest of each name; a file that was written anew is read anew."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._file = path, 0, 0
        self._rest = b""
        self._newest: dict[str, Any] = {}
        self._lately: deque[tuple[float, float]] = deque(maxlen=LATELY)  # steps with their times

    def newest(self) -> dict[str, Any]:
        """Read what has come, and return all that is known; {} where there is no file."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            now = os.fstat(file.fileno())
            if now.st_ino != self._file or now.st_size < self._at:
                self._file, self._at, self._rest = now.st_ino, 0, b""
                self.forget()
            file.seek(self._at)
            while block := file.read(BLOCK):
                self._at += len(block)
                *lines, self._rest = (self._rest + block).split(b"\n")
                self._rest = self._rest[-BLOCK:]
                for line in lines:
                    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
                        self.take(loads(line.decode("utf-8", "replace")))
        return self._newest

    def forget(self) -> None:
        """Forget what was read: the file is another one."""
        self._newest = {}
        self._lately.clear()

    def take(self, row: dict[str, Any]) -> None:
        """Take in a line. Raises TypeError, KeyError, ValueError for one that says nothing."""
        self._newest |= row
        if "loss" in row:
            self._lately.append((float(row["step"]), float(row["time"])))

    def seconds_per_step(self) -> float | None:
        """Return what a step has taken lately, None where too few are known."""
        if len(self._lately) < 2:
            return None
        (first, since), (last, until) = self._lately[0], self._lately[-1]
        return (until - since) / (last - first) if last > first and until > since else None
