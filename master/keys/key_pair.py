"""The key pair that lanspeed's hosts know: found, or made by ssh-keygen. No passphrase is ever in an argument."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from master.core.run_cli import UserError


class KeyPairError(UserError):
    """No key pair can be had; the message says why and what to do."""


@dataclass(frozen=True)
class KeyPair:
    """A private key's path, and its public line: 'ssh-ed25519 BLOB COMMENT'."""

    path: Path
    public: str

    @property
    def blob(self) -> str:
        """The part by which the key is known."""
        return self.public.split()[1]


def find_pair(path: Path) -> KeyPair | None:
    """Return the pair at a private key's path, None if there is none; a lost public half is derived."""
    if not path.exists():
        return None
    public = path.with_name(path.name + ".pub")
    if public.exists():
        line = public.read_text(encoding="utf-8").strip()
    else:
        done = subprocess.run(["ssh-keygen", "-y", "-P", "", "-f", str(path)], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True)
        if done.returncode:
            raise KeyPairError(f"{public} is missing: ssh-keygen -y -f {path} > {public}")
        line = done.stdout.strip()
    if len(line.split()) < 2 or len(line.splitlines()) != 1:
        raise KeyPairError(f"{public} is no public key: ssh-keygen -y -f {path} > {public}")
    return KeyPair(path, line)


def make_pair(path: Path, kind: str, passphrase: bool) -> KeyPair:
    """Make a key pair; with `passphrase` ssh-keygen asks for one on the terminal itself. Raises KeyPairError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = ["ssh-keygen", "-q", "-t", kind, *(["-b", "4096"] if kind == "rsa" else []),
               "-C", f"lanspeed@{socket.gethostname()}", "-f", str(path)]
    done = subprocess.run(command if passphrase else [*command, "-N", ""],
                          stdin=None if passphrase else subprocess.DEVNULL)
    pair = find_pair(path) if done.returncode == 0 else None
    if pair is None:
        raise KeyPairError(f"ssh-keygen made no key at {path}")
    return pair


def has_passphrase(path: Path) -> bool:
    """Return whether a private key needs a passphrase."""
    command = ["ssh-keygen", "-y", "-P", "", "-f", str(path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    return done.returncode != 0


def add_to_agent(path: Path) -> str:
    """Load a key with a passphrase into the running agent (ssh-add asks for it); return what to know, or ''."""
    if not os.environ.get("SSH_AUTH_SOCK"):
        return (f"{path} has a passphrase and no agent runs: before every launch, "
                f"eval $(ssh-agent) && ssh-add {path}")
    done = subprocess.run(["ssh-add", "-q", str(path)])
    return "" if done.returncode == 0 else f"{path} is not in the agent: ssh-add {path}"
