"""cluster.json: what is known of each host, written beside the hostfile; schemas/cluster.schema.json describes it."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from master.core.atomic_write import write_atomically
from master.core.json_schema import first_error
from master.core.paths import SCHEMAS
from master.core.run_cli import UserError
from master.core.trust import refuse_foreign
from master.inventory.addresses import card_of
from master.inventory.hostfile import read_hostfile
from master.ssh.node_names import Node, parse_node, read_nodes
from master.ssh.route import Login, SshOptions

KEPT = ("facts", "dir", "python", "paths")  # of a host that is read again
LOGIN = ("user", "port", "key")  # of how a host was reached
LOCK_LIMIT_S = 30.0  # a tool holds the lock for milliseconds
GIGABIT = 1000.0  # Mbit/s: what a link of unknown speed is taken for
SCHEMA = SCHEMAS / "cluster.schema.json"


class ClusterError(UserError):
    """A cluster.json that can't be used; the message begins with its path."""


def add_node_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `chosen_nodes` reads."""
    flag = parser.add_argument
    flag("--nodes", nargs="+", metavar="N", default=[], help="hosts: names, user@host:port, ranges gpu[1-4], @file")
    flag("--hostfile", type=Path, metavar="H", help="the hosts of a hostfile (default: hostfile.txt)")


def chosen_nodes(words: Sequence[str], hostfile: Path | None) -> tuple[list[Node], Path]:
    """Return the hosts that --nodes, else a hostfile (default: hostfile.txt), names, and their cluster.json's path."""
    path = hostfile or Path("hostfile.txt")
    nodes = read_nodes(words) if words else [parse_node(host.host) for host in read_hostfile(path)]
    return nodes, path.with_name("cluster.json")


def empty_cluster() -> dict[str, Any]:
    """Return a cluster of no hosts."""
    return {"schema": "cluster/1", "hosts": [], "pairs": []}


def read_cluster(path: Path) -> dict[str, Any]:
    """Return a checked cluster.json; an empty one if there is none. Raises ClusterError with the first fault's path,
    TrustError for a file that somebody else can change."""
    refuse_foreign(path)
    try:
        cluster = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty_cluster()
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise ClusterError(f"{path}: {why}: delete it; it will be written again") from None
    if found := first_error(SCHEMA, cluster):
        raise ClusterError(f"{path}: {found}: delete it; it will be written again")
    return cluster


def receive_rate_mbit(known: Mapping[str, Any], cluster: Mapping[str, Any]) -> float:
    """Return how fast a host takes data, in Mbit/s: as measured, else as its network card says."""
    rates = [pair["bandwidth_bytes_per_s"] for pair in cluster["pairs"]
             if pair["to"] == known.get("name") and pair["bandwidth_bytes_per_s"]]
    if rates:
        return float(max(rates)) * 8 / 1e6
    card = card_of(known.get("facts", {}), known.get("address"))
    return float(card["mbit"]) if card and card["mbit"] else GIGABIT


def known_by_name(cluster: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what is known of each host, those included that don't train now."""
    return {host["name"]: host for host in (*cluster.get("absent", []), *cluster["hosts"])}


def merge_hosts(cluster: Mapping[str, Any], hosts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the cluster with these hosts to train; what is known of them stays, and other hosts become absent ones."""
    old, names = known_by_name(cluster), {host["name"] for host in hosts}
    kept = [{**host, **{key: before[key] for key in KEPT if key in before},
             "reached": with_login(host["reached"], before.get("reached"))}
            for host in hosts for before in [old.get(host["name"], {})]]
    absent = [host for name, host in old.items() if name not in names]
    return {**cluster, "hosts": kept, "absent": absent}


def with_login(reached: dict[str, Any] | None, before: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return how a host was reached, with the user, port and key of an earlier time for those that no flag gave."""
    if not reached or not before:
        return reached
    return {**reached, **{key: before[key] for key in LOGIN if reached.get(key) is None and before.get(key)}}


def update_cluster(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Change cluster.json while no other tool does: read it, write what `change` returns, return that.

    A file that would only get other times of reading is left alone. Raises ClusterError, OSError.
    """
    from filelock import FileLock, Timeout

    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_LIMIT_S):
            before = read_cluster(path)
            changed = change(copy.deepcopy(before))
            if not path.exists() or without_times(changed) != without_times(before):
                write_cluster(path, changed)
            return changed
    except Timeout:
        raise ClusterError(f"{path}: another tool has locked it for {LOCK_LIMIT_S:.0f} s: run this again") from None


def write_cluster(path: Path, cluster: Mapping[str, Any]) -> None:
    """Write a cluster.json that no other tool changes."""
    write_atomically(path, json.dumps(cluster, indent=1) + "\n")


def with_logins(ssh: SshOptions, cluster: Mapping[str, Any]) -> SshOptions:
    """Return the options with the user, port and key by which each host was reached before, for hosts without flags."""
    logins = {name: Login(reached["user"], reached["port"], Path(key) if (key := reached.get("key")) else None)
              for name, host in known_by_name(cluster).items() if (reached := host["reached"])}
    return replace(ssh, logins=logins)


def without_times(value: Any) -> Any:
    """Return a cluster without what differs at every reading: times, free memory, other programs' memory."""
    if isinstance(value, dict):
        passing = ("read_at", "memory_free_mib", "busy_mib")
        return {key: without_times(part) for key, part in value.items() if key not in passing}
    return [without_times(part) for part in value] if isinstance(value, list) else value
