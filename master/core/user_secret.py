"""A secret of this user on this machine, by which lanspeed knows its own files again: ~/.config/lanspeed/secret.

It never leaves the machine. Without it, whoever hands over a run folder could say what is run from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

SECRET_BYTES = 32


def secret_path() -> Path:
    """Return where the secret is (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "lanspeed" / "secret"


def user_secret() -> bytes:
    """Return the secret, made at its first use, readable by this user alone. Raises OSError."""
    path = secret_path()
    with contextlib.suppress(FileNotFoundError):
        found = path.read_bytes()
        if len(found) == SECRET_BYTES and not path.stat().st_mode & 0o077:
            return found
        path.unlink()  # cut short, or others could read it
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_name(f".secret.{secrets.token_hex(8)}")
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(SECRET_BYTES))
    try:
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(scratch, path)
    except OSError:  # a file system without hard links
        scratch.replace(path)
    scratch.unlink(missing_ok=True)
    return path.read_bytes()


def signature(text: str) -> str:
    """Return what only this user can write under a text (HMAC-SHA256, hex). Raises OSError."""
    return hmac.new(user_secret(), text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def is_signed(text: str, signed: object) -> bool:
    """Return whether `signed` is this user's signature of a text. Raises OSError."""
    return isinstance(signed, str) and hmac.compare_digest(signature(text).encode(), signed.encode())
