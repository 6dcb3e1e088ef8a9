"""Sessions by paramiko: one connection a host, its key verified, every private key loaded once.

Order of what is offered: the key named by flag, the agent's, the configured files, lanspeed's own, the password.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import paramiko.agent

from master.host_keys import CHANGED, REVOKED, HostKey, entries_for, judge, kinds_first
from master.nodes import Node
from master.ssh import OUTPUT_LIMIT, Result
from master.ssh_config import Access, Route, SshError

BANNER_TRIES = 3  # a server that is asked by many at once (MaxStartups) closes before its banner
logging.getLogger("paramiko").addHandler(logging.NullHandler())  # its words are in the errors raised here
_loading = threading.Lock()


class ParamikoSession:
    """An authenticated connection."""

    way = "paramiko"

    def __init__(self, node: Node, transport: paramiko.Transport, key: HostKey, access: Access) -> None:
        self.node, self._transport, self._access = node, transport, access
        self.fingerprint: str | None = key.fingerprint

    def run(self, command: str, stdin: bytes = b"", timeout: float | None = None) -> Result:
        """Run a command in a channel of its own."""
        seconds = timeout or self._access.timeout
        host = str(self.node)
        try:
            with contextlib.closing(self._transport.open_session(timeout=self._access.connect_timeout)) as channel:
                channel.exec_command(command)
                return converse(channel, stdin, seconds, host)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise SshError(host, "command", f"the connection broke: {words_of(error)}") from None

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()


def words_of(error: BaseException) -> str:
    """Return what an exception says, or its kind."""
    return str(error) or type(error).__name__


def converse(channel: paramiko.Channel, stdin: bytes, seconds: float, host: str) -> Result:
    """Send the input, collect both outputs and the exit code; raise SshError past the bounds."""
    deadline, sent = time.monotonic() + seconds, 0
    out, err = bytearray(), bytearray()
    channel.setblocking(False)
    while True:
        if sent < len(stdin) and channel.send_ready():
            with contextlib.suppress(socket.timeout):
                sent += channel.send(stdin[sent : sent + 32768])
        if sent >= len(stdin) and not channel.eof_sent:
            channel.shutdown_write()
        while channel.recv_ready():
            out += channel.recv(65536)
        while channel.recv_stderr_ready():
            err += channel.recv_stderr(65536)
        if len(out) + len(err) > OUTPUT_LIMIT:
            raise SshError(host, "command", f"printed more than {OUTPUT_LIMIT >> 20} MiB")
        if channel.exit_status_ready() and channel.eof_received and not (
                channel.recv_ready() or channel.recv_stderr_ready()):
            break
        if channel.closed:
            raise SshError(host, "command", "the connection was cut before its end")
        if time.monotonic() >= deadline:
            raise SshError(host, "command", f"no end after {seconds:g} s", "--timeout gives it more")
        select.select([channel], [], [], 0.02 if sent < len(stdin) or channel.eof_received else 0.5)
    return Result(channel.recv_exit_status(), out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


# -- the handshake -----------------------------------------------------------------------------------------------------


def handshake(route: Route, access: Access) -> tuple[paramiko.Transport, HostKey, str]:
    """Connect and exchange keys; return the connection, the host's key and whether it's known (see host_keys.judge).

    Raises SshError, also for a key that changed or was revoked.
    """
    entries = entries_for(route.host_key_name, route.known_hosts)
    host = str(route.node)
    for attempt in range(1, BANNER_TRIES + 1):
        transport = paramiko.Transport(dial(route, access))
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = access.connect_timeout
        options = transport.get_security_options()
        options.key_types = kinds_first(entries, options.key_types)
        try:
            transport.start_client(timeout=access.connect_timeout)
            if not transport.initial_kex_done:
                raise paramiko.SSHException(f"no answer within {access.connect_timeout:g} s")
            break
        except (paramiko.SSHException, EOFError, OSError) as error:
            transport.close()
            closed = isinstance(error.__context__ or error, EOFError) or "banner" in str(error)
            if not closed or attempt == BANNER_TRIES or "no answer" in str(error):
                raise SshError(host, "handshake", words_of(error),
                               "is that an SSH server, and not overloaded?") from None
            time.sleep(random.uniform(0.3, 1.0))  # noqa: S311, spreads the retries
    remote = transport.get_remote_server_key()
    key = HostKey(remote.get_name(), remote.get_base64())
    verdict, place = judge(key, entries)
    if verdict in (CHANGED, REVOKED):
        transport.close()
        mend = ("ask whoever runs it; if the machine was set up anew: ssh-keygen -R "
                f"'{route.host_key_name}' -f {place.rpartition(':')[0]}") if verdict == CHANGED else ""
        raise SshError(host, "host key", f"{key.kind} {key.fingerprint} is not the one in {place}" if verdict == CHANGED
                       else f"{key.fingerprint} is marked as revoked in {place}", mend)
    transport.set_keepalive(15)
    return transport, key, verdict


def dial(route: Route, access: Access) -> Any:
    """Return a connected socket, or a proxy command that stands for one."""
    host = str(route.node)
    if route.proxy:
        return paramiko.ProxyCommand(route.proxy)
    try:
        found = socket.getaddrinfo(route.address, route.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise SshError(host, "name lookup", f"{route.address}: {getattr(error, 'strerror', error)}",
                       "give its address, or a Host block in ~/.ssh/config") from None
    fault: OSError = OSError("no address")
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(access.connect_timeout)
        try:
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            fault = error
    text = f"no answer within {access.connect_timeout:g} s" if isinstance(fault, TimeoutError) else fault.strerror
    raise SshError(host, "TCP", f"{route.address} port {route.port}: {text or words_of(fault)}",
                   "is it on, and does sshd listen there?")


# -- authentication ----------------------------------------------------------------------------------------------------


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
        return f"{path} can't be used here: {words_of(error)}"


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


def offers(route: Route, access: Access, notes: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
    """Yield (what it is called, key) in the order in which keys are offered; why one isn't goes to `notes`."""
    offered: set[str] = set()
    files = list(dict.fromkeys([*([access.key] if access.key else []), *route.key_files]))

    def from_file(path: Path) -> Iterator[tuple[str, paramiko.PKey]]:
        key = load_key(path) if path.exists() else f"{path}: no such file" if path == access.key else None
        if isinstance(key, str):
            notes.append(key)
        elif key is not None and key.get_base64() not in offered:
            offered.add(key.get_base64())
            yield str(path), key

    if access.key and access.only != "password":
        yield from from_file(access.key)
    if access.only:
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


