"""The result of a sync on each host, and the line that reports it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from master.sync.file_trees import Tree
from master.sync.relay import RelayPeer


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
