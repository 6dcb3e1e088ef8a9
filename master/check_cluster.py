"""Is every host ready and consistent? Ask all, compare them, try the network from each to each; say what to fix.

    invoke check --nodes 'gpu[1-3]'
    invoke check --hostfile hostfile.txt --network
    python master/check_cluster.py --nodes gpu1,gpu2 --fast --json

Nothing is changed on a host. Exit code 1 if something prevents a training.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.check.consistency import (
    Finding,
    agreement,
    content_findings,
    differences,
    grouped,
    node_findings,
    normalized,
)
from master.check.network_test import RENDEZVOUS, Pair, firewall_finding, network_findings, test_network
from master.check.slot_tests import read_speeds, run_on_slots, speed_findings, speed_lines
from master.core.paths import ROOT
from master.core.run_cli import UsageError, run_cli
from master.core.terminal import HostTable, plural, print_lines, say
from master.core.tool_parser import ToolParser
from master.inventory.cluster_file import (
    add_node_flags,
    chosen_nodes,
    known_by_name,
    read_cluster,
    update_cluster,
    with_logins,
)
from master.inventory.gpu_query import query_gpus
from master.inventory.hostfile import read_hostfile
from master.inventory.node_facts import BUSY_MIB, checkout_of, local_facts, query_facts
from master.ssh.node_names import Node
from master.ssh.options import PASSWORD_VARIABLE, add_ssh_flags, host_key_prompt, ssh_flags, ssh_options
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import run_on_all
from master.ssh.session import Session
from trainer.flags.dataset_words import name_and_weight

LEVELS = ("error", "warning", "info")
FACTS_KEPT = ("packages", "python", "cores", "ram_bytes", "disks", "nics", "nccl", "driver", "glibc", "os")


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("check_cluster.py", __doc__, leading=("--nodes",))
    add_node_flags(parser)
    flag = parser.add_argument
    flag("--model", metavar="M", help="a folder or Hugging Face name that has to be on every host, and the same")
    flag("--dataset", action="extend", nargs="+", metavar="D", default=[],
         help="the same of files, folders or Hugging Face names")
    flag("--fast", action="store_true", help="leave out the network between the hosts, and the all-reduce test")
    flag("--network", action="store_true", help="measure each pair's rate and round trip, a few seconds each")
    flag("--speed", action="store_true", help="compare the slots: five seconds of matrix products on each, never on a "
         "busy GPU")
    flag("--json", action="store_true", help="print what was found as JSON")
    add_ssh_flags(parser)
    return parser


def facts_to_ask(nodes: Sequence[Node], options: argparse.Namespace) -> dict[str, Any]:
    """Return what every host is asked."""
    paths, names = [], []
    words = [("model", options.model), *(("dataset", name_and_weight(word)[0]) for word in options.dataset)]
    for kind, word in words:
        if word and Path(word).exists():
            paths.append(str(Path(word).absolute()))
        elif word and word != "tiny":
            names.append(f"{kind}s--{word.replace('/', '--')}")  # as huggingface_hub calls its folder
    return {"more": True, "names": [node.host for node in nodes if not node.is_local], "paths": paths, "hub": names,
            "port": RENDEZVOUS}


def ask_nodes(nodes: Sequence[Node], known: Mapping[str, Any], wanted: Mapping[str, Any], ssh: SshOptions
              ) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """Return each host's facts as they are compared, and findings about hosts that can't be asked."""
    def work(session: Session) -> dict[str, Any]:
        before = time.time()
        facts = query_facts(session, checkout_of(known.get(str(session.node), {})), wanted)
        after = time.time()
        report, address = query_gpus(session).report, facts["address"]
        facts["driver"] = report.driver_version
        facts["problems"] = [problem.message for problem in report.problems if problem.is_fault]
        facts["busy"] = {str(gpu.index): gpu.busy_mib for gpu in report.usable if (gpu.busy_mib or 0) > BUSY_MIB}
        # The node's clock was read between: no skew is seen below half of the time that the question took.
        skew = facts["time"] - (before + after) / 2
        facts["clock_skew_s"] = round(skew, 3) if abs(skew) > (after - before) / 2 else 0.0
        return normalized(facts, known.get(str(session.node), {}).get("address") or address)

    with HostTable([str(node) for node in nodes]) as answers:
        def tell(node: Node, result: dict[str, Any] | SshError) -> None:
            failed = isinstance(result, SshError)
            text = str(result).removeprefix(f"{node}: ") if failed else "asked"
            answers.tell(str(node), "failed" if failed else "ok", text, failed=failed)

        found = run_on_all(nodes, ssh, work, answers.paused(host_key_prompt()), tell)
    facts = {str(node): result for node, result in found.items() if not isinstance(result, SshError)}
    lost = [Finding("error", (str(node),), f"{result.stage}: {result.reason}", "it can't train", result.fix or "")
            for node, result in found.items() if isinstance(result, SshError)]
    return facts, lost


def all_findings(facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Return what differs between the hosts, and what is wrong with each."""
    found = differences(facts) if len(facts) > 1 else []
    for host, each in facts.items():
        found += node_findings(host, each, each["clock_skew_s"])
        found += [Finding("error", (host,), message, "a GPU is missing there", "invoke detect there says more")
                  for message in each["problems"]]
    return found


def addresses_of(facts: Mapping[str, Mapping[str, Any]], known: Mapping[str, Any]) -> dict[str, str]:
    """Return by host the address at which the others reach it."""
    found = {}
    for host, each in facts.items():
        address = known.get(host, {}).get("address") or each["address"]
        own = [word.split("/")[0] for card in each["nics"] for word in card["addresses"] if ":" not in word]
        found[host] = str(address or (own[0] if own else host))
    return found


