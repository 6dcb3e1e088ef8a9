"""Watches a training for hangs, and has every rank asked where it is while nothing moves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from master.diagnosis.hang_detector import HangDetector
from master.diagnosis.hang_report import HangReport, ask_all, explain
from master.ssh.session import Session


@dataclass(frozen=True)
class WatchedJob:
    """A job by its name, its run folder, and by host its ranks and the Python that trains there."""

    name: str
    run: Path
    ranks: Mapping[str, Sequence[int]]
    pythons: Mapping[str, str]


class HangWatch(HangDetector):
    """A HangDetector that explains what it has found: `examine`, and, once all have answered, `take`."""

    def __init__(self, limit: float | None, job: WatchedJob) -> None:
        super().__init__(limit)
        self._job = job
        self._found: HangReport | None = None
        self._thread: threading.Thread | None = None

    def examine(self, sessions: Mapping[str, Session | None], ended: Mapping[int, str]) -> None:
        """Ask every rank, in a thread of its own; `ended`: how ranks have ended."""
        def ask() -> None:
            answers = ask_all(sessions, self._job.pythons, self._job.name)
            self._found = explain(answers, self._job.ranks, ended)

        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=ask, daemon=True)
            self._thread.start()

    def take(self, say: Callable[[str], None]) -> HangReport | None:
        """Return the report if there is a new one, told and kept in the run folder."""
        report, self._found = self._found, None
        if report is None:
            return None
        for line in report.lines():
            say(line)
        try:
            say(f"all stacks: {report.keep(self._job.run)}")
        except OSError as error:
            say(f"the stacks can't be kept: {error}")
        return report
