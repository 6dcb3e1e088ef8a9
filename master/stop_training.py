"""Stop a run: its ranks save a checkpoint first, then every process of it ends, on this machine and on all hosts.

    invoke stop
    python master/stop_training.py runs/20261124-020457-tiny
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.run_cli import run_cli
from master.core.tool_parser import ToolParser
from master.ssh.options import add_ssh_flags
from master.training.stop_run import stop


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("stop_training.py", __doc__)
    parser.word_or_flag("run", "RUN", "run folder or name (default: the newest active run)")
    parser.add_argument("--grace", type=float, default=60, metavar="S", help="seconds that the ranks get to save (60)")
    add_ssh_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Stop the run; return 0, 1 if there is none or a host can't be reached."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: stop(options.run, options))


if __name__ == "__main__":
    raise SystemExit(main())
