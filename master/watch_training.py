"""Follow a run: its progress and speed, and how busy each of its hosts is: GPUs, memory, temperature, network.

    invoke watch
    python master/watch_training.py runs/20261124-020457-tiny --once
    python master/watch_training.py --json
    invoke watch --web

It reads the run folder, and asks the hosts over SSH while somebody watches; nothing stays behind there. --web shows the
run's page in a browser of this machine, and how it goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.run_cli import UserError, run_cli
from master.core.terminal import is_terminal, one_line, print_lines, say
from master.core.tool_parser import ToolParser
from master.diagnosis.host_metrics import HostMetrics
from master.diagnosis.host_rows import cells
from master.diagnosis.run_state import ACTIVE, look, next_commands, state_line
from master.inventory.cluster_file import known_by_name, read_cluster, with_logins
from master.inventory.hostfile import read_hostfile
from master.inventory.node_facts import checkout_of
from master.run.metrics_file import MetricsFile
from master.run.run_folder import find_run
from master.ssh.node_names import parse_node
from master.ssh.options import add_ssh_flags, host_key_prompt, ssh_options
from master.training.rank_stacks import show_stacks
from master.training.takeover import is_abandoned, take_over_in_background

if TYPE_CHECKING:
    from rich.console import Group

EVERY = 2.0  # seconds between two looks
PATIENCE = 15.0  # seconds that one look waits for the hosts


def host_lines(state: dict[str, Any]) -> list[str]:
    """Return a line for each host: how busy it is, where that is known, and its last line."""
    lines = []
    nodes: dict[str, dict[str, Any]] = state["nodes"]
    for host in dict.fromkeys([*nodes, *state["hosts"]]):
        parts = [part.replace("\n", "; ") for part in cells(nodes[host]) if part] if host in nodes else []
        last = state["hosts"].get(host)
        if last:
            parts.append(f"{last['seconds_ago']} s ago: {last['last']}")
        lines.append(f"  {host}: {', '.join(parts)}")
    return lines


def table(state: dict[str, Any]) -> Group:
    """Return what a terminal shows."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False)
    for name in ("host", "busy", "memory", "network"):
        shown.add_column(name, overflow="ellipsis", no_wrap=True)
    nodes: dict[str, dict[str, Any]] = state["nodes"]
    for host in dict.fromkeys([*nodes, *state["hosts"]]):
        measured = nodes.get(host, {})
        words = [Text("\n".join(map(one_line, text.split("\n")))) for text in (host, *cells(measured))]
        shown.add_row(*words, style="red" if "fault" in measured or measured.get("problem") else None)
    lines = [Text(one_line(f"{host}: {last['last']}"), "dim", no_wrap=True, overflow="ellipsis")
             for host, last in state["hosts"].items() if last["last"]]
    return Group(Text(one_line(state_line(state))), shown, *lines, Text(one_line(next_commands(state)), "dim"))


def measured(metrics: HostMetrics | None, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the hosts' measurements."""
    return {**state, "nodes": metrics.latest() if metrics else {}}


def metrics_of(run: Path, options: argparse.Namespace) -> HostMetrics | None:
    """Return the way to ask a run's hosts, None if they aren't known."""
    if not (run / "hostfile.txt").exists():
        return None
    cluster = read_cluster(run / "cluster.json")
    known = known_by_name(cluster)
    places = {parse_node(host.host): checkout_of(known.get(host.host, {}))
              for host in read_hostfile(run / "hostfile.txt")}
    return HostMetrics(places, with_logins(ssh_options(options), cluster),
                       1.0 if options.once or options.json else EVERY)


def follow(run: Path, metrics: HostMetrics | None, options: argparse.Namespace) -> str:
    """Show a run until it has ended; return its status."""
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(), auto_refresh=False) if is_terminal() and sys.stdout.isatty() and not options.once \
        else None
    shown, file = "", MetricsFile(run / "metrics.jsonl")
    with live or contextlib.nullcontext():
        while True:
            state = measured(metrics, look(run, file))
            if live:
                live.update(table(state), refresh=True)
            elif (line := state_line(state)) != shown:
                print_lines(shown := line)
            if options.once or state["status"] not in ACTIVE:
                break
            time.sleep(EVERY)
    if not live:
        for line in host_lines(state):
            print_lines(line)
    if (line := next_commands(state)) and not (live and state["status"] in ACTIVE):
        print_lines(line)
    return str(state["status"])


def serve(run: Path, metrics: HostMetrics | None, port: int) -> str:
    """Serve a run's page until Ctrl-C; return the run's status then. Raises UserError."""
    from master.report.live_page import live_body
    from master.report.live_server import Page, served
    from master.report.run_data import RunData

    data = RunData(run).read()
    page = Page(data.name, lambda: live_body(data.read(), metrics.latest() if metrics else {}), EVERY)
    try:
        with served(page, port) as address, contextlib.suppress(KeyboardInterrupt):
            print_lines(address)
            at = urlsplit(address).port
            say("only this machine can read it; on another one, first: "
                f"ssh -L {at}:127.0.0.1:{at} {socket.gethostname()}", "Ctrl-C ends the page; the training goes on")
            while True:
                time.sleep(EVERY)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: {getattr(error, 'strerror', None) or error}") from None
    return str(look(run)["status"])


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("watch_training.py", __doc__)
    parser.word_or_flag("run", "RUN", "run folder or name (default: the newest)")
    parser.add_argument("--once", action="store_true", help="print the state once")
    parser.add_argument("--stacks", action="store_true", help="print where each rank is, and whom others wait for")
    parser.add_argument("--json", action="store_true", help="print the state as JSON, once")
    parser.add_argument("--web", action="store_true", help="serve the run's page to this machine, until Ctrl-C")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of --web's page (a free one)")
    add_ssh_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Show a run until it has ended; return 0, 1 if it failed or isn't there."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: watch(options))


def watch(options: argparse.Namespace) -> int:
    """Show the run; return 0, 1 if it failed or isn't running any more."""
    metrics = None
    try:
        run = find_run(options.run)
        if options.stacks:
            return show_stacks(run, options)
        if is_abandoned(run) and not (options.once or options.json):
            take_over_in_background(run, options)
        status = look(run)["status"]
        if status in ACTIVE and (metrics := metrics_of(run, options)):
            metrics.start(host_key_prompt())
            if options.once or options.json:
                metrics.wait(PATIENCE)
        if options.web:
            status = serve(run, metrics, options.port)
        elif options.json:
            print(json.dumps(measured(metrics, look(run)), indent=1))
        else:
            status = follow(run, metrics, options)
    except KeyboardInterrupt:  # nothing but the watching has ended
        return 0
    finally:
        if metrics:
            metrics.close()
    return int(status in ("failed", "not running any more"))


if __name__ == "__main__":
    raise SystemExit(main())
