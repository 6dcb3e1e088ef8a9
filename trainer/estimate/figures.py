"""Numbers as a person reads them, with the digits that count."""

from __future__ import annotations

SHORT_S = 5e-4  # which is no time


def figure(value: float) -> str:
    """Return a number with two or three digits that count."""
    if value >= 1000:
        return f"{round(value, -len(str(int(value))) + 3):,.0f}"
    return f"{value:.3g}"


def count(value: float) -> str:
    """Return a number of parameters: 596M, 7.24B."""
    return f"{value / 1e9:.3g}B" if value >= 1e9 else f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value:,.0f}"


def seconds(value: float) -> str:
    """Return seconds with the digits that count."""
    return "0 s" if value < SHORT_S else f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def minutes(value: float) -> str:
    """Return a time in words a person plans with."""
    return f"{value:.0f} s" if value < 100 else f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"
