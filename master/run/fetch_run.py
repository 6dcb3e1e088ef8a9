"""The run folder of rank 0's host, fetched to this machine: everything but the checkpoints' shards."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import tarfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from master.core.atomic_write import write_atomically
from master.core.terminal import is_terminal, say
from master.inventory.node_facts import RemoteCheckout
from master.run.incoming_archive import MAX_BANNER_LINES, ArchiveStream, check_room, unpack
from master.run.launcher_process import read_object
from master.ssh.node_names import Node
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import run_on_all
from master.ssh.session import Session, last_words

TOLD_EVERY = 10.0  # seconds between two lines of progress, where no bar can be shown
MARK, END = "@@SIZE ", "@@END "  # before and after the stream
SLACK, SLACK_BYTES = 1.05, 32 << 20  # what a tar has beyond its files' sizes, and what is written meanwhile
# What the trainer writes, and what only this machine writes: whatever a host sends, that stays as it is.
FETCHED = {"run.json", "metrics.jsonl", "loss.png", "sample.txt", "samples", "model", "adapter", "ds_config.json",
           "tensorboard", "wandb", "trackio"}
EXCLUDED = {"hostfile.txt", "cluster.json", "job.json", "launcher.json", "launch.log", "logs", "checkpoints",
            "events.jsonl", "hosts.jsonl", "report.html"}
KEPT_HERE = {*EXCLUDED, "command.json"}
SCRATCH = ".fetched"  # in the run folder


class Progress:
    """How much of `total` bytes (0 unknown) has come: a bar on a terminal, else a line now and then."""

    def __init__(self, host: str) -> None:
        self._host, self.total, self._told = host, 0, time.monotonic()
        self._bar = None
        if is_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(bar_width=None),
                                 DownloadColumn(), TransferSpeedColumn(), console=Console(stderr=True), transient=True)
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


def fetch_run(node: Node, folder: str, run: Path, ssh: SshOptions, is_ours: bool, optional: bool = False) -> bool:
    """Copy a run folder, relative to `folder` there, from a host; logs are kept here anyway. Say so, or why not.

    `is_ours`: the trainer made it, and nothing but its files is taken; `optional`: it need not be there, a script of
    the user's may have made none.

    What has come is put in its place when all has come: a model is here whole or not at all.
    """
    host, scratch, place = str(node), run / SCRATCH, os.path.join(folder, str(run))
    shown = Progress(host)

    def work(session: Session) -> Fetched:
        left_out = "--exclude=checkpoints --exclude=logs --exclude=launcher.json"
        lack = f"[ -d {shlex.quote(place)} ] || {{ echo '{MARK}'none; exit; }}; " if optional else ""
        size = f"du -sb {left_out} . 2>/dev/null || du -sk . | awk '{{print $1 * 1024}}'"
        program = (f"{lack}cd {shlex.quote(place)} || exit; size=$({size}); "
                   f"echo '{MARK}'$size; tar -cf - {left_out} .; echo {END}$?")
        return unpack_stream(session, program, scratch, shown)

    shutil.rmtree(scratch, ignore_errors=True)
    try:
        result, left_out = run_on_all([node], ssh, work)[node], list[str]()
        if isinstance(result, Fetched) and result.bytes:
            left_out = [*result.left_out, *move_into_place(scratch, run, is_ours)]
    except (OSError, tarfile.TarError) as error:  # the disk here is full, or the stream was cut off
        result = SshError(host, "fetch", str(error))
    finally:
        shown.close()
        shutil.rmtree(scratch, ignore_errors=True)
    if isinstance(result, SshError):
        say(f"the run folder stays on {host}, in {place}: {result}")
        return False
    if left_out:
        say(f"{host}: {len(left_out):,} entries of the run folder stay there, like {left_out[0]}: no part of a run")
    if result.bytes:
        say(f"fetched {result.bytes / 1e6:.0f} MB from {host}: {run}")
    return True


@dataclass(frozen=True)
class Fetched:
    """How many bytes came (0: there was nothing), and the names that were left out."""

    bytes: int = 0
    left_out: tuple[str, ...] = ()


def unpack_stream(session: Session, program: str, folder: Path, shown: Progress,
                  only: Collection[str] | None = None) -> Fetched:
    """Unpack what a shell program on a host sends: MARK and the size, a tar, END and tar's exit code.

    `only`: the files that were asked for. MARK none means that there is nothing. Raises SshError, OSError,
    tarfile.TarError.
    """
    host = str(session.node)
    with contextlib.closing(session.open(f"exec sh -c {shlex.quote(program)}")) as channel:
        stream = ArchiveStream(channel, host, shown.update)
        for _ in range(MAX_BANNER_LINES):  # a shell may have a word first
            line = stream.line()
            if line.startswith(MARK) or not line:
                break
        if line == f"{MARK}none\n":
            return Fetched()
        found = re.fullmatch(rf"{MARK}([0-9]{{1,15}})\b.*\n", line)
        if not found:
            raise SshError(host, "fetch", last_words(line, channel.stderr_tail())[-200:])
        shown.total = int(found[1])
        folder.mkdir(parents=True, exist_ok=True)
        check_room(folder, shown.total, host)
        stream.limit = stream.bytes + int(shown.total * SLACK) + SLACK_BYTES
        left_out = unpack(stream, folder, host, only)
        while stream.read(1 << 16):
            pass
        if not stream.end.endswith(f"{END}0\n".encode()):
            raise SshError(host, "fetch", channel.stderr_tail()[-200:] or "tar was cut off there")
    return Fetched(stream.bytes, tuple(left_out))


def move_into_place(scratch: Path, run: Path, is_ours: bool) -> list[str]:
    """Move what has come into the run folder, over what was there; return the names that don't belong in one."""
    left_out = []
    for path in scratch.iterdir():
        if path.name in KEPT_HERE or (path.name not in FETCHED if is_ours else path.name.startswith(".")):
            if path.name not in EXCLUDED:
                left_out.append(path.name)
            continue
        target = run / path.name
        if target.is_symlink() or target.is_file():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    return left_out


def localize_adapters(run: Path, place: RemoteCheckout) -> None:
    """Let the adapters of a run folder that came from a host name their base by this machine's path, where it has one.
    """
    for folder in ("model", "adapter"):
        path = run / folder / "adapter_config.json"
        config = read_object(path)
        base = config.get("base_model_name_or_path")
        if isinstance(base, str) and (here := place.here_of(base)) != base and not path.is_symlink():
            write_atomically(path, json.dumps({**config, "base_model_name_or_path": here}, indent=2) + "\n")
