"""All that a run folder says of a run, read for its report. Nothing of it is believed to be well-formed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from master.core.json_schema import loads
from master.diagnosis.run_history import EVENTS, HOSTS
from master.diagnosis.run_state import figure, look
from master.report.curves import Curves, HostCurves
from master.run.launcher_process import read_object

MOST_SAMPLES, MOST_EVENTS = 12, 200
TEXT_BYTES, EVENT_BYTES = 20_000, 512 << 10  # of a text that is shown; of the end of events.jsonl


class RunData:
    """A run as its folder has it; `read` looks again, at what has come since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = Curves(path / "metrics.jsonl")
        self.hosts = HostCurves(path / HOSTS)
        self.record: dict[str, Any] = {}
        self.state: dict[str, Any] = {}

    def read(self) -> RunData:
        """Read what there is now; return this."""
        self.record = read_object(self.path / "run.json")
        self.hosts.newest()
        self.state = look(self.path, self.metrics)
        return self

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.path.resolve().name

    @property
    def started(self) -> float | None:
        """When it began, in seconds since 1970: the first time that is known."""
        known = [points[0][0] for host in self.hosts.hosts for points in [self.hosts.points(f"cpu {host}")] if points]
        times = [value for value in (figure(self.record.get("started")), *known) if value]
        return min(times) if times else None

    def part(self, name: str) -> dict[str, Any]:
        """Return an object of run.json, {} where there is none."""
        found = self.record.get(name)
        return found if isinstance(found, dict) else {}

    def number(self, name: str, part: str = "") -> float | None:
        """Return a number of run.json, or of an object in it; None where there is none."""
        return figure((self.part(part) if part else self.record).get(name))

    def plan(self) -> dict[str, Any]:
        """Return plan.json."""
        return read_object(self.path / "plan.json")

    def text(self, name: str, most: int = TEXT_BYTES) -> str:
        """Return the beginning of a text of the folder, "" if it isn't there."""
        path = self.path / name
        try:
            if path.is_symlink() or not path.is_file():
                return ""
            with path.open("rb") as file:
                return file.read(most).decode("utf-8", "replace")
        except OSError:
            return ""

    def samples(self) -> list[str]:
        """Return what the model said, the newest last; of many some, the first and the last among them."""
        names = sorted(path.name for path in (self.path / "samples").glob("step-*.txt"))
        if len(names) > MOST_SAMPLES:
            last = len(names) - 1
            names = [names[round(number * last / (MOST_SAMPLES - 1))] for number in range(MOST_SAMPLES)]
        return [text for name in names if (text := self.text(f"samples/{name}"))]

    def events(self) -> list[tuple[float, str]]:
        """Return what happened, with its time, the newest last."""
        found = [(at, str(row.get("text"))) for row in self._rows(EVENTS)
                 if (at := figure(row.get("time"))) is not None and isinstance(row.get("text"), str)]
        if (resumed := self.number("resumed_at")) and (started := self.number("started")):
            found.append((started, f"resumed after step {resumed:,.0f}"))
        return sorted(found)[-MOST_EVENTS:]

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the objects at the end of a file of lines."""
        path = self.path / name
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - EVENT_BYTES))
                lines = file.read(EVENT_BYTES).splitlines()
        except OSError:
            return
        for line in lines:
            try:
                row = loads(line.decode("utf-8", "replace"))
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def when(seconds: float) -> str:
    """Return a time as people write it."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
