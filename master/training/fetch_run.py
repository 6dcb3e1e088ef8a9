"""The run folder of rank 0's host, fetched to this machine: everything but the checkpoints' shards."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from master.core.terminal import is_terminal, say
from master.ssh.channel import Channel
from master.ssh.node_names import Node
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import run_on_all
from master.ssh.session import Session

PATIENCE = 60.0  # seconds without a byte
TOLD_EVERY = 10.0  # seconds between two lines of progress, where no bar can be shown
MARK, END = "@@SIZE ", "@@END "  # before and after the stream
NEVER_FETCHED = ("hostfile.txt", "cluster.json", "launcher.json", "logs", "checkpoints")  # of this machine's run folder
SCRATCH = ".fetched"  # in the run folder


class _Stream:
    """A channel as the file that tarfile reads; `on_bytes` is called with the bytes received so far."""

    def __init__(self, channel: Channel, host: str, on_bytes: Callable[[int], None]) -> None:
        self._channel, self._host, self._on_bytes, self._rest = channel, host, on_bytes, b""
        self.bytes, self.end = 0, b""

    def line(self) -> str:
        """Return the next line with its end, "" where nothing is left."""
        line = b""
        while not line.endswith(b"\n") and (byte := self.read(1)):
            line += byte
        return line.decode("ascii", "replace")

    def read(self, size: int) -> bytes:
        """Return `size` bytes, fewer at the end."""
        while len(self._rest) < size:
            block = self._channel.receive(PATIENCE)
            if block is None:
                raise SshError(self._host, "fetch", f"no data for {PATIENCE:.0f} s")
            if not block:
                break
            self._rest += block
        data, self._rest = self._rest[:size], self._rest[size:]
        self.bytes += len(data)
        self.end = (self.end + data)[-len(END) - 8 :]
        self._on_bytes(self.bytes)
        return data


class Progress:
    """How much of `total` bytes (0 unknown) has come: a bar on a terminal, else a line now and then."""

    def __init__(self, host: str) -> None:
        self._host, self.total, self._told = host, 0, time.monotonic()
        self._bar = None
        if is_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(),
                                 TransferSpeedColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(f"fetching from {host}", total=None)
            self._bar.start()

    def update(self, done: int) -> None:
        """Show it."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=self.total or None)
        elif time.monotonic() - self._told > TOLD_EVERY:
            self._told = time.monotonic()
            say(f"fetching from {self._host}: {done / 1e6:.0f} of {self.total / 1e6:.0f} MB")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()


def fetch_run(node: Node, folder: str, run: Path, ssh: SshOptions, optional: bool = False) -> bool:
    """Copy a run folder, relative to `folder` there, from a host; logs are kept here anyway. Say so, or why not.

    `optional`: it need not be there, a script of the user's may have made none.

    What has come is put in its place when all has come: a model is here whole or not at all.
    """
    host, scratch, place = str(node), run / SCRATCH, os.path.join(folder, str(run))
    shown = Progress(host)

    def work(session: Session) -> int:
        left_out = "--exclude=checkpoints --exclude=logs --exclude=launcher.json"
        lack = f"[ -d {shlex.quote(place)} ] || {{ echo '{MARK}'none; exit; }}; " if optional else ""
        program = (f"{lack}cd {shlex.quote(place)} || exit; size=$(du -sb {left_out} . 2>/dev/null) || size=0; "
                   f"echo '{MARK}'$size; tar -cf - {left_out} .; echo {END}$?")
        return unpack_stream(session, program, scratch, shown)

    shutil.rmtree(scratch, ignore_errors=True)
    try:
        result = run_on_all([node], ssh, work)[node]
        if result and not isinstance(result, SshError):
            move_into_place(scratch, run)
    except (OSError, tarfile.TarError) as error:  # the disk here is full, or the stream was cut off
        result = SshError(host, "fetch", str(error))
    finally:
        shown.close()
        shutil.rmtree(scratch, ignore_errors=True)
    if isinstance(result, SshError):
        say(f"the run folder stays on {host}, in {place}: {result}")
        return False
    if result:
        say(f"fetched {result / 1e6:.0f} MB from {host}: {run}")
    return True


def unpack_stream(session: Session, program: str, folder: Path, shown: Progress) -> int:
    """Unpack what a shell program on a host sends: MARK and the size, a tar, END and tar's exit code.

    Return how many bytes came, 0 for MARK none. Raises SshError, OSError, tarfile.TarError.
    """
    host = str(session.node)
    with contextlib.closing(session.open(f"exec sh -c {shlex.quote(program)}")) as channel:
        stream = _Stream(channel, host, shown.update)
        while not (line := stream.line()).startswith(MARK):  # a shell may have a word first
            if not line:
                raise SshError(host, "fetch", channel.stderr_tail()[-200:] or "no data")
        if line == f"{MARK}none\n":
            return 0
        shown.total = int(line[len(MARK) :].split()[0])
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as archive:
            for member in archive:
                with contextlib.suppress(tarfile.FilterError):  # a link that leads out of the folder
                    archive.extract(member, folder, filter="data")
        while stream.read(1 << 16):
            pass
        if not stream.end.endswith(f"{END}0\n".encode()):
            raise SshError(host, "fetch", channel.stderr_tail()[-200:] or "tar was cut off there")
    return stream.bytes


def move_into_place(scratch: Path, run: Path) -> None:
    """Move what has come into the run folder, over what was there."""
    for path in scratch.iterdir():
        if path.name in NEVER_FETCHED:  # whatever a host sends
            continue
        target = run / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
