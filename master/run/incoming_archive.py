"""A tar that a host sends, unpacked below a folder of this machine; nothing in it is believed.

Only regular files and folders are taken, by our own hand: links, devices and names that lead elsewhere are left out
(tarfile's own filters let some through before Python 3.11.13, 3.12.11 and 3.13.4: CVE-2025-4517). Size, number of files
and speed have bounds.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, cast

from master.ssh.channel import Channel
from master.ssh.route import SshError

PATIENCE_S = 60.0  # without a byte
WINDOW_S, WINDOW_BYTES = 60.0, 600_000  # so much has to come in each such time
MAX_FILES = 100_000
MAX_LINE_BYTES, MAX_BANNER_LINES = 4096, 1000  # of what a login shell prints first
MAX_HEADER_BYTES = 64 << 10  # of a name, or of a pax header, which tarfile reads whole
KEPT_FREE_BYTES = 1_000_000_000  # that stay free on the disk here
MAX_PART_BYTES, MAX_NAME_BYTES = 255, 1000  # of a file's name, of its path (limits.h has 255 and 4096)


class Member(tarfile.TarInfo):
    """A member whose header has no more bytes than a name takes."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Member:
        """Return the member that a header describes; raise tarfile.ReadError for a size that makes no sense."""
        found = super().frombuf(buf, encoding, errors)
        if found.size < 0 or (found.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) and found.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError("a header of its archive makes no sense")
        return found

    @property
    def is_plain(self) -> bool:
        """True for a regular file without holes, whose name is a relative path below where it is unpacked."""
        return self.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and self.sparse is None and self.name_is_safe

    @property
    def name_is_safe(self) -> bool:
        """True for a relative, printable name without '..', neither too long nor too deep."""
        parts = self.path_parts
        return (self.name.isprintable() and not self.name.startswith("/") and "\\" not in self.name
                and bool(parts) and ".." not in parts and len(self.name.encode()) <= MAX_NAME_BYTES
                and all(len(part.encode()) <= MAX_PART_BYTES for part in parts))

    @property
    def path_parts(self) -> list[str]:
        """The parts of its name."""
        return [part for part in self.name.split("/") if part not in ("", ".")]


class ArchiveStream:
    """A channel as the file that tarfile reads; `on_bytes` is called with the bytes received so far.

    Raises SshError where nothing comes, too little, or more than `limit` bytes (None: not known yet).
    """

    def __init__(self, channel: Channel, host: str, on_bytes: Callable[[int], None]) -> None:
        self._channel, self._host, self._on_bytes, self._rest = channel, host, on_bytes, bytearray()
        self.bytes, self.end = 0, b""
        self.limit: int | None = None
        self._since, self._before = time.monotonic(), 0

    def line(self) -> str:
        """Return the next line with its end, "" where nothing is left."""
        line = b""
        while not line.endswith(b"\n") and (byte := self.read(1)):
            line += byte
            if len(line) > MAX_LINE_BYTES:
                raise SshError(self._host, "fetch", "it prints something else than its files")
        return line.decode("ascii", "replace")

    def read(self, size: int) -> bytes:
        """Return `size` bytes, fewer at the end."""
        while len(self._rest) < size:
            block = self._channel.receive(PATIENCE_S)
            if block is None:
                raise SshError(self._host, "fetch", f"no data for {PATIENCE_S:.0f} s")
            if not block:
                break
            self._rest += block
            self._check_speed()
        data = bytes(self._rest[:size])
        del self._rest[:size]
        self.bytes += len(data)
        if self.limit is not None and self.bytes > self.limit:
            raise SshError(self._host, "fetch", f"it sends more than the {self.limit / 1e6:.0f} MB that it announced")
        self.end = (self.end + data)[-64:]
        self._on_bytes(self.bytes)
        return data

    def _check_speed(self) -> None:
        """Raise SshError for a host that sends a byte now and then, for ever."""
        now, came = time.monotonic(), self.bytes + len(self._rest)
        if now - self._since > WINDOW_S:
            if came - self._before < WINDOW_BYTES:
                raise SshError(self._host, "fetch", f"only {came - self._before:,} bytes in {now - self._since:.0f} s")
            self._since, self._before = now, came


def check_room(folder: Path, announced: int, host: str) -> None:
    """Raise SshError if a disk here has no room for so many bytes."""
    free = shutil.disk_usage(folder).free - KEPT_FREE_BYTES
    if announced > free:
        raise SshError(host, "fetch", f"{announced / 1e9:.1f} GB are announced, and {max(free, 0) / 1e9:.1f} GB are "
                       "free here")


def unpack(stream: ArchiveStream, folder: Path, host: str, only: Collection[str] | None = None) -> list[str]:
    """Unpack a tar below `folder`, which only we write in; return the names that were left out, as they came.

    `only`: the paths of the files that were asked for (None: any).

    Raises SshError, OSError, tarfile.TarError.
    """
    left_out: list[str] = []
    count = 0
    with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|", tarinfo=Member) as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # which tarfile would keep, one for each file
            count += 1
            if count > MAX_FILES:
                raise SshError(host, "fetch", f"it sends more than {MAX_FILES:,} files")
            assert isinstance(member, Member)
            if member.isdir() and (member.name_is_safe or not member.path_parts):
                folder.joinpath(*member.path_parts).mkdir(parents=True, exist_ok=True)
            elif member.is_plain and (only is None or "/".join(member.path_parts) in only):
                write(archive, member, folder.joinpath(*member.path_parts))
            elif len(left_out) < MAX_FILES:
                left_out.append(member.name[:MAX_NAME_BYTES])
    return left_out


def write(archive: tarfile.TarFile, member: Member, path: Path) -> None:
    """Write a file that isn't there yet, through no link. Raises OSError, tarfile.TarError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    assert source
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    if path.stat().st_size != member.size:
        raise tarfile.ReadError(f"{member.name} was cut off")
