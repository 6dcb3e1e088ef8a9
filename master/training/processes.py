"""A group of processes that ends as one: started in a session of its own, watched, asked to stop, and cleaned up.

Processes are found by their session, never by name, so that nothing else of this user's is ever touched.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from master.core.terminal import say

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Process(NamedTuple):
    """A line of /proc/<pid>/stat: process id, its parent's, its session's."""

    pid: int
    parent: int
    session: int


def running_in_session(session: int) -> list[Process]:
    """Return the living processes of a session (zombies left out)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold spaces and parentheses of its own: read after the last one.
            state, parent, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue  # it has just ended
        if int(its_session) == session and state != "Z":
            found.append(Process(int(path.parent.name), int(parent), session))
    return found


def die_with_parent() -> None:
    """Have the kernel send this process a SIGTERM when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


class Job:
    """A launcher and the ranks that it starts.

    `grace` is how many seconds the ranks have to save after a first Ctrl-C or SIGTERM; a second one, or the end of
    that time, kills them.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], grace: float) -> None:
        self._command, self._environment, self._grace = command, environment, grace
        self._asked_at: float | None = None
        self._kill = False

    def run(self, say: Callable[[str], None]) -> int:
        """Run to the end and return the launcher's exit code (negative: a signal); nothing of it runs on after."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        launcher = subprocess.Popen(
            self._command, env=self._environment, start_new_session=True, preexec_fn=die_with_parent)
        try:
            self._watch(launcher, say)
            return launcher.returncode
        finally:
            clean_up(launcher.pid)
            launcher.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        else:
            self._kill = True

    def _watch(self, launcher: subprocess.Popen[bytes], say: Callable[[str], None]) -> None:
        passed_on = False
        while launcher.poll() is None:
            if self._asked_at is not None and not passed_on:
                passed_on = True
                say(f"stopping: the ranks may take {self._grace:.0f} s to save; once more kills them")
                ask_to_stop(launcher.pid)
            late = self._asked_at is not None and time.monotonic() - self._asked_at > self._grace
            if self._kill or late:
                say("killed before they had saved" if self._kill else f"killed after {self._grace:.0f} s")
                return
            time.sleep(0.1)
        self._wait_for_ranks(launcher.pid)

    def _wait_for_ranks(self, session: int) -> None:
        """Give ranks whose launcher was killed under them the time to save."""
        end = time.monotonic() + self._grace
        while running_in_session(session) and time.monotonic() < end and not self._kill:
            time.sleep(0.1)


def ask_to_stop(launcher: int) -> None:
    """Send SIGTERM to the launcher's ranks; to itself only before it has any.

    Asked itself, DeepSpeed's launcher would kill its ranks 30 s later, saved or not, and report a failure.
    """
    ranks = [process for process in running_in_session(launcher) if process.parent == launcher]
    for pid in [rank.pid for rank in ranks] or [launcher]:
        send(pid, signal.SIGTERM)


def clean_up(session: int) -> None:
    """Kill whatever still runs in a session, and wait until nothing does."""
    while left := running_in_session(session):
        for process in left:
            send(process.pid, signal.SIGKILL)
        time.sleep(0.05)


def detach(run: Path) -> bool:
    """Go on in a process that no terminal ends; return True there, False in the one that was started."""
    run.mkdir(parents=True, exist_ok=True)
    log = run / "launch.log"
    sys.stdout.flush()
    if os.fork():
        say(f"detached: {run}\n  follow it: tail -f {log}\n  stop it: python master/launch_training.py --stop {run}")
        return False
    os.setsid()
    with open(os.devnull) as nothing, open(log, "a", encoding="utf-8") as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return True
