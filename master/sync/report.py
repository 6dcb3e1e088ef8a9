"""The result of a sync on each host, and the line that reports it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from master.core.terminal import print_lines
from master.inventory.cluster_file import known_by_name, update_cluster
from master.sync.file_trees import Tree
from master.sync.relay import Relay, RelayPeer


@dataclass
class HostResult:
    """What came of a host: an error, or where things lie there and what was done."""

    host: str
    error: str = ""
    folder: str = ""
    python: str = ""
    bytes_sent: int = 0
    bytes_missing: int = 0
    deleted: int = 0
    kept: tuple[str, ...] = ()  # changed there since, or not lanspeed's
    environment: str = ""
    shares_home_of: str = ""
    paths: dict[str, str] | None = None  # here -> there


def result_of(peer: RelayPeer, trees: Sequence[Tree]) -> HostResult:
    """Return the result of a peer in the chain."""
    plan, finished = peer.said.get("plan"), peer.said.get("finished", {})
    found = HostResult(peer.host, peer.reason or "", shares_home_of=peer.same_home)
    if plan and not peer.reason:
        found.folder, found.bytes_missing = plan["roots"]["checkout"], plan["bytes"]
        found.bytes_sent, found.deleted, found.kept = peer.written, finished.get("deleted", 0), \
            tuple(finished.get("kept", ()))
        places = {tree.here: os.path.join(plan["roots"][tree.name], tree.below) if tree.below
                  else plan["roots"][tree.name] for tree in trees if tree.here and tree.name != "checkout"}
        found.paths = places
    return found


def result_line(one: HostResult, dry_run: bool) -> str:
    """Return what came of a host for a person."""
    if one.error:
        return f"error: {one.error}"
    if one.shares_home_of:
        return f"shares the home folder of {one.shares_home_of}"
    if dry_run:
        return f"would get {one.bytes_missing / 1e6:,.1f} MB; lanspeed in {one.folder}"
    words = [f"{one.bytes_sent / 1e6:,.1f} MB new" if one.bytes_sent else "nothing new"]
    words += [f"{one.deleted:,} files deleted"] if one.deleted else []
    words += [f"{len(one.kept):,} kept because they were changed there ({one.kept[0]})"] if one.kept else []
    words += [one.environment] if one.environment else []
    moved = {here: there for here, there in (one.paths or {}).items() if here != there}
    places = [f"lanspeed in {one.folder}", *(f"{here} in {there}" for here, there in moved.items())]
    return f"{', '.join(words)}; {', '.join(places)}"


def report_removed(relay: Relay, path: Path, as_json: bool) -> int:
    """Say what was taken away, and forget it."""
    failed = any(peer.reason for peer in relay.peers.values())
    if as_json:
        print(json.dumps({"hosts": [{"host": peer.host, "error": peer.reason or "", **peer.said.get("finished", {})}
                                    for peer in relay.peers.values()]}))
    for peer in relay.peers.values() if not as_json else ():
        if peer.reason:
            print_lines(f"{peer.host}: {peer.reason}")
        elif not peer.same_home:
            done = peer.said["finished"]
            stays = [*done["kept"], *(f"{folder} (what lanspeed didn't put there)" for folder in done["left"])]
            print_lines(f"{peer.host}: {done['deleted']:,} files removed"
                        + (f"; stays: {', '.join(stays[:3])}" if stays else ""))

    def change(cluster: dict[str, Any]) -> dict[str, Any]:
        for name, host in known_by_name(cluster).items():
            if name in relay.peers and not relay.peers[name].reason:
                host["dir"] = host["python"] = None
                host.pop("paths", None)
        return cluster

    if path.exists():
        update_cluster(path, change)
    return int(failed)


def report(found: Sequence[HostResult], as_json: bool, dry_run: bool, seconds: float) -> int:
    """Print the result, a line for hosts that agree; return the exit code."""
    failed = [one for one in found if one.error]
    if as_json:
        print(json.dumps({"hosts": [asdict(one) for one in found], "seconds": round(seconds, 1)}))
        return int(bool(failed))
    lines: dict[str, list[str]] = {}
    for one in found:
        lines.setdefault(result_line(one, dry_run), []).append(one.host)
    for line, hosts in lines.items():
        print_lines(f"{', '.join(hosts)}: {line}")
    if not failed and not dry_run:
        print(f"{len(found)} host{'s' * (len(found) > 1)} ready in {seconds:.0f} s: invoke check")
    return int(bool(failed))
