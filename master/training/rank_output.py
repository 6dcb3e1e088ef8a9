"""Which output of the ranks is shown while a training runs, and what is kept in the run folder.

Rank 0's lines are shown at once, its steps as a bar where there is a terminal; a warning of several other ranks is
shown
once. Everything is kept in logs/<host>.log.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

from master.core.terminal import is_terminal, one_line, print_lines, say

STEP = re.compile(r"^step +(\d+)/(\d+)(?:  (.*))?$")  # as the trainer says it
GATHERED = 2.0  # seconds in which other ranks may say the same
PASSING = re.compile(r"0x[0-9a-f]+|[\d.:]+")  # what differs between ranks that say the same


class RankOutput:
    """Takes in what one thread tells it; `close` before anything else is printed."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._warnings: dict[str, tuple[float, str, list[str]]] = {}  # kind -> since when, its first text, who
        self._told = set[str]()
        self._bar: Any = None
        self._task: Any = None
        (run / "logs").mkdir(parents=True, exist_ok=True)

    def show(self, host: str, rank: int | None, text: str) -> None:
        """Handle a line that a rank, or the launcher (None), has printed."""
        with (self._run / "logs" / f"{host}.log").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%H:%M:%S')} [{'-' if rank is None else rank}] {text}\n")
        if rank == 0:
            if not (is_terminal() and sys.stdout.isatty() and (step := STEP.match(text)) and self._move(step)):
                print_lines(text.expandtabs())
            self._told.add(PASSING.sub("", text))
        elif "warning" in text.lower() and (kind := PASSING.sub("", text)) not in self._told:
            _, _, who = self._warnings.setdefault(kind, (time.monotonic(), text, []))
            who.append(f"{host}, {'launcher' if rank is None else f'rank {rank}'}")

    def add_metrics(self, line: str | None) -> None:
        """Handle a line of the metrics.jsonl of a run folder elsewhere; None: it starts again from the beginning."""
        with (self._run / "metrics.jsonl").open("w" if line is None else "a", encoding="utf-8") as file:
            file.write("" if line is None else line + "\n")

    def show_progress(self, rank: int, text: str) -> None:
        """Handle what a rank says that it does."""
        if rank == 0 and is_terminal() and (step := STEP.match(text)):
            self._move(step)

    def pass_time(self, every: float = GATHERED) -> None:
        """Print warnings that have been collected for so long."""
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


def new_bar() -> Any:
    """Return a progress bar on stderr; what is printed meanwhile goes above it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None),
                    TextColumn("{task.description}", markup=False), console=Console(stderr=True), transient=True,
                    redirect_stdout=sys.stdout.isatty())
