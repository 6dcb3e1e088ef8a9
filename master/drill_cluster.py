"""Try what a training survives on your own hosts: ranks are killed, connections broken, the launcher is killed.

    invoke drill --hostfile hostfile.txt
    python master/drill_cluster.py --hostfile hostfile.txt --json

A small training of the built-in model is started, broken and resumed; nothing but its own processes is touched, and
nothing of it is left. Exit code 1 means that something didn't end as it should, or was left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.run_cli import UsageError, run_cli
from master.core.terminal import print_lines, say
from master.core.tool_parser import ToolParser
from master.drill.drilled_run import DrilledRun
from master.drill.faults import FaultResult, drill, problem
from master.drill.host_faults import hosts_of, remove_run, wait_until_clean
from master.inventory.cluster_file import read_cluster, with_logins
from master.inventory.hostfile import read_hostfile, select
from master.ssh.options import add_ssh_flags, ssh_flags, ssh_options

LAST_LINES = 6  # of the launcher's output that are shown after a failure


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("drill_cluster.py", __doc__, leading=("--nodes",))
    flag = parser.add_argument
    flag("--hostfile", type=Path, metavar="H", default=Path("hostfile.txt"), help="the hosts (hostfile.txt)")
    flag("--include", default="", metavar="I", help="only these hosts and slots of the hostfile: gpu1@gpu2:0,2")
    flag("--exclude", default="", metavar="E", help="all hosts and slots but these")
    flag("--limit", type=float, default=120, metavar="S", help="seconds for each fault (120)")
    flag("--json", action="store_true", help="print the results as JSON")
    flag("--keep", action="store_true", help="keep the run folder and what the launcher printed")
    add_ssh_flags(parser)
    return parser


def row(result: FaultResult) -> str:
    """Return a result as a line of the table."""
    seconds = f"{result.seconds:7.1f}" if result.seconds is not None else "      -"
    lost = f"{result.lost:6}" if result.lost is not None else "     -"
    return f"{'ok  ' if result.is_fine else 'FAIL'} {seconds} {lost}  {result.fault}: {result.followed}"


def run_drill(options: argparse.Namespace) -> int:
    """Make every fault and print what followed; return 0, 1 if one didn't end as it should. Raises UsageError."""
    if not options.hostfile.exists():
        raise UsageError(f"--hostfile {options.hostfile}: no such file: invoke hostfile --nodes ... writes it")
    if options.limit < 20:
        raise UsageError(f"--limit {options.limit:g}: at least 20 s")
    cluster = read_cluster(options.hostfile.with_name("cluster.json"))
    slots = select(read_hostfile(options.hostfile), options.include, options.exclude)
    hosts = hosts_of(slots, cluster, with_logins(ssh_options(options), cluster))
    path = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-drill-{secrets.token_hex(4)}"
    flags = ["--hostfile", str(options.hostfile), "--include", options.include, "--exclude", options.exclude]
    run = DrilledRun(path, [*flags, *ssh_flags(options)], hosts.ssh.password, options.limit)
    results: list[FaultResult] = []
    say(f"drill on {len(hosts.nodes)} host{'s' * (len(hosts.nodes) > 1)}: up to {options.limit:.0f} s for each of "
        f"{3 + 3 * len(hosts.nodes)} steps; Ctrl-C ends it")
    if not options.json:
        print_lines("     seconds   lost  fault: what followed")
    try:
        for result in drill(run, hosts, options.limit):
            results.append(result)
            if not options.json:
                print_lines(row(result))
            if not result.is_fine:
                break  # what follows would only fail for the same reason
    finally:
        run.end()
        left = wait_until_clean(hosts, run.prefix, options.limit)
    is_fine = not left and all(result.is_fine for result in results)
    say(f"left behind: {problem(left)}" if left else "nothing is left on the hosts")
    if is_fine and not options.keep:
        remove_run(hosts, path)
        shutil.rmtree(path, ignore_errors=True)
        run.forget()
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # if it is empty
    else:
        say(*(f"  {line}" for line in run.output().splitlines()[-LAST_LINES:] if not is_fine),
            f"what the launcher printed: {path}.log; the run folder: {path}")
    if options.json:
        print(json.dumps({"results": [asdict(result) for result in results], "left": left}, indent=1))
    return int(not is_fine)


def main(argv: Sequence[str] | None = None) -> int:
    """Drill; return 0, 1 if something didn't survive or was left, 2 on wrong usage."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: run_drill(options))


if __name__ == "__main__":
    raise SystemExit(main())
