"""What a report says of a run in words and numbers: its headline, and the facts that two runs are compared by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from master.diagnosis.run_state import ACTIVE, figure, time_left
from master.report.run_data import RunData, when


def first_and_last(data: RunData, name: str) -> str:
    """Return how a curve began and ended, "" where there is none."""
    points = data.metrics.points(name)
    if not points:
        return ""
    first, last = points[0][1], points[-1][1]
    return f"{last:.4g}" if len(points) == 1 else f"{first:.4g} \u2192 {last:.4g}"


def size(number: float, giga: str = "G") -> str:
    """Return a large number with its unit."""
    for unit, name in ((1e12, "T"), (1e9, giga), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,.0f}"


def headline(data: RunData) -> Iterator[tuple[str, str]]:
    """Yield the figures that matter first, by what they are called."""
    state = data.state
    if state["step"] is not None:
        yield "step", f"{state['step']:,.0f}" + (f" of {state['steps']:,.0f}" if state["steps"] else "")
    for name, key in (("training loss", "loss"), ("evaluation loss", "eval_loss")):
        if told := first_and_last(data, key):
            yield name, told
    speed = data.number("computed_tokens_per_second", "summary") or state["tokens_per_second"]
    if speed:
        yield "tokens a second", f"{speed:,.0f}"
    tokens = data.number("tokens", "summary") or (data.metrics.points("tokens") or [(0, 0.0)])[-1][1]
    if tokens:
        yield "tokens", size(tokens, giga="B")
    if (ended := data.number("ended")) and (started := data.number("started")) and ended > started:
        yield "time", time_left(ended - started)
    elif state["seconds_left"] and state["status"] in ACTIVE:
        yield "time left", time_left(state["seconds_left"])
    if state["world_size"]:
        hosts = data.record.get("hosts")
        count = len(hosts) if isinstance(hosts, list) else 1
        yield "ranks", f"{state['world_size']:.0f} on {count} host{'s' * (count > 1)}"
    if (accuracy := data.number("accuracy", "summary")) is not None:
        yield "accuracy", f"{accuracy:.0%} of pairs"


def facts(data: RunData) -> Iterator[tuple[str, str]]:
    """Yield what a run was made with, by what it is called: what is compared between runs."""
    record = data.record
    for name, key in (("model", "model"), ("data", "dataset"), ("method", "method"), ("engine", "engine"),
                      ("precision", "precision"), ("kernels", "kernels"), ("LoRA rank", "lora"), ("seed", "seed")):
        if isinstance(value := record.get(key), str | int) and not isinstance(value, bool):
            yield name, str(value)
    for name, key in (("parameters", "parameters"), ("trained parameters", "trained_parameters")):
        if value := data.number(key):
            yield name, size(value, giga="B")
    slots = data.part("slots")
    if slots:
        yield "ranks by host", ", ".join(f"{host}: {count}" for host, count in list(slots.items())[:64])
    if peak := data.number("peak_bytes", "summary"):
        yield "peak memory of a rank", f"{peak / 1e9:.3g} GB"
    if started := data.number("started"):
        yield "started", when(started)
    if isinstance(commit := record.get("git_commit"), str):
        yield "lanspeed", commit[:16] + ("-dirty" if commit.endswith("-dirty") else "")
    yield from ((name, str(value)) for name, value in data.part("versions").items())


def against_plan(data: RunData) -> Iterator[tuple[str, str, str]]:
    """Yield what was measured beside what was expected: what, measured, expected."""
    plan, traffic = data.plan(), data.part("traffic")
    measured, predicted = figure(plan.get("measured")), figure(plan.get("predicted"))
    if measured and predicted:
        yield "tokens a second", f"{measured:,.0f}", f"{predicted:,.0f} by the plan"
    counted, formula = figure(traffic.get("counted")), figure(traffic.get("formula"))
    if counted and formula:
        yield "sent in a step by the first host", f"{size(counted)}B", f"{size(formula)}B by the formula"
    plain = figure(traffic.get("uncompressed"))
    if counted and plain and formula and plain > 1.01 * formula:
        yield "without compression", f"{size(counted)}B", f"{size(plain)}B"
    needs = data.part("memory").get("needs")
    on_gpu = plan.get("device") not in (None, "CPU")  # on a CPU the peak is that of the process, libraries and all
    if on_gpu and isinstance(needs, dict) and (peak := data.number("peak_bytes", "summary")):
        expected = sum(value for each in needs.values() if (value := figure(each)))
        yield "peak memory of a rank", f"{peak / 1e9:.3g} GB", f"{expected / 1e9:.3g} GB by the estimate"


def waiting(data: RunData) -> list[tuple[str, float]]:
    """Return the share of the steps' time that each host waited, in communication and for others."""
    hosts: Any = data.part("waiting").get("hosts")
    return [(str(host), share) for host, value in list((hosts if isinstance(hosts, dict) else {}).items())[:64]
            if (share := figure(value)) is not None and 0 <= share <= 1]
