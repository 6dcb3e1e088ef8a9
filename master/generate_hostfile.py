"""Ask all hosts for their GPUs at once and write hostfile.txt, for DeepSpeed, and cluster.json, for the other tools.

    invoke hostfile --nodes gpu1,gpu2
    python master/generate_hostfile.py --nodes 'gpu[1-4]' admin@10.0.0.9

Nothing has to be installed on a host: the detector is sent over the connection. A host that fails costs the others
nothing: they get their lines, it gets a comment, and the exit code is 1 (0 with --allow-missing).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.run_cli import UsageError, UserError, run_cli
from master.core.terminal import HostTable, listed, say
from master.core.tool_parser import ToolParser
from master.inventory.cluster_file import (
    ClusterError,
    empty_cluster,
    merge_hosts,
    read_cluster,
    update_cluster,
    with_logins,
    write_cluster,
)
from master.inventory.gpu_query import GpuAnswer, query_gpus
from master.inventory.gpu_report import GpuReport, ReportError, check_report
from master.inventory.hostfile import HostfileError, Slots, differences, read_hostfile, render_hostfile, write_hostfile
from master.inventory.slot_selection import (
    HostAnswer,
    choose_vendor,
    duplicate_hosts,
    host_comment,
    name_problem,
    slots_of,
    with_own_address,
)
from master.ssh.node_names import Node, read_nodes
from master.ssh.options import add_ssh_flags, host_key_prompt, ssh_options
from master.ssh.route import SshError
from master.ssh.run_on_all import run_on_all


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("generate_hostfile.py", __doc__, leading=("--nodes",))
    flag = parser.add_argument
    flag("--nodes", action="extend", nargs="+", metavar="N", default=[],
         help="hosts: names, user@host:port, ranges gpu[1-4], @file, localhost; separated by spaces or commas")
    flag("--from-reports", action="extend", nargs="+", metavar="F", type=Path, default=[],
         help="read GPU reports from files, NAME.json each, instead of asking hosts")
    flag("--output", type=Path, default=Path("hostfile.txt"), metavar="F", help="the hostfile (hostfile.txt)")
    flag("--vendor", choices=["NVIDIA", "AMD", "INTEL"], type=str.upper,
         help="train on this vendor's hosts (default: the one with most usable GPUs)")
    flag("--slots", type=int, metavar="N", help="at most N slots a host: GPUs, or CPU slots where no host has a GPU")
    flag("--cpu-slots", type=int, metavar="N", help="N CPU slots on every host, whatever GPUs it has")
    flag("--keep", action="store_true", help="leave a hostfile that is there as it is, and write cluster.json alone")
    flag("--allow-missing", action="store_true", help="exit 0 even if a host failed")
    flag("--script-path", metavar="P", help="run the detect_gpus.sh that was copied there, instead of sending it")
    flag("--json", action="store_true", help="print what was found as JSON")
    add_ssh_flags(parser)
    return parser


def ask_hosts(nodes: Sequence[Node], options: argparse.Namespace) -> list[HostAnswer]:
    """Return what each host answered, in order; show each as it comes."""
    ssh = ssh_options(options)
    with contextlib.suppress(ClusterError):  # which is reported, and written anew
        ssh = with_logins(ssh, read_cluster(options.output.expanduser().with_name("cluster.json")))
    with HostTable([str(node) for node in nodes]) as answers:

        def tell(node: Node, result: GpuAnswer | SshError) -> None:
            answer = answer_of(node, result)
            if answer.found:
                answers.tell(str(node), answer.found.way, host_comment(answer.found.report))
            else:
                answers.tell(str(node), "failed", (answer.reason or "").removeprefix(f"{node}: "), failed=True)

        found = run_on_all(nodes, ssh, lambda session: query_gpus(session, options.script_path),
                           answers.paused(host_key_prompt()), tell)
    return with_own_address([answer_of(node, result) for node, result in found.items()])


def answer_of(node: Node, result: GpuAnswer | SshError) -> HostAnswer:
    """Return what came of a host; a name that DeepSpeed can't take is a fault too."""
    name, unfit = str(node), name_problem(node)
    if isinstance(result, SshError):
        return HostAnswer(name, node, None, str(result))
    return HostAnswer(name, node, None, f"{name}: {unfit}") if unfit else HostAnswer(name, node, result, None)


def read_reports(paths: Sequence[Path]) -> list[HostAnswer]:
    """Return reports kept in files; a file's name is its host's. A bad file is a failed host."""
    answers = []
    for path in paths:
        name = path.name.partition(".json")[0]
        try:
            text = path.read_text(encoding="utf-8").strip()
            report = check_report(json.loads(text[text.index("{") :]))
            answers.append(HostAnswer(name, None, GpuAnswer(report, "file", None, None, (), path.stat().st_mtime),
                                      None))
        except (OSError, ValueError, ReportError) as error:
            reason = f"{path}: {getattr(error, 'strerror', None) or error}"
            say(reason)
            answers.append(HostAnswer(name, None, None, reason))
    return answers


