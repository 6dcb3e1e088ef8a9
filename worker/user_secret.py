"""A secret of this user on this machine, by which lanspeed knows its own files and ranks: ~/.config/lanspeed/secret.

It never leaves the machine. Master and trainer both load this file by its path; it is not sent anywhere. Standard
library only, Python 3.8+.
"""

from __future__ import annotations

import contextlib
import os
import secrets

SECRET_BYTES = 32


def secret_path() -> str:
    """Return where the secret is (XDG base directory specification)."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(os.path.expanduser(config), "lanspeed", "secret")


def user_secret() -> bytes:
    """Return the secret, made at its first use, readable by this user alone. Raises OSError."""
    path = secret_path()
    with contextlib.suppress(FileNotFoundError):
        with open(path, "rb") as file:
            found, mode = file.read(), os.fstat(file.fileno()).st_mode
        if len(found) == SECRET_BYTES and not mode & 0o077:
            return found
        os.unlink(path)  # cut short, or others could read it
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    scratch = f"{path}.{secrets.token_hex(8)}"
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(SECRET_BYTES))
    try:
        os.link(scratch, path)
    except FileExistsError:  # another process was first
        pass
    except OSError:  # a file system without hard links
        os.replace(scratch, path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(scratch)
    with open(path, "rb") as file:
        return file.read()
