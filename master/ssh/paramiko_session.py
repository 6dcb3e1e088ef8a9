"""Sessions by paramiko: one connection a host, its key verified; authentication.py logs in."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any

import paramiko

from master.ssh.authentication import message_of
from master.ssh.channel import Channel, SshChannel, wait_for
from master.ssh.known_hosts import HostKey, KnownHost, known_kinds_first, refuse_changed_key
from master.ssh.node_names import Node
from master.ssh.route import NeedsOpenSsh, Route, SshError, SshOptions
from master.ssh.session import OUTPUT_LIMIT, CommandResult

BANNER_TRIES = 5  # a server that is asked by many at once (MaxStartups) closes before its banner
logging.getLogger("paramiko").addHandler(logging.NullHandler())  # its words are in the errors raised here


class ParamikoSession:
    """An authenticated connection."""

    way = "paramiko"

    def __init__(self, node: Node, transport: paramiko.Transport, key: HostKey, ssh: SshOptions) -> None:
        self.node, self._transport, self._ssh = node, transport, ssh
        self.fingerprint: str | None = key.fingerprint

    def run(self, command: str, stdin: bytes = b"", timeout: float | None = None) -> CommandResult:
        """Run a command in a channel of its own."""
        seconds = timeout or self._ssh.timeout
        host = str(self.node)
        try:
            with contextlib.closing(self._transport.open_session(timeout=self._ssh.connect_timeout)) as channel:
                channel.exec_command(command)
                return communicate(channel, stdin, seconds, host)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise SshError(host, "command", f"the connection broke: {message_of(error)}") from None

    def open(self, command: str) -> Channel:
        """Start a command in a channel of its own."""
        try:
            channel = self._transport.open_session(timeout=self._ssh.connect_timeout)
            return SshChannel(channel, command, str(self.node))
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise SshError(str(self.node), "command", f"the connection broke: {message_of(error)}") from None

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()


def communicate(channel: paramiko.Channel, stdin: bytes, seconds: float, host: str) -> CommandResult:
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
        wait_for(channel.fileno(), select.POLLIN, 0.02 if sent < len(stdin) or channel.eof_received else 0.5)
    return CommandResult(channel.recv_exit_status(), out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


# -- the handshake -----------------------------------------------------------------------------------------------------


def handshake(route: Route, ssh: SshOptions, entries: Sequence[KnownHost]) -> tuple[paramiko.Transport, HostKey, str]:
    """Connect and exchange keys; return the connection, the host's key and whether it's known (KNOWN or UNKNOWN).

    `entries` is what is known of the host. Raises SshError, also for a key that changed or was revoked, and
    NeedsOpenSsh for a server that has no cipher or key exchange in common with paramiko.
    """
    host = str(route.node)
    for attempt in range(1, BANNER_TRIES + 1):
        connection = dial(route, ssh)
        transport = paramiko.Transport(connection)
        transport.auth_timeout = ssh.connect_timeout
        # start_client's limit must be the one that ends the wait: paramiko's own would call it a bad banner
        transport.banner_timeout = transport.handshake_timeout = ssh.connect_timeout + 10
        options = transport.get_security_options()
        allowed = [kind for kind in options.key_types if not route.host_key_kinds or kind in route.host_key_kinds]
        if not allowed:
            raise NeedsOpenSsh("HostKeyAlgorithms")
        options.key_types = known_kinds_first(entries, allowed)
        try:
            transport.start_client(timeout=ssh.connect_timeout)
            if not transport.initial_kex_done:
                raise paramiko.SSHException(f"no answer within {ssh.connect_timeout:g} s")
            break
        except paramiko.IncompatiblePeer as error:
            transport.close()
            raise NeedsOpenSsh(message_of(error)) from None
        except (paramiko.SSHException, EOFError, OSError) as error:
            transport.close()
            closed = isinstance(error.__context__ or error, EOFError) or "banner" in str(error)
            if not closed or attempt == BANNER_TRIES or "no answer" in str(error):
                if isinstance(connection, ProxySocket) and connection.last_words:
                    raise SshError(host, "jump host", connection.last_words, f"by hand: ssh {host}") from None
                raise SshError(host, "handshake", message_of(error),
                               "is that an SSH server, and not overloaded?") from None
            time.sleep(attempt * random.uniform(0.3, 1.0))  # noqa: S311, spreads the retries
    remote = transport.get_remote_server_key()
    key = HostKey(remote.get_name(), remote.get_base64())
    if remote.get_name() == "ssh-rsa" and remote.get_bits() < route.min_rsa_bits:
        transport.close()
        raise SshError(host, "host key", f"its RSA key has {remote.get_bits()} bits, and RequiredRSASize demands "
                       f"{route.min_rsa_bits}")
    try:
        verdict = refuse_changed_key(key, entries, route)
    except SshError:
        transport.close()
        raise
    transport.set_keepalive(15)
    return transport, key, verdict


class ProxySocket(socket.socket):
    """The way to a host through a proxy command: a socket pair whose other end is the command's input and output."""

    _process: subprocess.Popen[bytes] | None = None
    _words: IO[bytes]
    last_words = ""

    @classmethod
    def start(cls, command: str) -> ProxySocket:
        """Start a command, read by a shell as OpenSSH has it, and return the socket that leads to it."""
        ours, theirs = socket.socketpair()
        found = cls(fileno=ours.detach())
        found._words = tempfile.TemporaryFile()  # noqa: SIM115, what it complains of; closed with the socket
        with theirs:
            found._process = subprocess.Popen(["sh", "-c", f"exec {command}"], stdin=theirs.fileno(),
                                              stdout=theirs.fileno(), stderr=found._words, start_new_session=True)
        return found

    def close(self) -> None:
        """Close the socket and end the command."""
        super().close()
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
                break
        with self._words as words:
            words.seek(0)
            self.last_words = (words.read(4096).decode("utf-8", "replace").strip().splitlines() or [""])[-1]


def dial(route: Route, ssh: SshOptions) -> Any:
    """Return a connected socket, or a proxy command's."""
    host = str(route.node)
    if route.proxy:
        return ProxySocket.start(route.proxy)
    try:
        found = socket.getaddrinfo(route.address, route.port, route.family, socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise SshError(host, "name lookup", f"{route.address}: {getattr(error, 'strerror', error)}",
                       "give its address, or a Host block in ~/.ssh/config") from None
    reason: OSError = OSError("no address")
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(ssh.connect_timeout)
        try:
            if route.bind_address:
                connection.bind((route.bind_address, 0))
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            reason = error
    text = f"no answer within {ssh.connect_timeout:g} s" if isinstance(reason, TimeoutError) else reason.strerror
    raise SshError(host, "TCP", f"{route.address} port {route.port}: {text or message_of(reason)}",
                   "is it on, and does sshd listen there?")
