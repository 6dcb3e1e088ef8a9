"""A tar that goes to a host: its size, which the host must know before, and the stream into a channel."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from typing import IO, cast

from master.ssh.channel import Channel


def tar_size(sizes: Sequence[int]) -> int:
    """Return the bytes of a tar of files of these sizes, whose names are short."""
    block, record = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
    size_of_all = sum(block + -(-size // block) * block for size in sizes) + 2 * block
    return -(-size_of_all // record) * record


class Sink:
    """A channel as the file that tarfile writes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def write(self, data: bytes) -> int:
        self._channel.send(data)
        return len(data)


def archive_to(channel: Channel) -> tarfile.TarFile:
    """Return a tar to add files to, each of which is sent at once."""
    return tarfile.open(fileobj=cast(IO[bytes], Sink(channel)), mode="w|", format=tarfile.GNU_FORMAT)
