"""Logging in by paramiko: what is offered in which order, every private key loaded once.

The key named by flag, the agent's, the configured files, lanspeed's own, the password.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import paramiko
import paramiko.agent

from master.ssh.route import Route, SshError, SshOptions

KEYS_BEFORE_PASSWORD = 4  # that are offered before a password: OpenSSH's server hangs up after 6 tries (MaxAuthTries)
_loading = threading.Lock()


def message_of(error: BaseException) -> str:
    """Return what an exception says, or its kind."""
    return str(error) or type(error).__name__


@functools.lru_cache(maxsize=256)
def _load(path: Path) -> paramiko.PKey | str:
    try:
        key = paramiko.PKey.from_path(path)
        certificate = path.with_name(path.name + "-cert.pub")
        if certificate.exists():
            key.load_certificate(str(certificate))
        return key
    except Exception as error:  # paramiko and cryptography raise a dozen kinds for keys that they can't take
        if isinstance(error, paramiko.PasswordRequiredException) or "password" in str(error).lower():
            return f"{path} has a passphrase and isn't in the agent: ssh-add {path}"
        return f"{path} can't be used here: {message_of(error)}"


def load_key(path: Path) -> paramiko.PKey | str:
    """Return a private key, or why it can't be used; each file is read once (an RSA key takes half a second)."""
    with _loading:
        return _load(path)


class Agent(paramiko.agent.AgentSSH):
    """An ssh agent at a socket of our choice; paramiko's own looks at SSH_AUTH_SOCK only."""

    def __init__(self, path: str) -> None:
        super().__init__()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(10)
        connection.connect(path)
        self._connect(connection)

    def close(self) -> None:
        """Close the connection to the agent."""
        self._close()


def offered_keys(route: Route, ssh: SshOptions, notes: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
    """Yield (what it is called, key) in the order in which keys are offered; why one isn't goes to `notes`."""
    offered: set[str] = set()
    files = list(dict.fromkeys([*([ssh.key] if ssh.key else []), *route.key_files]))

    def from_file(path: Path) -> Iterator[tuple[str, paramiko.PKey]]:
        key = load_key(path) if path.exists() else f"{path}: no such file" if path == ssh.key else None
        if isinstance(key, str):
            notes.append(key)
        elif key is not None and key.get_base64() not in offered:
            offered.add(key.get_base64())
            yield str(path), key

    if ssh.key and ssh.only != "password":
        yield from from_file(ssh.key)
    if ssh.only:
        return
    if route.agent:
        wanted = {public_blob(path) for path in files}
        with contextlib.suppress(OSError, paramiko.SSHException), contextlib.closing(Agent(route.agent)) as agent:
            keys = sorted(agent.get_keys(), key=lambda key: key.get_base64() not in wanted)
            for key in keys:
                blob = key.get_base64()
                if blob not in offered and (blob in wanted or not route.only_key_files):
                    offered.add(blob)
                    yield f"agent: {key.comment or key.get_name()}", key
    for path in files:
        yield from from_file(path)


def public_blob(path: Path) -> str:
    """Return the base64 blob of a private key's public half, '' if there is no .pub file."""
    try:
        return path.with_name(path.name + ".pub").read_text().split()[1]
    except (OSError, IndexError, UnicodeDecodeError):
        return ""


def by_password(transport: paramiko.Transport, route: Route, password: str, tried: list[str], notes: list[str]) -> bool:
    """Try the password, also where the server asks for it as a question (keyboard-interactive); return if it is right.

    Raises paramiko's errors for a connection that ends.
    """
    try:
        return not transport.auth_password(route.user, password, fallback=False)
    except paramiko.BadAuthenticationType as refusal:
        if "keyboard-interactive" not in refusal.allowed_types:
            notes.append(f"the server takes no passwords, only {', '.join(refusal.allowed_types)}")
            return False
    except paramiko.AuthenticationException:
        tried.append("password")
        return False

    def answer(title: str, instructions: str, questions: list[tuple[str, bool]]) -> list[str]:
        return ["" if shown else password for _, shown in questions]

    try:
        if not transport.auth_interactive(route.user, answer):
            return True
        notes.append("the password is accepted, and the server wants more than that")
    except paramiko.AuthenticationException:
        tried.append("password")
    return False


def log_in(transport: paramiko.Transport, route: Route, ssh: SshOptions) -> str:
    """Authenticate; return what let us in. Raises SshError with all that was tried."""
    host, notes, tried = str(route.node), [], []  # type: ignore[var-annotated]
    password = ssh.password
    try:
        for name, key in offered_keys(route, ssh, notes):
            if password is not None and len(tried) == KEYS_BEFORE_PASSWORD:
                if by_password(transport, route, password, tried, notes):
                    return "password"
                password = None
            try:
                if not transport.auth_publickey(route.user, key):
                    return name
                notes.append(f"{name} is accepted, and the server wants more than a key")
            except paramiko.BadAuthenticationType as refusal:
                notes.append(f"the server takes no keys, only {', '.join(refusal.allowed_types)}")
                break
            except paramiko.AuthenticationException:
                tried.append(name)
        if password is not None and by_password(transport, route, password, tried, notes):
            return "password"
    except (paramiko.SSHException, EOFError, OSError) as error:
        notes.append(f"the server closed the connection ({message_of(error)})")
        if len(tried) > 2:
            notes.append("too many keys were offered: name one with --ssh-key, or set IdentitiesOnly")
    what = f"refused {', '.join(tried)}" if tried else "no key to offer"
    raise SshError(host, "authentication", f"user {route.user}: " + "; ".join([what, *notes]),
                   "invoke setup-keys installs a key there, or --ssh-password")
