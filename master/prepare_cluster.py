"""From any state to a cluster that trains: find out what is missing, do it step by step, end with the training command.

    invoke up --nodes gpu1,gpu2
    invoke up --nodes 'gpu[1-3]' --model gpt2 --dataset notes/
    invoke up

Without --nodes it asks which of the hosts that are known here are meant. Each step is one of the other tools; what is
done already is skipped, so that the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.run_cli import UsageError, UserError, run_cli
from master.core.terminal import listed, print_lines, say
from master.core.tool_parser import ToolParser
from master.inventory.cluster_file import read_cluster, with_logins
from master.keys.host_blocks import aliases_of
from master.readiness.candidates import find_candidates
from master.readiness.state import files_of, hosts_in
from master.readiness.steps import (
    Cluster,
    copy_what_is_missing,
    measure_network,
    set_up_keys,
    show_plan,
    write_hostfile,
)
from master.ssh.node_names import Node, parse_node, read_nodes
from master.ssh.options import add_ssh_flags, ssh_options
from master.ssh.route import SshError, SshOptions


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("prepare_cluster.py", __doc__, leading=("--nodes",))
    flag = parser.add_argument
    flag("--nodes", action="extend", nargs="+", metavar="N", default=[],
         help="hosts: names, user@host:port, ranges gpu[1-4], @file (default: those of the hostfile, else a choice)")
    flag("--model", metavar="M", help="a Hugging Face name or a folder, to be on every host (tiny)")
    flag("--dataset", action="extend", nargs="+", metavar="D", default=[], help="files, folders or Hugging Face names")
    flag("--hostfile", type=Path, default=Path("hostfile.txt"), metavar="H", help="the hostfile (hostfile.txt)")
    flag("--cpu-slots", type=int, metavar="N", help="N CPU slots on every host, whatever GPUs it has")
    flag("--wheelhouse", type=Path, metavar="DIR", help="for hosts without internet, as `invoke sync` takes it")
    flag("--yes", action="store_true", help="don't ask: accept new host keys, write ~/.ssh/config and the hostfile")
    flag("--dry-run", action="store_true", help="only say what is missing, and what would be done")
    add_ssh_flags(parser)
    return parser


def choose_nodes(options: argparse.Namespace, ssh: SshOptions) -> list[Node]:
    """Return the hosts that are meant: of --nodes, of the hostfile, or chosen from those that are known here.

    Raises UsageError.
    """
    if options.nodes:
        return read_nodes(options.nodes)
    if hosts := hosts_in(options.hostfile):
        say(f"the hosts of {options.hostfile}: {listed([host.host for host in hosts])} (--nodes names others)")
        return [parse_node(host.host) for host in hosts]
    found = find_candidates(ssh)
    if not found:
        raise UsageError("which hosts? none is known here yet: invoke up --nodes gpu1,gpu2 (names or addresses)")
    rows = [(str(number), str(each.node), each.address, each.source, each.state)
            for number, each in enumerate(found, 1)]
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        say("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, wide, strict=False)) + f"  {row[4]}")
    if not sys.stdin.isatty():
        raise UsageError("which of these? invoke up --nodes NAME,NAME")
    print("which of these? numbers or names, by spaces: ", end="", file=sys.stderr, flush=True)
    words = sys.stdin.readline().split()
    chosen = [str(found[int(word) - 1].node) if word.isdigit() and 0 < int(word) <= len(found) else word
              for word in words]
    if not chosen:
        raise UsageError("no host was chosen")
    return read_nodes(chosen)


def prepared(options: argparse.Namespace) -> int:
    """Do what is missing; return 0. Raises UserError, also for a host that the ssh configuration can't be read for."""
    try:
        return prepare(options)
    except SshError as error:
        raise UserError(str(error)) from None


def prepare(options: argparse.Namespace) -> int:
    """Do what is missing; return 0."""
    if options.cpu_slots is not None and not 0 < options.cpu_slots <= 1024:
        raise UsageError("--cpu-slots: 1 to 1024")
    ssh = ssh_options(options)
    nodes = choose_nodes(options, ssh)
    beside = options.hostfile.with_name("cluster.json")
    cluster = Cluster(tuple(nodes), with_logins(ssh, read_cluster(beside)), options)
    aliases = aliases_of(nodes)
    set_up_keys(cluster, aliases)
    nodes = [node if node.is_local else parse_node(aliases[node]) for node in nodes]  # as a hostfile names them
    cluster = replace(cluster, nodes=tuple(nodes))
    write_hostfile(cluster)
    found = files_of(cluster.hostfile, nodes)
    if options.dry_run and not (found.is_theirs and found.are_known):
        say("then: sync, check --network and plan, of which is done what turns out to be missing")
        return 0
    copy_what_is_missing(cluster)
    measure_network(cluster)
    show_plan(cluster)
    goods = ["--model", options.model or "tiny", *(["--dataset", *options.dataset] if options.dataset else [])]
    say("ready to train:")
    config = ["--ssh-config", str(options.ssh_config)] if options.ssh_config else []  # what cluster.json doesn't keep
    print_lines(shlex.join(["invoke", "train", *goods, "--hostfile", str(cluster.hostfile), *config]))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Set a cluster up; return 0, 1 if a step failed, 2 for wrong usage."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: prepared(options), "stopped: what was done stays; the same command continues")


if __name__ == "__main__":
    raise SystemExit(main())
