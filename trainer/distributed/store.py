"""The store at which the ranks meet: torch's TCPStore, which asks nobody for a key, made to believe only the ranks.

Rank 0 opens the socket itself: on the loopback address if all ranks are on this machine, else on the one address that
the others were given. Whatever the ranks tell each other through it carries an HMAC with a secret of the job, which
lanspeed's launcher hands to each (LANSPEED_SECRET); on one machine a secret of the user takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import ipaddress
import json
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainer.distributed.worker_file import load_worker
from trainer.errors import UserError

SECRET_VARIABLE = "LANSPEED_SECRET"  # noqa: S105, the name of a variable
LOOPBACK = "127.0.0.1"


def job_secret(is_alone: bool) -> bytes | None:
    """Return what only the ranks of this job know, taken out of the environment; None if there is nothing.

    `is_alone`: all ranks are on this machine, where they have their user and the launcher that started them in common.
    """
    given = os.environ.pop(SECRET_VARIABLE, "")
    if given:
        return given.encode()
    if not is_alone:
        return None
    parent = os.getppid()
    with contextlib.suppress(OSError):
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
        secret: bytes = load_worker("user_secret").user_secret()
        return hmac.new(secret, f"ranks {parent} {started}".encode(), hashlib.sha256).digest()
    return None


def listen(address: str, port: int) -> socket.socket:
    """Return a socket that listens on one address; on all where that isn't one of this machine's for the others.

    Debian maps a machine's own name to a loopback address, a container's address may be its host's. Raises OSError.
    """
    family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    if address == LOOPBACK or not str(target[0]).startswith("127."):
        try:
            return socket.create_server(target[:2], family=family)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    return socket.create_server(("", port))


def open_store(rank: int, world_size: int, is_alone: bool, limit: timedelta) -> Any:
    """Return torch's store at MASTER_ADDR and MASTER_PORT, which rank 0 holds, or torchrun's agent.

    Raises OSError, torch's DistNetworkError, DistStoreError.
    """
    from torch.distributed import TCPStore, rendezvous

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun has opened it
        return next(rendezvous("env://", rank, world_size, timeout=limit))[0]
    if is_alone:
        os.environ["MASTER_ADDR"] = LOOPBACK
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank != 0:
        return TCPStore(address, port, world_size, False, limit, wait_for_workers=False)
    listening = listen(address, port)
    host = listening.getsockname()[0]
    return TCPStore(address if ipaddress.ip_address(host).is_unspecified else host, port, world_size, True, limit,
                    wait_for_workers=False, master_listen_fd=listening.detach())


class SignedStore:
    """JSON values in a store, by name, each signed with the job's secret; without one (None) nothing is signed."""

    def __init__(self, store: Any, secret: bytes | None) -> None:
        self.plain, self._secret = store, secret

    @property
    def is_signed(self) -> bool:
        """True if nobody but the ranks can have written what is read."""
        return self._secret is not None

    def set(self, name: str, value: Any) -> None:
        """Offer a value."""
        text = json.dumps(value)
        self.plain.set(f"lanspeed/{name}", json.dumps([text, self._signature(name, text)]))

    def get(self, name: str) -> Any:
        """Return a value that is there. Raises UserError for one that no rank has written."""
        try:
            text, signed = json.loads(self.plain.get(f"lanspeed/{name}"))
            good = isinstance(text, str) and isinstance(signed, str) and hmac.compare_digest(
                signed.encode(), self._signature(name, text).encode())
            if good:
                return json.loads(text)
        except (ValueError, TypeError, RecursionError):
            pass
        raise UserError(f"somebody else writes to {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, where the "
                        "ranks meet: let only the hosts reach each other's ports (docs/security.md)")

    def wait(self, names: Sequence[str], limit: timedelta) -> None:
        """Wait until there are values. Raises torch's DistStoreError, DistNetworkError."""
        self.plain.wait([f"lanspeed/{name}" for name in names], limit)

    def has(self, name: str) -> bool:
        """Return whether there is a value."""
        return bool(self.plain.check([f"lanspeed/{name}"]))

    def _signature(self, name: str, text: str) -> str:
        return hmac.new(self._secret or b"-", f"{name}\0{text}".encode(), hashlib.sha256).hexdigest()
