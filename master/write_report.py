"""Write a run as one HTML page, RUN/report.html: losses, speed, waiting, hosts, events, samples, how to repeat it.

    invoke report
    invoke report runs/20261124-020457-tiny runs/20261125-101500-tiny
    python master/write_report.py --out comparison.html RUN RUN

Several runs are put beside each other, in report.html of this folder. The page needs no script and no network.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.atomic_write import write_atomically
from master.core.run_cli import UserError, run_cli
from master.core.terminal import print_lines, say
from master.core.tool_parser import ToolParser
from master.report.page import comparison_page, run_page
from master.report.run_data import RunData
from master.run.run_folder import find_run

NAME = "report.html"


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("write_report.py", __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders or names (default: the newest)")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"where to (RUN/{NAME}; of several runs {NAME})")
    return parser


def report(names: Sequence[str], out: Path | None) -> int:
    """Write the page; return 0. Raises UserError."""
    runs = [find_run(name) for name in dict.fromkeys(names)] or [find_run(None)]
    read = [RunData(run).read() for run in runs]
    if empty := [str(data.path) for data in read if not data.record and not data.metrics.curves]:
        raise UserError(f"{', '.join(empty)}: no run.json and no metrics there yet")
    place = out or (runs[0] / NAME if len(runs) == 1 else Path(NAME))
    write_atomically(place, run_page(read[0]) if len(read) == 1 else comparison_page(read))
    print_lines(str(place))
    say(f"to look at it: xdg-open {place}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; return 0, 1 for a run that isn't there, 2 for wrong usage."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: report(options.runs, options.out))


if __name__ == "__main__":
    raise SystemExit(main())
