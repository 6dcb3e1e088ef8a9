"""The page of one run, or of several beside each other."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from html import escape

from master.core.terminal import one_line
from master.diagnosis.run_state import next_commands
from master.report.chart import Series, bar, line_chart
from master.report.curves import Points
from master.report.facts import against_plan, facts, first_and_last, headline, waiting
from master.report.run_data import RunData
from master.report.style import STYLE

NO_REQUESTS = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
KINDS = (("gpu", "GPU use", "%"), ("gpu memory", "GPU memory", "%"), ("cpu", "CPU use", "%"),
         ("memory", "memory", "%"), ("network", "network, in and out", "MB/s"))


def document(title: str, body: str, head: str = "") -> str:
    """Return a whole page, which asks for nothing from anywhere."""
    policy = "" if head else f'<meta http-equiv="Content-Security-Policy" content="{NO_REQUESTS}">'
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{policy}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style>{head}</head><body><main>{body}</main></body></html>\n")


def section(title: str, body: str) -> str:
    """Return a part of a page, "" for one without content."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def charts(*made: str) -> str:
    """Return charts beside each other, "" for none."""
    found = "".join(made)
    return f'<div class="charts">{found}</div>' if found else ""


def run_body(data: RunData, extra: str = "") -> str:
    """Return what the page of a run shows; `extra`: behind its headline."""
    parts = [
        heading(data), extra,
        section("Progress", charts(loss_chart(data), speed_chart(data), rate_chart(data), norm_chart(data))),
        section("Hosts", waiting_bars(data) + charts(*host_charts(data))),
        section("Measured and expected", expected_table(data)),
        section("Events", event_list(data)),
        section("Samples", samples(data)),
        section("What it was made with", table([("", *row) for row in facts(data)], first=1)),
        section("Repeat it", commands(data)), section("Configuration", configuration(data)),
        f"<footer>Written by lanspeed {time.strftime('%Y-%m-%d %H:%M')} from {escape(str(data.path))}</footer>"]
    return "".join(parts)


def run_page(data: RunData) -> str:
    """Return the page of a run."""
    return document(f"{data.name}: {data.state['status']}", run_body(data))


def heading(data: RunData) -> str:
    """Return a run's name, its status and its figures."""
    status = str(data.state["status"])
    made = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in headline(data))
    what = ", ".join(str(data.record[key]) for key in ("model", "dataset") if isinstance(data.record.get(key), str))
    next_line = next_commands(data.state)
    return (f'<header><h1>{escape(data.name)}</h1><p><span class="status {escape(status.split()[0])}">'
            f'{escape(status)}</span> <span class="quiet">{escape(one_line(what))}</span></p>'
            f'<dl class="cards">{made}</dl>' + (f'<p class="quiet">{escape(next_line)}</p>' if next_line else "")
            + "</header>")


def loss_chart(data: RunData) -> str:
    """Return the losses by step."""
    return line_chart("Loss", [Series("training", data.metrics.points("loss"), 0),
                               Series("evaluation", data.metrics.points("eval_loss"), 1, is_dotted=True)])


def speed_chart(data: RunData) -> str:
    """Return the speed by step."""
    return line_chart("Speed", [Series("all ranks", data.metrics.points("tokens_per_second"), 2)], "tokens a second",
                      within=(0,))


def rate_chart(data: RunData) -> str:
    """Return the learning rate by step."""
    return line_chart("Learning rate", [Series("learning rate", data.metrics.points("learning_rate"), 3)],
                      within=(0,))


def norm_chart(data: RunData) -> str:
    """Return the norm of the gradient by step."""
    return line_chart("Gradient norm", [Series("norm", data.metrics.points("grad_norm"), 5)], within=(0,))


def host_charts(data: RunData) -> list[str]:
    """Return how busy the hosts were, along the minutes since the start."""
    start = data.started or 0.0
    made = []
    for kind, title, unit in KINDS:
        scale = 1e6 if kind == "network" else 1.0
        series = [Series(host, minutes(data.hosts.points(f"{kind} {host}"), start, scale), number)
                  for number, host in enumerate(data.hosts.hosts)]
        says = kind != "network" or any(y for line in series for _, y in line.points)
        if says and any(len(line.points) > 1 for line in series):
            made.append(line_chart(title, series, unit, "minute", within=(0, 100) if unit == "%" else (0,)))
    return made


def minutes(points: Points, start: float, scale: float) -> Points:
    """Return points along the minutes since the start, smaller by `scale`."""
    return [((at - start) / 60, y / scale) for at, y in points]


