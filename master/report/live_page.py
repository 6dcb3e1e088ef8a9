"""The page of a run while it goes on: its report, and before it what its hosts do just now."""

from __future__ import annotations

from html import escape
from typing import Any

from master.core.terminal import one_line
from master.diagnosis.host_rows import cells
from master.report.page import run_body, section
from master.report.run_data import RunData

MOST_LINE = 300  # characters of a host's last line


def live_body(data: RunData, nodes: dict[str, dict[str, Any]]) -> str:
    """Return what the page shows. `nodes`: each host's newest measurement, as HostMetrics has it."""
    return run_body(data, section("Now", hosts_now(data, nodes)))


def hosts_now(data: RunData, nodes: dict[str, dict[str, Any]]) -> str:
    """Return a row for each host: how busy it is, and the last line of its ranks."""
    logs: dict[str, dict[str, Any]] = data.state["hosts"]
    rows = []
    for host in dict.fromkeys([*nodes, *logs]):
        busy = ", ".join(part.replace("\n", "; ") for part in cells(nodes[host]) if part) if host in nodes else ""
        last = logs.get(host)
        said = f"{last['seconds_ago']} s ago: {one_line(last['last'])[:MOST_LINE]}" if last else ""
        rows.append(f"<tr><th>{escape(host)}</th><td>{escape(one_line(busy))}</td></tr>"
                    f'<tr><th></th><td class="quiet">{escape(said)}</td></tr>')
    return f'<div class="panel"><table>{"".join(rows)}</table></div>' if rows else ""
