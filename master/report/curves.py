"""Figures along a run: read on from where the last look ended, thinned to as many points as a chart can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from master.diagnosis.run_state import figure
from master.run.metrics_file import MetricsFile

MOST = 600  # points of a curve
Points = list[tuple[float, float]]


class Curve:
    """Points in their order; of too many every second one is left out, and so on."""

    def __init__(self) -> None:
        self.points: Points = []
        self._every, self._passed = 1, 0

    def add(self, x: float, y: float) -> None:
        """Add a point."""
        self.last = (x, y)
        if self._passed % self._every == 0:
            self.points.append((x, y))
        self._passed += 1
        if len(self.points) > 2 * MOST:
            self.points = self.points[::2]
            self._every *= 2

    def shown(self) -> Points:
        """Return the points, the last one among them."""
        return self.points if not self.points or self.points[-1] == self.last else [*self.points, self.last]


class Curves(MetricsFile):
    """Curves of a file whose lines are objects, by the names of their figures, along `x`."""

    def __init__(self, path: Path, x: str = "step") -> None:
        super().__init__(path)
        self._x, self.curves = x, dict[str, Curve]()

    def forget(self) -> None:
        """Forget what was read: the file is another one."""
        super().forget()
        self.curves = {}

    def take(self, row: dict[str, Any]) -> None:
        """Take in a line. Raises TypeError, KeyError, ValueError for one that says nothing."""
        super().take(row)
        at = figure(row[self._x])
        for name, value in self.figures(row):
            y = figure(value)
            if at is not None and y is not None:
                self.curves.setdefault(name, Curve()).add(at, y)

    def figures(self, row: dict[str, Any]) -> list[tuple[str, Any]]:
        """Return the figures of a line."""
        return list(row.items())

    def points(self, name: str) -> Points:
        """Return a curve's points, [] if there is none."""
        return self.curves[name].shown() if name in self.curves else []


class HostCurves(Curves):
    """Curves of hosts.jsonl along the time, by "<kind> <host>", where kind is gpu, gpu memory, cpu, memory, network.

    Use and memory in percent, the network in bytes a second, in and out together.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "time")
        self.hosts: dict[str, None] = {}

    def figures(self, row: dict[str, Any]) -> list[tuple[str, Any]]:
        """Return the figures of all hosts in a line."""
        found = []
        for host, told in list(row["hosts"].items())[:64]:
            name = str(host)[:100]
            self.hosts[name] = None
            gpus = [gpu for gpu in told["gpus"] if isinstance(gpu, dict)][:64]
            found += [(f"gpu {name}", mean([figure(gpu.get("use_percent")) for gpu in gpus])),
                      (f"gpu memory {name}", share(gpus, "memory_used_mib", "memory_total_mib")),
                      (f"cpu {name}", told.get("cpu_percent")),
                      (f"memory {name}", share([told], "ram_used_mib", "ram_mib")),
                      (f"network {name}", total([figure(told.get("in")), figure(told.get("out"))]))]
        return found


def mean(values: list[float | None]) -> float | None:
    """Return the mean of the numbers that are known, None for none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def total(values: list[float | None]) -> float:
    """Return the sum of the numbers that are known."""
    return sum(value for value in values if value is not None)


def share(parts: list[dict[str, Any]], used: str, whole: str) -> float | None:
    """Return a percentage over all parts, None where it isn't known."""
    pairs = [(figure(part.get(used)), figure(part.get(whole))) for part in parts]
    known = [(one, other) for one, other in pairs if one is not None and other]
    return 100 * sum(one for one, _ in known) / sum(other for _, other in known) if known else None
