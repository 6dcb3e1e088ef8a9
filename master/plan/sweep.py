"""Tokens a second by the number of machines, for links of 1 to 100 Gbit/s: a table and a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from master.core.run_cli import UsageError
from master.plan.machines import Machine, Network
from master.plan.ranking import best_of, wanted_kind
from master.plan.rates import Rate
from master.plan.ways import Estimate, Task, all_estimates
from trainer.estimate.traffic import goodput

LINKS = (1.0, 2.5, 10.0, 25.0, 100.0)  # Gbit/s
MOST = 1024
COLORS = ("#d1495b", "#edae49", "#66a182", "#2e4057", "#8d96a3")


@dataclass(frozen=True)
class Point:
    """So many machines on links of so many Gbit/s: the best way (None: nothing fits), and its efficiency, which is its
    tokens a second over that of as many machines without a network."""

    machines: int
    gbit: float
    best: Estimate | None
    efficiency: float


def counts_of(text: str) -> list[int]:
    """Return the numbers of machines of "1..64": the first, its doubles, the last. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,4})\.\.(\d{1,4})", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last <= MOST:
        raise UsageError(f"--nodes-sweep {text}: like 1..64, at most 1..{MOST}")
    counts = [first]
    while counts[-1] * 2 < last:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == last else [*counts, last]


def sweep(task: Task, machine: Machine, rates: Mapping[str, Rate], counts: Sequence[int], grows: bool) -> list[Point]:
    """Return the best way for each number of machines like this one and each link.

    `grows`: the global batch is that of one machine times their number.
    """
    alone = best_at(task, machine, rates, 1, None)
    kind = alone.way.kind if alone else None
    points = []
    for count in counts:
        task_now = replace(task, global_batch=task.global_batch * (count if grows else 1),
                           kinds=(kind,) if kind else task.kinds)
        for gbit in LINKS:
            best = best_at(task_now, machine, rates, count, gbit)
            ideal = count * alone.rate() if alone and alone.known else 0.0
            points.append(Point(count, gbit, best, best.rate() / ideal if best and ideal else 0.0))
    return points


def best_at(task: Task, machine: Machine, rates: Mapping[str, Rate], count: int, gbit: float | None) -> Estimate | None:
    """Return the best way on so many machines."""
    machines = tuple(replace(machine, name=f"host{number}") for number in range(1, count + 1))
    network = Network({}, {}, goodput(gbit * 1e9) if gbit else None)
    estimates = all_estimates(task, [machines], network, rates)
    kind = wanted_kind(estimates, task)
    return next(iter(best_of(estimates, kind).values())) if kind else None


def table(points: Sequence[Point]) -> list[str]:
    """Return tokens a second and efficiency in columns of links."""
    lines = ["machines  " + "".join(f"{f'{gbit:g} GbE':>20}" for gbit in LINKS)]
    for count in dict.fromkeys(point.machines for point in points):
        cells = [f"{point.best.rate():,.0f} ({point.efficiency:.0%})" if point.best and point.best.known else
                 "fits" if point.best else "-" for point in points if point.machines == count]
        lines.append(f"{count:>8}  " + "".join(f"{cell:>20}" for cell in cells))
    return lines


def as_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the points as data."""
    return [{"machines": point.machines, "gbit": point.gbit, "efficiency": point.efficiency,
             "tokens_per_second": point.best.rate() if point.best and point.best.known else None,
             "kind": point.best.way.kind if point.best else None,
             "zero_stage": point.best.way.stage if point.best else None} for point in points]


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw tokens a second by the number of machines, a line for each link, and perfect scaling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for gbit, color in zip(LINKS, COLORS, strict=True):
        mine = [point for point in points if point.gbit == gbit and point.best and point.best.known]
        axes.plot([point.machines for point in mine], [point.best.rate() for point in mine if point.best], "o-",
                  color=color, label=f"{gbit:g} GbE", markersize=4)
    ideal = {each.machines: each.best.rate() / each.efficiency for each in points if each.best and each.efficiency}
    axes.plot(list(ideal), list(ideal.values()), "--", color="#bbbbbb", label="without a network")
    axes.set(xscale="log", yscale="log", xlabel="machines", ylabel="tokens a second", title=title)
    axes.set_xticks(sorted(ideal), [str(count) for count in sorted(ideal)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
