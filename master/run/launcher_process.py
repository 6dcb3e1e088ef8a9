"""The process that supervises a run: its record in the run folder, whether it is alive, and how it leaves its terminal.

launcher.json says which process of which machine it is, since a run folder may be on a home that machines share. What
it says is believed of a process that holds the run's lock, and of no other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shlex
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from master.core.atomic_write import write_atomically
from master.core.run_cli import UserError
from master.core.terminal import say

RECORD = "launcher.json"
LOCK = ".launcher.lock"  # held by the launcher while it lives
FLOCK = "hhqqi"  # struct flock of Linux on 64 bits: type, whence, start, length, pid (fcntl(2))
JOB = re.compile(r"[A-Za-z0-9_.-]{1,255}-[0-9a-f]{6}")  # as Training.new_name makes it
RUN_ID = re.compile("[0-9a-f]{8}")
ENDED = ("finished", "stopped", "failed")  # what run.json's status may be after the end


class RunningError(UserError):
    """A run that is being trained."""


@dataclass(frozen=True)
class Launcher:
    """A run's launcher. `started`: in the kernel's ticks, which tells it from a later process with the same number;
    `boot`: the kernel's boot id; `job`: the name of the run's job on its hosts; `run_id`: tells the run from others of
    its name; `holder`: who holds the run's lock."""

    pid: int | None = None
    started: str | None = None
    host: str | None = None
    boot: str | None = None
    job: str | None = None
    run_id: str | None = None
    holder: int | None = None

    @property
    def is_elsewhere(self) -> bool:
        """True if another machine wrote the record, whose processes can't be seen from here."""
        return None not in (self.host, self.boot) and self.boot != boot_id() and self.host != socket.gethostname()

    @property
    def is_alive_here(self) -> bool:
        """True if it is a process of this machine that is running."""
        return (not self.is_elsewhere and self.pid is not None and self.started is not None
                and self.holder == self.pid and started_at(self.pid) == self.started)


def boot_id() -> str | None:
    """Return what the kernel calls its current boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def started_at(pid: int) -> str | None:
    """Return when a process was started, in the kernel's ticks; None if there is none, or it has ended.

    In a container whose first process collects no children, one that has ended stays as a zombie.
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if words[0] in "ZX" else words[19]
    except (OSError, IndexError):
        return None


_locks: dict[str, int] = {}  # this process's, by path; they end with it


def take_lock(run: Path) -> None:
    """Hold a run's lock until this process ends. On a file system without locks there is none.

    Raises RunningError if another process holds it.
    """
    path = str((run / LOCK).resolve())
    if path not in _locks or not os.path.exists(path):
        _locks[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.lockf(_locks[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(_locks.pop(path))
        raise RunningError(f"{run}: another process is training it: invoke watch {shlex.quote(str(run))}") from None
    except OSError:
        pass  # no locks here


def lock_holder(run: Path) -> int | None:
    """Return the process that holds a run's lock, None if none does. Closing the file would free a lock of our own."""
    path = str((run / LOCK).resolve())
    if path in _locks and os.path.exists(path):
        return os.getpid()
    with contextlib.suppress(OSError), (run / LOCK).open("rb") as file:
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, *_, pid = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
        return pid if kind != fcntl.F_UNLCK else None
    return None


def write_launcher_record(run: Path, job: str | None = None) -> None:
    """Record in a run folder that this process runs it, and the job's name on its hosts (None: unchanged)."""
    make_private(run)
    take_lock(run)
    before = read_launcher_record(run)
    record = {"pid": os.getpid(), "started": started_at(os.getpid()), "host": socket.gethostname(), "boot": boot_id(),
              "job": job or before.job, "run_id": before.run_id or secrets.token_hex(4)}
    write_atomically(run / RECORD, json.dumps(record) + "\n")


def read_launcher_record(run: Path) -> Launcher:
    """Return the record of the last launcher; one without values if there is none, or none that makes sense."""
    found = read_object(run / RECORD)
    pid = found.get("pid")
    words = {name: value for name in ("started", "host", "boot", "job", "run_id")
             if isinstance(value := found.get(name), str)}
    if not JOB.fullmatch(words.get("job", "")):
        words.pop("job", None)
    if not RUN_ID.fullmatch(words.get("run_id", "")):
        words.pop("run_id", None)
    return Launcher(pid=pid if isinstance(pid, int) and pid > 0 else None, holder=lock_holder(run), **words)


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON file's object, {} where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_active(run: Path) -> bool:
    """Return True if a run is being trained, as far as this machine can tell.

    One that was started on another machine counts as active until its run.json says how it ended.
    """
    launcher = read_launcher_record(run)
    ended = read_object(run / "run.json").get("status") in ENDED
    return launcher.is_alive_here or (launcher.is_elsewhere and not ended)


def ensure_not_running(run: Path) -> None:
    """Raise RunningError if a run is being trained."""
    launcher, name = read_launcher_record(run), shlex.quote(str(run))
    if launcher.is_alive_here:
        raise RunningError(f"{run}: process {launcher.pid} is training it: invoke stop {name}")
    if is_active(run):
        raise RunningError(f"{run}: it was started on {launcher.host}, which may still be training it: invoke stop "
                           f"there, or, if that machine is off, rm {shlex.quote(str(run / RECORD))}")


def make_private(run: Path) -> None:
    """Make a run folder if it isn't there: samples of private data are read by this user alone."""
    os.makedirs(run, mode=0o700, exist_ok=True)


def survive_hangup(run: Path) -> None:
    """Continue when the terminal is closed, unless nohup has said already what is to be done."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda number, frame: leave_terminal(run))


def leave_terminal(run: Path) -> None:
    """Have what is printed from now on go to the run's launch.log, without a terminal."""
    with open(os.devnull) as nothing, open(run / "launch.log", "a", encoding="utf-8") as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def detach(run: Path) -> bool:
    """Continue in a process that no terminal ends; return True there, False in the one that was started."""
    make_private(run)
    sys.stdout.flush()
    if os.fork():
        say(f"detached: {run}", f"  follow it: invoke watch {run}", f"  stop it:   invoke stop {run}")
        return False
    os.setsid()
    leave_terminal(run)
    return True