def save_facts(path: Path, facts: Mapping[str, Mapping[str, Any]], pairs: Sequence[Pair]) -> str | None:
    """Write facts and measured pairs into cluster.json, for the hosts that stand in it; return why that can't be."""
    now = round(time.time(), 3)

    def change(cluster: dict[str, Any]) -> dict[str, Any]:
        known = known_by_name(cluster)
        for name, host in known.items():
            if name in facts:
                host["facts"] = {fact: facts[name].get(fact) for fact in FACTS_KEPT}
        measured = [{"from": pair.source, "to": pair.target, "bandwidth_bytes_per_s": pair.alone,
                     "latency_s": pair.latency_s, "read_at": now} for pair in pairs if pair.latency_s is not None]
        new = {(pair["from"], pair["to"]): pair for pair in measured if {pair["from"], pair["to"]} <= set(known)}
        for pair in cluster["pairs"]:  # what was measured before stays where it wasn't measured now
            mine = new.setdefault((pair["from"], pair["to"]), pair)
            if mine["bandwidth_bytes_per_s"] is None:
                new[pair["from"], pair["to"]] = pair
        return {**cluster, "pairs": list(new.values())}

    try:
        if path.exists():
            update_cluster(path, change)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def check(options: argparse.Namespace) -> int:
    """Check and show; return the exit code."""
    if options.fast and (options.network or options.speed):
        raise UsageError("--fast leaves out what --network and --speed measure: give one of them")
    nodes, path = chosen_nodes(options.nodes, options.hostfile)
    cluster = read_cluster(path)
    known = known_by_name(cluster)
    ssh, wanted = with_logins(ssh_options(options), cluster), facts_to_ask(nodes, options)
    facts, findings = ask_nodes(nodes, known, wanted, ssh)
    pairs: list[Pair] = []
    findings += all_findings(facts) + content_findings(facts, local_facts({**wanted, "folder": str(ROOT)})["content"])
    if len(facts) > 1 and not options.fast:
        places = {node: checkout_of(known.get(str(node), {})) for node in nodes if str(node) in facts}
        addresses = addresses_of(facts, known)
        pairs, lost = test_network(places, addresses, ssh, options.network, host_key_prompt(), say)
        findings += [*network_findings(pairs, lost, facts, addresses), firewall_finding(addresses)]
    unsaved = save_facts(path, facts, pairs)
    lines, speeds = list[str](), list[dict[str, Any]]()
    hostfile = options.hostfile or Path("hostfile.txt")
    adding = [host.host for host in read_hostfile(hostfile) if host.host in facts] if hostfile.exists() else []
    if adding and not options.fast and not any(finding.level == "error" for finding in findings):
        say("running the all-reduce test on all slots")
        password = {PASSWORD_VARIABLE: ssh.password} if ssh.password else {}
        said, reason = run_on_slots("allreduce_test.py", hostfile, adding, ssh_flags(options), password)
        lines, findings = said[-1:], [*findings, *([reason] if reason else [])]
        busy = [host for host in adding if facts[host]["busy"] or facts[host]["jobs"]]
        if options.speed and busy:
            say(f"the slots' speed is not measured: other programs use the GPUs of {', '.join(busy)}")
        elif options.speed and not reason:
            say("measuring each slot's speed")
            said, reason = run_on_slots("speed_test.py", hostfile, adding, ssh_flags(options), password)
            speeds = read_speeds(said)
            findings += [*([reason] if reason else []), *speed_findings(speeds)]
            lines += speed_lines(speeds)
    findings = sorted(grouped(findings), key=lambda finding: LEVELS.index(finding.level))
    show(facts, findings, pairs, lines, speeds, options)
    if unsaved:
        say(f"not saved: {unsaved}")
    return int(any(finding.level == "error" for finding in findings))


def show(facts: Mapping[str, Mapping[str, Any]], findings: Sequence[Finding], pairs: Sequence[Pair],
         lines: Sequence[str], speeds: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the result."""
    if options.json:
        print(json.dumps({"hosts": facts, "findings": [asdict(finding) for finding in findings],
                          "pairs": [asdict(pair) for pair in pairs], "sum": lines[0] if lines else None,
                          "speeds": list(speeds)}))
        return
    for line in agreement(facts):
        print_lines(line)
    for finding in findings:
        print_lines(finding.line())
    if rates := [pair.alone for pair in pairs if pair.alone]:
        print(f"network: {len(rates)} pairs, {min(rates) / 1e6:.1f} to {max(rates) / 1e6:.1f} MB/s alone" + (
            f", {min(both) / 1e6:.1f} when all send" if (both := [pair.together for pair in pairs if pair.together])
            else ""))
    if lines:
        print_lines(*lines)
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS[:2]}
    print(f"{plural(len(facts), 'host')} answered: " + ", ".join(plural(counts[level], level) for level in counts))
    if not counts["error"]:
        say(f"next: {next_command(facts, options)}")


def next_command(hosts: Collection[str], options: argparse.Namespace) -> str:
    """Return the command that follows a check without errors."""
    hostfile = options.hostfile or Path("hostfile.txt")
    if not hostfile.exists():
        return f"invoke hostfile --nodes {','.join(hosts)}"
    data = ["--dataset", *options.dataset] if options.dataset else []
    return shlex.join(["invoke", "train", "--model", options.model or "tiny", *data, "--hostfile", str(hostfile)])


def main(argv: Sequence[str] | None = None) -> int:
    """Check the cluster; return 0, 1 if something prevents a training, 2 for wrong usage."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: check(options))


if __name__ == "__main__":
    raise SystemExit(main())
