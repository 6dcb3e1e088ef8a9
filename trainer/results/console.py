"""What a person sees of a training: a block before it, a bar (or lines) during it, the paths to open after it.

Progress goes to stderr, the summary to stdout. Rank 0 speaks; another rank only warns. Each host's lines are kept
in the run folder's logs/<host>.log.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from trainer.distributed.ranks import Ranks


def duration(seconds: float) -> str:
    """Return seconds as 48s, 2m05s or 3h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def short(count: float) -> str:
    """Return a count like 950, 12.3k, 4.56M, 7.24B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"


def clean(text: str) -> str:
    """Return text that does nothing to a terminal: documents, templates and models may hold any characters."""
    return "".join(one if one.isprintable() or one in "\n\t" else "?" for one in text)


def silence_libraries() -> None:
    """Silence what libraries say that nobody can do anything about."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()


class Console:
    """Prints for one rank and keeps a log. Before the run folder is known, lines wait for it."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._waiting: list[str] = []
        self._kept_elsewhere = "LANSPEED_JOB" in os.environ
        self._log: Path | None = None
        self._bar: Any = None
        self._task: Any = None
        self._started = time.monotonic()
        self._first_step = 0

    def keep_log(self, folder: Path) -> None:
        """Write this host's lines to `folder`/<host>.log from now on, unless the launcher keeps what all ranks say."""
        folder.mkdir(parents=True, exist_ok=True)
        if self._kept_elsewhere:
            return
        self._log = folder / f"{self._ranks.host}.log"
        waiting, self._waiting = self._waiting, []
        for line in waiting:
            self.keep(line)

    def keep(self, line: str) -> None:
        """Write a line to the log alone."""
        if self._log is None:
            if not self._kept_elsewhere:
                self._waiting.append(line)
            return
        stamp = f"{time.strftime('%H:%M:%S')} [{self._ranks.rank}] "
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:  # a full disk shows elsewhere
            file.write("".join(f"{stamp}{part}\n" for part in clean(line).split("\n") if part.strip()))

    def _print(self, line: str, style: str | None = None, file: Any = None) -> None:
        line = clean(line)
        self.keep(line)
        if self._bar is not None:
            self._bar.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
            return
        try:
            print(line, file=file or sys.stderr, flush=True)
        except OSError as error:  # a full disk that holds the log ends no training
            if error.errno != errno.ENOSPC:
                raise

    def say(self, line: str) -> None:
        """Print a line of progress, on rank 0 only."""
        if self._ranks.is_first:
            self._print(line)

    def warn(self, line: str) -> None:
        """Print a warning, whichever rank has one, with the host's name unless there is only one."""
        where = "" if self._ranks.on_one_machine else f"{self._ranks.host}: "
        self._print(f"warning: {where}{line}", style="yellow")

    def error(self, line: str) -> None:
        """Print what ended this rank."""
        with contextlib.suppress(OSError):  # the output may be on the disk that is full
            self._print(f"error: {line}")

    def result(self, line: str) -> None:
        """Print a line of the outcome to stdout, on rank 0 only."""
        if self._ranks.is_first:
            self._print(line, file=sys.stdout)

    def block(self, title: str, rows: dict[str, str]) -> None:
        """Print a title and aligned rows, on rank 0 only."""
        width = max(map(len, rows))
        self.say("\n" + title)
        for name, value in rows.items():
            self.say(f"  {name:<{width}}  {value}")
        self.say("")

    def start_bar(self, step: int, total: int) -> None:
        """Begin the progress bar at `step` of `total`; without a terminal, lines take its place."""
        self._started, self._first_step = time.monotonic(), step
        if not (self._ranks.is_first and sys.stderr.isatty()):
            return
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.description}"),
            console=Terminal(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=total, completed=step)
        self._bar.start()

    def show_step(self, step: int, total: int) -> None:
        """Move the bar to `step`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show_metrics(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        """Show the loss, the rate and the time left: in the bar, and always in the log."""
        if not self._ranks.is_first:
            return
        pace = (time.monotonic() - self._started) / max(step - self._first_step, 1)
        text = (f"loss {metrics['loss']:.4f}  {short(metrics['tokens_per_second'])} tokens/s  "
                f"{duration(pace * (total - step))} left")
        if metrics.get("mfu") is not None:
            text += f"  MFU {metrics['mfu']:.0%}"
        if metrics.get("sent_per_step") is not None:
            text += f"  {metrics['sent_per_step'] / 1e6:,.3g} MB sent a step"
        if self._bar is not None:
            self._bar.update(self._task, description=text)
            self.keep(f"step {step}/{total}  {text}")
        else:
            self._print(f"step {step:>{len(str(total))}}/{total}  {text}")

    def stop_bar(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