def log_in(transport: paramiko.Transport, route: Route, access: Access) -> str:
    """Authenticate; return what let us in. Raises SshError with all that was tried."""
    host, notes, tried = str(route.node), [], []  # type: ignore[var-annotated]
    try:
        for name, key in offers(route, access, notes):
            try:
                if not transport.auth_publickey(route.user, key):
                    return name
                notes.append(f"{name} is accepted, and the server wants more than a key")
            except paramiko.BadAuthenticationType as refusal:
                notes.append(f"the server takes no keys, only {', '.join(refusal.allowed_types)}")
                break
            except paramiko.AuthenticationException:
                tried.append(name)
        if access.password is not None:
            try:
                if not transport.auth_password(route.user, access.password):
                    return "password"
            except paramiko.BadAuthenticationType as refusal:
                notes.append(f"the server takes no passwords, only {', '.join(refusal.allowed_types)}")
            except paramiko.AuthenticationException:
                tried.append("password")
    except (paramiko.SSHException, EOFError, OSError) as error:
        notes.append(f"the server closed the connection ({words_of(error)})")
        if len(tried) > 2:
            notes.append("too many keys were offered: name one with --ssh-key, or set IdentitiesOnly")
    what = f"refused {', '.join(tried)}" if tried else "no key to offer"
    raise SshError(host, "authentication", f"user {route.user}: " + "; ".join([what, *notes]),
                   "install a key there (ssh-copy-id), or --ssh-password")
