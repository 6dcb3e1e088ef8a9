"""List the runs of this folder, the newest first: status, steps, losses, speed.

    invoke runs
    invoke runs --json
    python master/list_runs.py --all
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.run_cli import run_cli
from master.core.terminal import print_lines, say
from master.core.tool_parser import ToolParser
from master.core.trust import what_is_foreign
from master.diagnosis.run_state import ACTIVE, look

SHOWN = 20  # runs, without --all
COLUMNS = ("run", "status", "step", "loss", "eval loss", "tokens/s", "ranks")


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("list_runs.py", __doc__)
    parser.add_argument("--all", action="store_true", help=f"all of them, not only the newest {SHOWN}")
    parser.add_argument("--json", action="store_true", help="print what is known of them as JSON")
    return parser


def cells(state: dict[str, Any]) -> tuple[str, ...]:
    """Return a run's row, '' for what isn't known."""
    def shown(name: str, form: str) -> str:
        return form.format(state[name]) if state[name] is not None else ""

    step = shown("step", "{:.0f}") + (f"/{state['steps']:.0f}" if state["steps"] and state["step"] is not None else "")
    return (state["run"], state["status"], step, shown("loss", "{:.4f}"), shown("eval_loss", "{:.4f}"),
            shown("tokens_per_second", "{:,.0f}"), shown("world_size", "{:.0f}"))


def show(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows in columns; numbers stand at the right."""
    table = [COLUMNS, *rows]
    wide = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    for row in table:
        print_lines("  ".join(f"{cell:<{width}}" if column < 2 else f"{cell:>{width}}"
                              for column, (cell, width) in enumerate(zip(row, wide, strict=True))).rstrip())


def list_runs(everything: bool, as_json: bool) -> int:
    """List them; return 0."""
    found = sorted((path for path in Path("runs").glob("*-*-*") if path.is_dir()), reverse=True)
    own = [path for path in found if not what_is_foreign(path)]
    states = [look(path) for path in (own if everything or as_json else own[:SHOWN])]
    if as_json:
        print(json.dumps([{name: value for name, value in state.items() if name != "hosts"} for state in states],
                         indent=1))
        return 0
    if not states:
        say("no runs in this folder: invoke train --model tiny")
    else:
        show([cells(state) for state in states])
    if len(own) > len(states):
        say(f"and {len(own) - len(states)} older ones: invoke runs --all")
    if len(found) > len(own):
        say(f"{len(found) - len(own)} more belong to others, or others may write there: they aren't read")
    if active := next((state["run"] for state in states if state["status"] in ACTIVE), None):
        say(f"to follow it: invoke watch {active}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """List the runs; return 0."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: list_runs(options.all, options.json))


if __name__ == "__main__":
    raise SystemExit(main())