def cluster_host(answer: HostAnswer, options: argparse.Namespace) -> dict[str, Any]:
    """Return a host's part of cluster.json."""
    found, node = answer.found, answer.node
    assert found
    key = options.ssh_key and str(options.ssh_key.expanduser().absolute())
    reached = {"user": node.user or options.ssh_user, "port": node.port or options.ssh_port, "key": key,
               "way": found.way} if node else None
    return {"name": answer.name, "reached": reached, "address": found.address, "host_key": found.fingerprint,
            "macs": list(found.macs), "report": found.report.to_json(), "facts": {}, "dir": None, "python": None,
            "read_at": round(found.read_at, 3)}


def write_files(
    answers: Sequence[HostAnswer], hosts: Sequence[Slots], vendor: str, options: argparse.Namespace
) -> tuple[bool, list[str]]:
    """Write hostfile and cluster.json; return whether the hostfile changed, and what of its hosts did."""
    notes = {answer.name: answer.reason.partition(": ")[2] if answer.reason else host_comment(reported(answer), vendor)
             for answer in answers}
    path = options.output.expanduser()
    try:
        before = read_hostfile(path) if path.exists() else None
    except HostfileError:
        before = None
    kept = options.keep and path.exists()
    changed = not kept and write_hostfile(path, render_hostfile(hosts, notes))
    beside = path.with_name("cluster.json")
    known = [cluster_host(answer, options) for answer in answers if answer.found]
    try:
        update_cluster(beside, lambda cluster: merge_hosts(cluster, known))
    except ClusterError as error:
        say(f"warning: {error}")
        write_cluster(beside, merge_hosts(empty_cluster(), known))
    return changed, [] if before is None or kept else differences(before, hosts)


def reported(answer: HostAnswer) -> GpuReport:
    """Return the report of a host that answered."""
    assert answer.found
    return answer.found.report


def main(argv: Sequence[str] | None = None) -> int:
    """Write the hostfile; return 0, 1 if a host failed or none can train, 2 for wrong usage."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: generate(options), "stopped: nothing was written")


def generate(options: argparse.Namespace) -> int:
    """Ask the hosts, write the files, return the exit code."""
    if bool(options.nodes) == bool(options.from_reports):
        raise UsageError("give --nodes or --from-reports")
    if options.slots is not None and not 0 < options.slots <= 1024:
        raise UsageError("--slots: 1 to 1024")
    if options.cpu_slots is not None and not 0 < options.cpu_slots <= 1024:
        raise UsageError("--cpu-slots: 1 to 1024")
    folder = options.output.expanduser().resolve().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):  # before anybody is asked
        raise UserError(f"{folder}: no folder that can be written: --output FILE names another")
    if options.from_reports:
        return conclude(read_reports(options.from_reports), options)
    return conclude(ask_hosts(read_nodes(options.nodes), options), options)


def conclude(answers: Sequence[HostAnswer], options: argparse.Namespace) -> int:
    """Write the files from what the hosts answered, show it, return the exit code."""
    if options.slots and not any(answer.found and answer.found.report.slots_use for answer in answers):
        options.cpu_slots = options.slots
    vendor = "CPU" if options.cpu_slots else options.vendor or choose_vendor(answers)
    hosts = [line for answer in answers if (line := slots_of(answer, vendor, options.cpu_slots, options.slots))]
    failed = [answer for answer in answers if answer.reason]
    keeps = options.keep and options.output.expanduser().exists()
    changed, changes = write_files(answers, hosts, vendor, options) if hosts or keeps else (False, [])
    if options.json:
        print(json.dumps({"vendor": vendor if hosts else None, "hosts": [
            {"name": answer.name, "fault": answer.reason,
             "report": answer.found.report.to_json() if answer.found else None} for answer in answers]}))
    if options.ssh_user or options.ssh_port or options.ssh_key:
        say("warning: plain `deepspeed` logs in as your ssh configuration says, not by --ssh-user, --ssh-port or "
            "--ssh-key: put them into ~/.ssh/config")
    notes: dict[str, list[str]] = {}
    for answer in answers:
        for note in answer.found.notes if answer.found else ():
            notes.setdefault(note, []).append(answer.name)
    for warning in [*duplicate_hosts(answers), *(f"{listed(names)}: {note}" for note, names in notes.items())]:
        say(f"warning: {warning}")
    if failed:
        say(f"failed: {', '.join(answer.name for answer in failed)}")
    if keeps:
        told = len(answers) - len(failed)
        say(f"{options.output}: left as it is; cluster.json has {told} of {len(answers)} hosts")
        return 1 if failed and not options.allow_missing else 0
    if not hosts:
        say("no host answered; no hostfile was written" if len(failed) == len(answers) else
            "no host has a GPU to train on; no hostfile was written (--cpu-slots N trains on CPUs)")
        return 1
    total = sum(len(host.use) for host in hosts)
    if not options.json:
        print(options.output.expanduser().read_text(encoding="utf-8"), end="")
    for change in changes:
        say(f"changed: {change}")
    say(f"{options.output}: {'written' if changed else 'unchanged'}, {len(hosts)} of {len(answers)} hosts, "
        f"{total} slots")
    if answers[0].node and not all(answer.node and answer.node.is_local for answer in answers):
        say("next: invoke sync copies what a training needs; invoke check then tries it")
    return 1 if failed and not options.allow_missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
