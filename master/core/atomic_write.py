"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all; a link stays a link. Raises OSError."""
    path = path.resolve()
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")  # a name that nobody can have linked before
    mode = None
    with contextlib.suppress(FileNotFoundError):  # a file that is replaced keeps its mode
        mode = stat.S_IMODE(path.stat().st_mode)
    try:
        made = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666 if mode is None else mode)
        with os.fdopen(made, "w", encoding="utf-8", errors="surrogateescape") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
