"""Which output of the ranks is shown while a training runs, and what is kept in the run folder.

Rank 0's lines are shown at once, its steps as a bar where there is a terminal; a warning of several other ranks is
shown once. Everything is kept in logs/<host>.log, as far as LOG_LIMIT_BYTES.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from master.core.json_schema import loads
from master.core.terminal import is_terminal, one_line, print_lines, say

STEP = re.compile(r"^step +(\d+)/(\d+)(?:  (.*))?$")  # as the trainer says it
GATHERED = 2.0  # seconds in which other ranks may say the same
LOG_LIMIT_BYTES = 256 << 20  # of what one host's ranks print
METRICS_LIMIT_BYTES = 256 << 20
MOST_WARNINGS = 200  # that are shown; more are in the logs
PASSING = re.compile(r"0x[0-9a-f]+|[\d.:]+")  # what differs between ranks that say the same


class RankOutput:
    """Takes in what one thread tells it; `close` before anything else is printed."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._warnings: dict[str, tuple[float, str, list[str]]] = {}  # kind -> since when, its first text, who
        self._told = set[str]()
        self._logs: dict[str, BoundedFile] = {}
        self._metrics: BoundedFile | None = None
        self._bar: Any = None
        self._task: Any = None
        (run / "logs").mkdir(parents=True, exist_ok=True)

    def show(self, host: str, rank: int | None, text: str) -> None:
        """Handle a line that a rank, or the launcher (None), has printed."""
        if host not in self._logs:
            self._logs[host] = BoundedFile(self._run / "logs" / f"{host}.log", LOG_LIMIT_BYTES)
        line = one_line(text.expandtabs())
        self._logs[host].add(f"{time.strftime('%H:%M:%S')} [{'-' if rank is None else rank}] {line}\n")
        if rank == 0:
            if not (is_terminal() and sys.stdout.isatty() and (step := STEP.match(text)) and self._move(step)):
                print_lines(text.expandtabs())
            if len(self._told) < MOST_WARNINGS:
                self._told.add(PASSING.sub("", text))
        elif "warning" in text.lower() and (kind := PASSING.sub("", text)) not in self._told \
                and len(self._told) + len(self._warnings) < MOST_WARNINGS:
            _, _, who = self._warnings.setdefault(kind, (time.monotonic(), text, []))
            if len(who) < MOST_WARNINGS:
                who.append(f"{host}, {'launcher' if rank is None else f'rank {rank}'}")

    def add_metrics(self, line: str | None) -> None:
        """Handle a line of the metrics.jsonl of a run folder elsewhere; None: it starts again from the beginning.

        What is no JSON object is left out.
        """
        path = self._run / "metrics.jsonl"
        if line is None or self._metrics is None:
            if self._metrics:
                self._metrics.close()
            self._metrics = BoundedFile(path, METRICS_LIMIT_BYTES, fresh=line is None)
        with contextlib.suppress(ValueError):
            if line is not None and isinstance(row := loads(line), dict):
                self._metrics.add(json.dumps(row) + "\n")

    def show_progress(self, rank: int, text: str) -> None:
        """Handle what a rank says that it does."""
        if rank == 0 and is_terminal() and (step := STEP.match(text)):
            self._move(step)

    def pass_time(self, every: float = GATHERED) -> None:
        """Print warnings that have been collected for so long; remove the bar from a terminal that was closed."""
        if self._bar and not is_terminal():
            self._bar.stop()
            self._bar = None
        for kind, (since, text, who) in list(self._warnings.items()):
            if time.monotonic() - since >= every:
                del self._warnings[kind]
                self._told.add(kind)
                ranks = list(dict.fromkeys(who))
                say(f"{ranks[0] if len(ranks) == 1 else f'{len(ranks)} ranks'}: {text}")

    def close(self) -> None:
        """Print the rest, remove the bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        self.pass_time(0)
        for file in [*self._logs.values(), *([self._metrics] if self._metrics else [])]:
            file.close()

    def _move(self, step: re.Match[str]) -> bool:
        """Move the bar, which comes with the first step."""
        if self._bar is None:
            self._bar = new_bar()
            self._task = self._bar.add_task("", total=int(step[2]))
            self._bar.start()
        self._bar.update(self._task, completed=int(step[1]), total=int(step[2]))
        if step[3]:
            self._bar.update(self._task, description=one_line(step[3]))
        return True


class BoundedFile:
    """A file that lines are added to; of what is more than `limit` bytes only that is said, once."""

    def __init__(self, path: Path, limit: int, fresh: bool = False) -> None:
        self._path, self._limit = path, limit
        self._file = path.open("w" if fresh else "a", encoding="utf-8", errors="replace")
        self._bytes = path.stat().st_size

    def add(self, line: str) -> None:
        """Add a line, which others may read at once."""
        if self._bytes > self._limit:
            return
        self._bytes += len(line.encode("utf-8", "replace"))
        if self._bytes > self._limit:
            line = ""
            say(f"{self._path} has {self._limit >> 20} MiB: the rest is left out")
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Close it."""
        self._file.close()


def new_bar() -> Any:
    """Return a progress bar on stderr; what is printed meanwhile goes above it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None),
                    TextColumn("{task.description}", markup=False), console=Console(stderr=True), transient=True,
                    redirect_stdout=sys.stdout.isatty())
