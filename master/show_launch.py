"""Print the commands that train on a hostfile's hosts: lanspeed's, and plain DeepSpeed's, right for this cluster.

    python master/show_launch.py --hostfile hostfile.txt --model tiny
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.paths import ROOT
from master.core.run_cli import run_cli
from master.core.terminal import print_lines
from master.core.tool_parser import ToolParser
from master.inventory.cluster_file import read_cluster
from master.inventory.hostfile import read_hostfile
from master.training.deepspeed_command import first_address, launcher_words, trainer_words


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands; return 0, 1 for a bad hostfile."""
    parser = ToolParser("show_launch.py", __doc__)
    parser.add_argument("--hostfile", type=Path, default=Path("hostfile.txt"), metavar="H", help="hostfile.txt")
    parser.add_argument("--model", default="MODEL", metavar="M", help="a Hugging Face name, a folder, or tiny")
    options = parser.parse_args(argv)
    return run_cli(lambda: show(options.hostfile, options.model))


def show(file: Path, model: str) -> int:
    """Print both commands for a hostfile's hosts; return 0."""
    hosts = read_hostfile(file)
    address = first_address(hosts, read_cluster(file.with_name("cluster.json")))
    path = file.absolute()
    hostfile = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    words = launcher_words(hostfile, hosts, address) + trainer_words(hosts, model)
    variable = "DS_ACCELERATOR=cpu " if hosts[0].vendor == "CPU" else ""
    print("To train on these hosts (lanspeed at the same path on each, MODEL a Hugging Face name or a folder):")
    if Path.cwd() != ROOT:
        print_lines(f"  cd {shlex.quote(str(ROOT))}")
    print_lines(f"  invoke train --model {shlex.quote(model)} --hostfile {shlex.quote(str(hostfile))}")
    print("which is, with plain DeepSpeed:")
    print_lines(f"  {variable}{shlex.join(words)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
