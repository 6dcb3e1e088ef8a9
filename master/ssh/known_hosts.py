"""Host keys: looked up as OpenSSH does, added under a lock, never rewritten.

`ssh-keygen -F` does the looking up: it knows hashed names, ports, patterns and markers.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from master.ssh.route import Route, SshError

KNOWN, UNKNOWN, CHANGED, REVOKED = "known", "unknown", "changed", "revoked"


@dataclass(frozen=True)
class HostKey:
    """A server's public key: its type, such as ssh-ed25519, and its blob in base64."""

    kind: str
    blob: str

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` shows it."""
        digest = hashlib.sha256(base64.b64decode(self.blob)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


@dataclass(frozen=True)
class KnownHost:
    """A line of a known_hosts file for one host; marker is '', '@revoked' or '@cert-authority'."""

    marker: str
    key: HostKey
    place: str


_accepted: set[tuple[str, HostKey]] = set()  # keys that the user has taken in this process


def entries_for(name: str, files: Sequence[Path]) -> list[KnownHost]:
    """Return what known_hosts files say of a host ('host' or '[host]:port')."""
    found: list[KnownHost] = []
    for file in files:
        if not file.is_file() or not file.stat().st_size:
            continue
        done = subprocess.run(["ssh-keygen", "-F", name, "-f", str(file)], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, errors="replace", timeout=30)
        place = str(file)
        for line in done.stdout.splitlines():
            if line.startswith("#"):  # "# Host NAME found: line 7"
                place = f"{file}:{line.rpartition('line ')[2].split()[0]}"
                continue
            words = line.split()
            marker = words.pop(0) if words and words[0].startswith("@") else ""
            if len(words) >= 3:
                found.append(KnownHost(marker, HostKey(words[1], words[2]), place))
    return found


def verdict_on(key: HostKey, entries: Sequence[KnownHost]) -> tuple[str, str]:
    """Return known, unknown, changed or revoked, and the place of the entry that says so.

    A host that is known by another type of key only counts as changed: its server was asked for the known type first.
    """
    for entry in entries:
        if entry.marker == "@revoked" and entry.key == key:
            return REVOKED, entry.place
    plain = [entry for entry in entries if not entry.marker]
    for entry in plain:
        if entry.key == key:
            return KNOWN, entry.place
    return (CHANGED, plain[0].place) if plain else (UNKNOWN, "")


def refuse_changed_key(key: HostKey, entries: Sequence[KnownHost], route: Route) -> str:
    """Return KNOWN or UNKNOWN; raise SshError for a key that changed, which may be an attack, or was revoked."""
    verdict, place = verdict_on(key, entries)
    if verdict == UNKNOWN and (route.host_key_name, key) in _accepted:
        return KNOWN
    host = str(route.node)
    if verdict == REVOKED:
        raise SshError(host, "host key", f"{key.fingerprint} is marked as revoked in {place}")
    if verdict == CHANGED:
        raise SshError(host, "host key", f"{key.kind} {key.fingerprint} is not the one in {place}",
                       "ask its owner; if the machine was reinstalled: ssh-keygen -R "
                       f"'{route.host_key_name}' -f {place.rpartition(':')[0]}")
    return verdict


def known_kinds_first(entries: Sequence[KnownHost], offered: Sequence[str]) -> list[str]:
    """Return the key algorithms that may be asked for, those of known keys first, as OpenSSH orders them."""
    known = {entry.key.kind for entry in entries if not entry.marker}

    def is_known(algorithm: str) -> bool:
        return algorithm in known or (algorithm.startswith("rsa-sha2-") and "ssh-rsa" in known)

    return sorted(offered, key=lambda algorithm: not is_known(algorithm))


def hashed(name: str) -> str:
    """Return a host's name as HashKnownHosts writes it (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT")."""
    salt = os.urandom(hashlib.sha1(usedforsecurity=False).digest_size)
    digest = hmac.new(salt, name.encode(), "sha1").digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


def add_entry(route: Route, key: HostKey) -> None:
    """Append a host's key to the user's known_hosts file, under a lock, unless it's there by now.

    Where the user keeps none (UserKnownHostsFile /dev/null or none) it holds for this process.
    """
    file, name = route.new_keys_file, route.host_key_name
    _accepted.add((name, key))
    if file is None:
        return
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        content = opened.read()
        if f"{name} {key.kind} {key.blob}\n".encode() in content:
            return
        line = f"{hashed(name) if route.hashes_names else name} {key.kind} {key.blob}\n".encode()
        opened.write((b"\n" if content and not content.endswith(b"\n") else b"") + line)
        opened.flush()
        os.fsync(opened.fileno())
