"""Operators that DeepSpeed compiles on first use: can they be, and does a build that was killed stand in the way?"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.distributed import heartbeat
from trainer.errors import UserError

YOUNG_S = 60  # a lock of a build that has just begun, and whose compiler may not have


def extension_cache() -> Path:
    """Return the folder where torch keeps the operators that it compiled."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")


def folders_in_use() -> set[Path]:
    """Return the working folders of all processes that may be looked at."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found.add(link.resolve())
        except OSError:
            continue  # another user's process, or one that has just ended
    return found


def stale_locks() -> list[Path]:
    """Return the lock files of compilations that were killed.

    A build works in its own folder; a lock in a folder that no process works in is left over, and every later
    run that needs the operator would wait for it in silence. A lock younger than YOUNG_S may be of a build that starts
    or loads.
    """
    old = time.time() - YOUNG_S
    locks = sorted(lock for lock in extension_cache().glob("**/lock") if modified_at(lock) < old)
    busy = folders_in_use() if locks else set()
    return [lock for lock in locks if lock.parent.resolve() not in busy]


def modified_at(path: Path) -> float:
    """Return when a file was written, in seconds since 1970; infinity for one that has just gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return math.inf


def wait_for_young(operators: Sequence[str]) -> None:
    """Wait until the locks of these operators have gone, or are old enough to tell whether their build was killed."""
    def is_young() -> bool:
        return any(lock.parent.name in operators and modified_at(lock) > time.time() - YOUNG_S
                   for lock in extension_cache().glob("**/lock") if modified_at(lock) < math.inf)

    while is_young():
        heartbeat.report("waiting for another build of DeepSpeed's operators")
        time.sleep(1)


def check_compilation(operators: list[str]) -> list[str]:
    """Return warnings; raise a UserError where an operator must be compiled and can't be."""
    wait_for_young(operators)
    locks = stale_locks()
    blocking = [lock for lock in locks if lock.parent.name in operators]
    if blocking:
        raise UserError(f"{blocking[0]} was left by a compilation that was killed; this run would wait for it "
                        f"forever: rm {blocking[0]}")
    if operators and not (shutil.which("c++") or shutil.which("g++")):
        raise UserError(f"DeepSpeed must compile {operators[0]}, and there is no C++ compiler: install g++, "
                        'or take AdamW as the optimizer, which needs none', shared=True)
    return [f"{lock} was left by a compilation that was killed. This run doesn't need it; clear it: rm {lock}"
            for lock in locks]
