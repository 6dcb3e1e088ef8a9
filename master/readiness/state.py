"""What hosts still need before they can train: keys, a hostfile, lanspeed with model and data, a measured network."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from master.core.terminal import HostTable
from master.inventory.cluster_file import known_by_name, read_cluster
from master.inventory.hostfile import Slots, read_hostfile
from master.ssh.known_hosts import UNKNOWN
from master.ssh.node_names import Node, parse_node
from master.ssh.options import host_key_prompt
from master.ssh.route import SshError, SshOptions, resolve
from master.ssh.run_on_all import run_on_all

BY_SYNC = "invoke sync"  # how the fix begins of what a check finds and a sync brings


@dataclass(frozen=True)
class Logins:
    """Which hosts take a key, which need setup-keys first, and which can't be reached."""

    ready: tuple[str, ...]
    refused: tuple[str, ...]
    lost: tuple[SshError, ...]


def logins(nodes: Sequence[Node], ssh: SshOptions, may_ask: bool) -> Logins:
    """Try the keys on all hosts, without a password; `may_ask`: about unknown host keys."""
    far = [node for node in nodes if not node.is_local]
    with HostTable([str(node) for node in far]) as waiting:
        found = run_on_all(far, replace(ssh, password=None), lambda session: session.run("exit 0").code,
                           waiting.paused(host_key_prompt()) if may_ask else None)
    errors = [error for error in found.values() if isinstance(error, SshError)]
    refused = {error.host for error in errors if error.stage == "authentication" or (
        not may_ask and error.stage == "host key" and error.reason.startswith(UNKNOWN))}
    return Logins(tuple(str(node) for node in found if not isinstance(found[node], SshError)),
                  tuple(str(node) for node in found if str(node) in refused),
                  tuple(error for error in errors if error.host not in refused))


def lacks_alias(node: Node, alias: str, ssh: SshOptions) -> bool:
    """Return whether a node that was typed with user or port is not what the ssh configuration reaches by its alias,
    which is all that a hostfile can say."""
    if node.is_local or (node.user is None and node.port is None):
        return False
    typed, named = resolve(node, ssh), resolve(parse_node(alias), ssh)
    return (typed.address, typed.port, typed.user) != (named.address, named.port, named.user)


def hosts_in(hostfile: Path) -> list[Slots]:
    """Return the hosts of a hostfile, [] where there is none."""
    return read_hostfile(hostfile) if hostfile.exists() else []


@dataclass(frozen=True)
class Files:
    """How hostfile and cluster.json stand to the hosts that are meant: `others`: those that the hostfile has besides;
    `is_theirs`: it has no others, and lacks none but those without slots; `are_known`: cluster.json has them all."""

    others: tuple[str, ...]
    is_theirs: bool
    are_known: bool


def files_of(hostfile: Path, nodes: Sequence[Node]) -> Files:
    """Return how the files stand to these hosts. A host that has no slots to give stands in cluster.json alone."""
    names = {str(node) for node in nodes}
    trains = {host.host for host in hosts_in(hostfile)}
    known = set(known_by_name(read_cluster(hostfile.with_name("cluster.json"))))
    return Files(tuple(sorted(trains - names)), bool(trains) and trains <= names <= trains | known, names <= known)


def missing_parts(report: Mapping[str, Any], own_code: str | None) -> dict[str, list[str]]:
    """Return what a sync would bring, with the hosts that need it, by `check --fast --json` and this machine's code."""
    found: dict[str, list[str]] = {}
    for finding in report["findings"]:
        if finding["fix"].startswith(BY_SYNC):
            found.setdefault(finding["what"], []).extend(finding["hosts"])
    behind = [host for host, facts in report["hosts"].items() if facts["code"] != own_code]
    if behind:
        found.setdefault("another version of lanspeed than here", []).extend(behind)
    return found


def other_errors(report: Mapping[str, Any]) -> list[str]:
    """Return what a check found that no sync repairs, in a line each."""
    return [f"{', '.join(finding['hosts'])}: {finding['what']}: {finding['effect']}. {finding['fix']}".rstrip(". ")
            for finding in report["findings"] if finding["level"] == "error" and not finding["fix"].startswith(BY_SYNC)]


def measured_on(hosts: Sequence[str], cluster: Mapping[str, Any]) -> str | None:
    """Return the day of the oldest measurement of these hosts' network; None if a pair was never measured."""
    pairs = {(pair["from"], pair["to"]): pair for pair in cluster["pairs"] if pair["bandwidth_bytes_per_s"]}
    wanted = [(one, other) for one in hosts for other in hosts if one != other]
    if not wanted or not set(wanted) <= set(pairs):
        return None
    return time.strftime("%Y-%m-%d", time.localtime(min(pairs[pair]["read_at"] for pair in wanted)))
