"""The run folder of rank 0's host, brought to this machine: everything but the checkpoints' shards."""

from __future__ import annotations

import contextlib
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from master.channels import Channel
from master.fleet import on_all
from master.nodes import Node
from master.ssh import Session
from master.ssh_config import Access, SshError


class _Stream:
    """A channel as the file that tarfile reads."""

    def __init__(self, channel: Channel, host: str, patience: float) -> None:
        self._channel, self._host, self._patience, self._rest = channel, host, patience, b""
        self.bytes = 0

    def read(self, size: int) -> bytes:
        """Return `size` bytes, fewer at the end."""
        while len(self._rest) < size:
            block = self._channel.receive(self._patience)
            if block is None:
                raise SshError(self._host, "fetch", f"nothing came for {self._patience:.0f} s")
            if not block:
                break
            self._rest += block
        data, self._rest = self._rest[:size], self._rest[size:]
        self.bytes += len(data)
        return data


def fetch_run(node: Node, folder: str, run: Path, access: Access, say: Callable[[str], None]) -> None:
    """Copy a run folder, relative to `folder` there, from a host; its logs are kept here anyway. Say so, or why not."""
    host = str(node)

    def work(session: Session) -> int:
        command = (f"cd {shlex.quote(folder)} && exec tar -cf - --exclude=checkpoints --exclude=logs "
                   f"{shlex.quote(str(run))}")
        with contextlib.closing(session.open(command)) as channel:
            stream = _Stream(channel, host, 60)
            with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as archive:
                for member in archive:
                    archive.extract(member, Path.cwd(), filter="data")
        return stream.bytes

    result = on_all([node], access, work)[node]
    if isinstance(result, SshError):
        say(f"the run folder stays on {host}, in {folder}/{run}: {result}")
    else:
        say(f"fetched {result / 1e6:.0f} MB from {host}: {run}")
