"""The folder of tokenized data that the runs on a machine share: ~/.cache/lanspeed/data, kept below a size.

    LANSPEED_CACHE=/big/disk LANSPEED_CACHE_GB=200 python trainer/train.py ...

What a run uses is marked by a lock as long as it lives. What a killed run left half made goes with the next one; beyond
the size, what was used longest ago goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MAKING = "making-"
LOCK = ".in-use"
LEAST_AGE_S = 3600.0  # a half-made folder without a lock (on a file system that has none) is left alone for so long
SIZE_GB = 50.0
_held: list[int] = []  # locks that last as long as this process


@contextlib.contextmanager
def half_made(root: Path) -> Iterator[Path]:
    """Yield a fresh folder in `root` that is this process's while it is entered, and gone afterwards."""
    remove_abandoned(root)
    with tempfile.TemporaryDirectory(prefix=MAKING, dir=root) as name:
        lock = hold(Path(name))
        try:
            yield Path(name)
        finally:
            if lock is not None:
                os.close(lock)


def hold(folder: Path) -> int | None:
    """Mark a folder as used; return the lock's file, None where there are no locks."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return lock


def is_used(folder: Path) -> bool:
    """Return whether some process holds a folder."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(lock)


def remove_abandoned(root: Path) -> None:
    """Remove what killed runs have left half made."""
    for folder in root.glob(MAKING + "*"):
        with contextlib.suppress(OSError):
            has_lock = (folder / LOCK).exists()
            if not is_used(folder) and (has_lock or time.time() - folder.stat().st_mtime > LEAST_AGE_S):
                shutil.rmtree(folder, ignore_errors=True)


def use(folder: Path) -> None:
    """Mark data as used by this process, and now."""
    lock = hold(folder)
    if lock is not None:
        _held.append(lock)
        with contextlib.suppress(OSError):
            os.utime(folder / LOCK)


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def limit_bytes() -> float:
    """Return how large the cache may be: LANSPEED_CACHE_GB, or 50 GB."""
    with contextlib.suppress(ValueError):
        return float(os.environ.get("LANSPEED_CACHE_GB", SIZE_GB)) * 1e9
    return SIZE_GB * 1e9


def shrink(root: Path) -> list[Path]:
    """Remove what nobody uses, from what was used longest ago, until the cache is no larger than it may be.

    Return what was removed.
    """
    found = []
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            if (folder / "info.json").exists():
                mark = folder / LOCK if (folder / LOCK).exists() else folder / "info.json"
                found.append((mark.stat().st_mtime, folder, size_of(folder)))
    total, removed = sum(size for *_, size in found), []
    for _, folder, size in sorted(found):
        if total <= limit_bytes():
            break
        if not is_used(folder):
            (folder / "info.json").unlink(missing_ok=True)  # first: what is half removed must not look whole
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
            total -= size
    return removed
