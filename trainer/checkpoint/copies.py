"""Copies of each host's part of a checkpoint on other hosts: one that is lost for good then takes no step with it.

Every host's disk has what its own ranks wrote. With `copies` of 1 each host sends its part to the next one, with 2 to
the next two, over the training's own network, before the checkpoint is sealed. Hosts that share a disk send nothing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from trainer.checkpoint.noted_faults import Faults, reason_of
from trainer.checkpoint.verification import file_sizes
from trainer.distributed import heartbeat
from trainer.distributed.ranks import Ranks
from trainer.errors import UserError

BLOCK = 16 << 20  # bytes of a message
PART = "[A-Za-z0-9_-][A-Za-z0-9_.-]*"  # of a path: no dot comes first
NAME = re.compile(f"({PART}/){{0,8}}{PART}")


def spread(folder: Path, ranks: Ranks, copies: int, faults: Faults) -> None:
    """Send this host's part of a checkpoint to the next `copies` hosts, and take theirs; every rank calls it.

    What can't be written is noted in `faults`. Raises UserError for a file name that no checkpoint has.
    """
    own = file_sizes(folder) if ranks.is_first_here and folder.is_dir() else {}
    listed = ranks.all_gather_json(f"files/{folder.name}", own)
    first = list(dict.fromkeys(ranks.nodes.index(node) for node in ranks.nodes))  # a rank of each host, in their order
    if ranks.rank not in first:
        return
    here = first.index(ranks.rank)
    for step in range(1, min(copies, len(first) - 1) + 1):
        to, source = first[(here + step) % len(first)], first[(here - step) % len(first)]
        heartbeat.report(f"saving {folder.name}: a copy to {ranks.hosts[to]}")
        exchange(folder, lacking(listed[ranks.rank], listed[to]), to, lacking(listed[source], listed[ranks.rank]),
                 source, ranks, faults)


def lacking(there: dict[str, int], here: dict[str, int]) -> dict[str, int]:
    """Return the files of one host that another hasn't. Raises UserError for a name that could lead elsewhere."""
    found = {name: size for name, size in sorted(there.items()) if name not in here}
    for name in found:
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r} is no file of a checkpoint")
    return found


def exchange(folder: Path, outgoing: dict[str, int], to: int, incoming: dict[str, int], source: int, ranks: Ranks,
             faults: Faults) -> None:
    """Send files to one rank while files come from another: a block each way at a time."""
    import torch
    import torch.distributed as dist

    sends, receives = blocks(outgoing), blocks(incoming)
    writing = Writer(folder, faults)
    for number in range(max(len(sends), len(receives))):
        work: list[Any] = []
        if number < len(sends):
            name, start, size = sends[number]
            data = torch.frombuffer(read(folder / name, start, size), dtype=torch.uint8)
            work.append(dist.isend(data, to, group=ranks._side_group))
        if number < len(receives):
            room = torch.empty(receives[number][2], dtype=torch.uint8)
            work.append(dist.irecv(room, source, group=ranks._side_group))
        for each in work:
            each.wait()
        if number < len(receives):
            writing.write(receives[number][0], room.numpy().tobytes())
    writing.close()


def blocks(files: dict[str, int]) -> list[tuple[str, int, int]]:
    """Return the blocks of files: name, offset, bytes."""
    return [(name, start, min(BLOCK, size - start)) for name, size in files.items() for start in range(0, size, BLOCK)]


def read(path: Path, start: int, size: int) -> bytearray:
    """Return a block of a file; zeros where it has become shorter."""
    with path.open("rb") as file:
        file.seek(start)
        return bytearray(file.read(size).ljust(size, b"\0"))


class Writer:
    """Writes files block by block; what can't be written is noted, and the rest of it left out."""

    def __init__(self, folder: Path, faults: Faults) -> None:
        self._folder, self._faults = folder, faults
        self._name = ""
        self._file: BinaryIO | None = None

    def write(self, name: str, data: bytes) -> None:
        """Write the next block of a file."""
        try:
            if name != self._name:
                self.close()
                self._name = name
                path = self._folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
                self._file = os.fdopen(made, "wb")
            if self._file:
                self._file.write(data)
        except OSError as error:
            self._faults.append(reason_of(error))
            self.close()

    def close(self) -> None:
        """Close the file at hand."""
        file, self._file = self._file, None
        if file:
            try:
                file.close()
            except OSError as error:
                self._faults.append(reason_of(error))
