"""A checkpoint as all hosts' manifests tell it: which of its parts are where, and what a host lacks of them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from master.core.json_schema import first_error, loads
from master.ssh.worker_message import SCHEMA

MANIFEST_MARK = "@@SEAL "
PART = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt$")
STAGE_FILE = re.compile(r"(model|optimizer)-(\d{5})-of-(\d{5})\.safetensors")
STAGES = "split layers"  # the engine whose ranks give each other what one lacks (trainer/split/stage_files.py)


@dataclass
class MergedCheckpoint:
    """A checkpoint: who has which of its files (size, CRC-32), and who may say so."""

    step: int
    layout: dict[str, Any]
    files: dict[str, tuple[str, list[int]]] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """True if no rank's part is missing, or every rank (every host, with `shards` of its own) wrote the same."""
        if self.is_split:
            numbered = [found for name in self.files if (found := STAGE_FILE.fullmatch(name))]
            wanted = {(found[1], number) for found in numbered for number in range(1, int(found[3]) + 1)}
            return {(found[1], int(found[2])) for found in numbered} == wanted
        parts = {int(found[1]) for name in self.files if (found := PART.search(name))}
        wanted = self.layout.get("shards") or self.layout["world_size"]
        return not parts or (len(parts), max(parts) + 1) == (wanted, wanted)

    @property
    def is_split(self) -> bool:
        """True if every rank wrote what it has of the model's layers."""
        return str(self.layout.get("engine")).startswith(STAGES)

    def manifest(self, without: Collection[str] = ()) -> str:
        """Return complete.json of all of it, but what a host goes without."""
        files = {name: sums for name, (_, sums) in self.files.items() if name not in without}
        return json.dumps({"step": self.step, "layout": self.layout, "files": files}, indent=1)


Manifests = dict[int, dict[str, Any]]  # a host's complete.json by step


def read_manifests(text: str) -> Manifests:
    """Return what a host says of its checkpoints; what makes no sense is left out."""
    found: Manifests = {}
    for block in text.split(MANIFEST_MARK)[1:]:
        with contextlib.suppress(ValueError):
            manifest = loads(block)
            if first_error(SCHEMA, manifest, "manifest") is None:
                found[manifest["step"]] = manifest
    return found


def newest_complete(manifests: Mapping[str, Manifests]) -> MergedCheckpoint | None:
    """Return the newest checkpoint of which all parts are somewhere, from every host's seals; None if none is."""
    for step in sorted({step for each in manifests.values() for step in each}, reverse=True):
        found: MergedCheckpoint | None = None
        for host, each in manifests.items():
            manifest = each.get(step)
            if not manifest or (found and manifest["layout"] != found.layout):
                continue
            found = found or MergedCheckpoint(step, manifest["layout"])
            for name, sums in manifest["files"].items():
                found.files.setdefault(name, (host, sums))
        if found and found.is_complete:
            return found
    return None


def missing_files(manifest: Mapping[str, Any] | None, merged: MergedCheckpoint, there: Collection[str] = ()
                  ) -> list[str]:
    """Return the files of a checkpoint that a host lacks: all of them if what it has is another's.

    `there`: files of stages that other ranks of the training have, and give.
    """
    own = manifest["files"] if manifest and manifest["layout"] == merged.layout else {}
    return [name for name, (_, sums) in merged.files.items() if own.get(name) != sums and name not in there]


def given(manifests: Mapping[str, Manifests], hosts: Collection[str], merged: MergedCheckpoint) -> set[str]:
    """Return the stages' files that some of these hosts have, and that no other needs a copy of."""
    if not merged.is_split:
        return set()
    own = [manifest["files"] for host in hosts if (manifest := manifests.get(host, {}).get(merged.step))
           and manifest["layout"] == merged.layout]
    return {name for name, (_, sums) in merged.files.items() if STAGE_FILE.fullmatch(name)
            and any(files.get(name) == sums for files in own)}
