"""A chart as HTML: lines in SVG that fill any width, with their numbers in text that keeps its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from master.report.curves import Points

COLOURS = 8  # of style.py
MOST_MARKED = 40  # points that tell their number when pointed at


@dataclass(frozen=True)
class Series:
    """A line: its name, its points, the number of its colour; `is_dotted`: its points stand out."""

    name: str
    points: Points
    colour: int = 0
    is_dotted: bool = False


@dataclass(frozen=True)
class Axis:
    """From and to, and the numbers that are written at it."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Return where a value stands, in percent."""
        return 100 * (value - self.low) / (self.high - self.low)


def axis(values: Sequence[float], most: int = 5) -> Axis:
    """Return an axis with round numbers for some values, at most so many."""
    low, high = min(values), max(values)
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first = math.floor(low / step) * step
    count = math.ceil((high - first) / step - 1e-9)
    return Axis(first, first + count * step, tuple(first + number * step for number in range(count + 1)))


def plain(value: float) -> str:
    """Return a number as it stands at an axis."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


def steps_axis(low: float, high: float) -> Axis:
    """Return an axis that begins and ends with the data, with round numbers inside."""
    if high <= low:
        return Axis(low, low + 1, (low,))
    wide = axis([low, high])
    return Axis(low, high, tuple(tick for tick in wide.ticks if low <= tick <= high))


def line_chart(title: str, series: Sequence[Series], unit: str = "", x_name: str = "step",
               within: tuple[float, ...] = (), form: Callable[[float], str] = plain) -> str:
    """Return a chart of several lines, "" where none has a point. `within`: what the y axis shows in any case; `form`:
    how its numbers are written.
    """
    lines = [line for line in series if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    across = steps_axis(min(xs), max(xs))
    up = axis([*within, *(y for line in lines for _, y in line.points)])
    grid = "".join(f'<line x1="0" x2="100" y1="{100 - up.share(tick):.2f}" y2="{100 - up.share(tick):.2f}"/>'
                   for tick in up.ticks)
    drawn = "".join(drawn_line(line, across, up) for line in lines)
    marks = "".join(marks_of(line, across, up, x_name, unit, form) for line in lines)
    ys = "".join(f'<span class="y" style="bottom:{up.share(tick):.2f}%">{escape(form(tick))}</span>'
                 for tick in up.ticks)
    labels = "".join(f'<span class="x" style="left:{across.share(tick):.2f}%">{escape(plain(tick))}</span>'
                     for tick in across.ticks)
    legend = "".join(f'<span class="key c{line.colour % COLOURS}">{escape(line.name)}</span>'
                     for line in lines if len(series) > 1)
    told = f"{title}: " + "; ".join(f"{line.name} from {form(line.points[0][1])} to {form(line.points[-1][1])} {unit}"
                                    for line in lines)
    return (f'<figure class="chart"><figcaption>{escape(title)}{f" <small>{escape(unit)}</small>" if unit else ""}'
            f'<span class="legend">{legend}</span></figcaption><div class="plot"><div class="area">'
            f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(told)}">'
            f'<g class="grid">{grid}</g>{drawn}</svg>{marks}{ys}{labels}</div></div>'
            f'<div class="x-name">{escape(x_name)}</div></figure>')


def drawn_line(line: Series, across: Axis, up: Axis) -> str:
    """Return a line."""
    points = " ".join(f"{across.share(x):.2f},{100 - up.share(y):.2f}" for x, y in line.points)
    return f'<polyline class="c{line.colour % COLOURS}" points="{points}"/>'


def marks_of(line: Series, across: Axis, up: Axis, x_name: str, unit: str, form: Callable[[float], str]) -> str:
    """Return places on a line that tell their numbers when pointed at."""
    every = max(1, len(line.points) // MOST_MARKED)
    chosen = {*line.points[::every], line.points[-1]}
    seen = " dot" if line.is_dotted or len(line.points) == 1 else ""
    return "".join(
        f'<i class="mark{seen} c{line.colour % COLOURS}" style="left:{across.share(x):.2f}%;bottom:{up.share(y):.2f}%" '
        f'title="{escape(f"{line.name}, {x_name} {plain(x)}: {form(y)} {unit}".strip())}"></i>'
        for x, y in sorted(chosen))


def bar(name: str, share: float, text: str, colour: int = 0) -> str:
    """Return a row with a bar; `share`: 0 to 1."""
    wide = 100 * min(max(share, 0.0), 1.0)
    return (f'<tr><th>{escape(name)}</th><td class="bar"><span class="c{colour % COLOURS}" style="width:{wide:.1f}%">'
            f'</span></td><td>{escape(text)}</td></tr>')
