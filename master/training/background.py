"""A launcher that continues without the terminal it was started from."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from master.core.terminal import say


def detach(run: Path) -> bool:
    """Continue in a process that no terminal ends; return True there, False in the one that was started."""
    run.mkdir(parents=True, exist_ok=True)
    log = run / "launch.log"
    sys.stdout.flush()
    if os.fork():
        say(f"detached: {run}\n  follow it: invoke watch {run}\n  stop it:   invoke stop {run}")
        return False
    os.setsid()
    with open(os.devnull) as nothing, open(log, "a", encoding="utf-8") as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return True