def waiting_bars(data: RunData) -> str:
    """Return a bar for each host: how much of its steps it waited."""
    rows = "".join(bar(host, share, f"{share:.0%}") for host, share in waiting(data))
    return ('<div class="panel"><b>Waiting</b> <small>share of the steps\' time in communication, with waiting for '
            f'slower ranks</small><table>{rows}</table></div><p></p>') if rows else ""


def expected_table(data: RunData) -> str:
    """Return what was measured beside what was expected."""
    rows = list(against_plan(data))
    return table([("", "measured", "expected"), *rows], head=True) if rows else ""


def event_list(data: RunData) -> str:
    """Return what happened, with the time since the start."""
    events = data.events()
    start = min([at for at, _ in events] + ([data.started] if data.started else []), default=0.0)
    rows = "".join(f"<li><time>{escape(since(at - start))}</time> {escape(one_line(text))}</li>" for at, text in events)
    return f'<ol class="events">{rows}</ol>' if rows else ""


def since(seconds: float) -> str:
    """Return a time since the start."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def samples(data: RunData) -> str:
    """Return what the model said, the last open."""
    made = []
    for number, text in enumerate(reversed(data.samples())):
        title, _, said = text.partition("\n")
        made.append(f'<details id="sample-{number}"{" open" if not number else ""}><summary>{escape(one_line(title))}'
                    f"</summary><pre>{escape(said.strip())}</pre></details>")
    return "".join(made)


def commands(data: RunData) -> str:
    """Return the commands that repeat a run."""
    lines = [f"invoke train --like {shlex.quote(str(data.path))}"]
    lines += [f"# without lanspeed's launcher\n{plain}"
              for plain in (data.record.get("plain_command") or data.record.get("command"),) if isinstance(plain, str)]
    return f"<pre>{escape(chr(10).join(lines)[:4000])}</pre>" if data.record else ""


def configuration(data: RunData) -> str:
    """Return DeepSpeed's configuration and the hosts."""
    made = []
    for name in ("ds_config.json", "hostfile.txt"):
        if text := data.text(name):
            made.append(f'<details id="{name}"><summary>{name}</summary><pre>{escape(text)}</pre></details>')
    return "".join(made)


def table(rows: Sequence[Sequence[str]], head: bool = False, first: int = 0) -> str:
    """Return a table whose first column names what the others say; `head`: its first row names the columns."""
    made = []
    for number, row in enumerate(rows):
        cells = list(row[first:])
        tag = "th" if head and number == 0 else "td"
        rest = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells[1:])
        made.append(f"<tr><th>{escape(cells[0])}</th>{rest}</tr>")
    return f'<div class="scroll"><table>{"".join(made)}</table></div>' if made else ""


def comparison_page(runs: Sequence[RunData]) -> str:
    """Return the page of several runs: their results, their curves, in what they differ."""
    title = f"{len(runs)} runs"
    rows = [("run", "status", "training loss", "evaluation loss", "tokens a second", "tokens")]
    for data in runs:
        told = dict(headline(data))
        rows.append((data.name, str(data.state["status"]), first_and_last(data, "loss"),
                     first_and_last(data, "eval_loss"), told.get("tokens a second", ""), told.get("tokens", "")))
    pictures = charts(*(line_chart(name, [Series(data.name, data.metrics.points(key), number)
                                          for number, data in enumerate(runs)], unit, within=within)
                        for name, key, unit, within in (("Training loss", "loss", "", ()),
                                                        ("Evaluation loss", "eval_loss", "", ()),
                                                        ("Speed", "tokens_per_second", "tokens a second", (0,)),
                                                        ("Sent in a step", "sent_per_step", "bytes", (0,)))))
    body = (f"<h1>{title}</h1>" + section("Results", table(rows, head=True)) + section("Curves", pictures)
            + section("In what they differ", differences(runs))
            + f"<footer>Written by lanspeed {time.strftime('%Y-%m-%d %H:%M')}</footer>")
    return document(title, body)


def differences(runs: Sequence[RunData]) -> str:
    """Return a table of the facts that aren't the same of all runs."""
    told = [dict(facts(data)) for data in runs]
    names = list(dict.fromkeys(name for each in told for name in each))
    rows = [(name, *(each.get(name, "") for each in told)) for name in names
            if len({each.get(name, "") for each in told}) > 1]
    made = table([("", *(data.name for data in runs)), *rows], head=True) if rows else ""
    same = [name for name in names if name not in {row[0] for row in rows}]
    return made + (f'<p class="quiet">the same: {escape(", ".join(same))}</p>' if same else "")


