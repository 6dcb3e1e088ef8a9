"""A session on a host, whichever way it was reached: here, by paramiko, or by OpenSSH's own client.

All have the same two methods: run(command, stdin, timeout) -> Result, and close(). Output is bounded, and so is time.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from master.ssh.channel import Channel, ProcessChannel
from master.ssh.node_names import Node
from master.ssh.route import Route, SshError, SshOptions, ssh_words

OUTPUT_LIMIT = 8 << 20  # bytes of one command's output; who prints more is flooding
# What OpenSSH's client says, and the stage that it is about.
OPENSSH_STAGES = [
    ("could not resolve", "name lookup"), ("name or service not known", "name lookup"),
    ("connection refused", "TCP"), ("timed out", "TCP"), ("no route to host", "TCP"), ("network is unreachable", "TCP"),
    ("host key verification failed", "host key"),
    ("permission denied", "authentication"), ("too many authentication failures", "authentication"),
]


@dataclass(frozen=True)
class CommandResult:
    """How a command ended: exit code (negative: the signal that ended it) and what it printed."""

    code: int
    out: str
    err: str


def last_words(out: str, err: str) -> str:
    """Return what a host says last of why it does nothing: on standard error, or, as nologin does, on output."""
    said = [text.strip().splitlines()[-1].strip() for text in (err, out) if text.strip()]
    return said[0] if said else "it printed nothing"


def sh_command(program: str, *words: str) -> str:
    """Return a command that runs a program of many lines by sh, from whatever shell the account has.

    csh takes no line break in quotes, and no exclamation mark: what isn't plain goes as printf's octal escapes.
    """
    plain = re.sub(rb"[^A-Za-z0-9_./= -]", lambda found: b"\\0%03o" % ord(found[0]), program.encode())
    return shlex.join(["exec", "sh", "-c", 'eval "$(printf %b "$0")"', plain.decode(), *words])


class Session(Protocol):
    """A host that commands can run on. `way` is local, paramiko or openssh; `fingerprint` the host key's, if known."""

    node: Node
    way: str
    fingerprint: str | None

    def run(self, command: str, stdin: bytes = b"", timeout: float | None = None) -> CommandResult:
        """Run a command in the login shell there; raise SshError if it can't be run or doesn't end in time."""
        ...

    def open(self, command: str) -> Channel:
        """Start a command and return the channel to it; raise SshError if that can't be."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class LocalSession:
    """This machine itself."""

    way = "local"

    def __init__(self, node: Node, ssh: SshOptions) -> None:
        self.node, self._ssh = node, ssh
        self.fingerprint: str | None = None

    def run(self, command: str, stdin: bytes = b"", timeout: float | None = None) -> CommandResult:
        """Run a command by sh."""
        return run_process(["/bin/sh", "-c", command], stdin, timeout or self._ssh.timeout, str(self.node))

    def open(self, command: str) -> Channel:
        """Start a command by sh."""
        return ProcessChannel(["/bin/sh", "-c", command], str(self.node))

    def close(self) -> None:
        """Nothing to close."""


class OpenSshSession:
    """A host reached by OpenSSH's client in batch mode, for what paramiko can't do."""

    way = "openssh"

    def __init__(self, route: Route, ssh: SshOptions) -> None:
        self.node = route.node
        self.fingerprint: str | None = None
        strict = "accept-new" if route.host_keys == "accept-new" else "yes"
        seconds = str(max(1, int(ssh.connect_timeout)))
        self._words = [*ssh_words(ssh, route.node), "-T", "-a", "-x", "-o", "BatchMode=yes",
                       "-o", f"ConnectTimeout={seconds}", "-o", f"StrictHostKeyChecking={strict}",
                       "-o", "ServerAliveInterval=15", "-o", "ClearAllForwardings=yes", "-o", "RemoteCommand=none",
                       *(word for key in ssh.more_keys if key.exists() for word in ("-i", str(key))),
                       *(["-o", "IdentitiesOnly=yes"] if ssh.only else [])]
        self._ssh = ssh
        self.run("exit 0", timeout=ssh.connect_timeout * 2)  # raises if there is no way in

    def run(self, command: str, stdin: bytes = b"", timeout: float | None = None) -> CommandResult:
        """Run a command over a connection of its own."""
        host = str(self.node)
        done = run_process([*self._words, "--", self.node.host, command], stdin, timeout or self._ssh.timeout, host)
        if done.code == 255:
            raise openssh_error(host, done.err)
        return done

    def open(self, command: str) -> Channel:
        """Start a command over a connection of its own."""
        return ProcessChannel([*self._words, "--", self.node.host, command], str(self.node))

    def close(self) -> None:
        """Each command had a connection of its own."""


def openssh_error(host: str, text: str) -> SshError:
    """Return what ssh's error output means."""
    lines = [line for line in text.strip().splitlines() if line.strip()] or ["ssh failed without any output"]
    if "identification has changed" in text.lower():
        place = next((line.strip() for line in lines if line.startswith("Offending")), "the known one")
        return SshError(host, "host key", f"not the one that is known: {place}", "ask its owner; if the machine was "
                        "reinstalled, ssh-keygen -R removes the old key")
    for words, stage in OPENSSH_STAGES:
        for line in reversed(lines):
            if words in line.lower():
                asks = f"ssh {shlex.quote(host)} asks about it, or --host-keys accept-new"
                return SshError(host, stage, line.strip(), asks if stage == "host key" else "")
    return SshError(host, "connection", lines[-1].strip())


def run_process(command: Sequence[str], stdin: bytes, timeout: float, host: str) -> CommandResult:
    """Run a program with its input and output bounded; it gets a process group of its own, which ends with it."""
    process = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    try:
        out, err = communicate(process, stdin, time.monotonic() + timeout, host, timeout)
        return CommandResult(process.wait(timeout=5), out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))
    except subprocess.TimeoutExpired:
        raise SshError(host, "command", "its process does not end") from None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in a driver can't be killed
                process.wait(timeout=5)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


def communicate(
    process: subprocess.Popen[bytes], stdin: bytes, deadline: float, host: str, timeout: float
) -> tuple[bytes, bytes]:
    """Feed a process and collect what it prints until both its pipes are closed; raise SshError past the bounds."""
    assert process.stdin and process.stdout and process.stderr
    collected = {process.stdout: bytearray(), process.stderr: bytearray()}
    rest = memoryview(stdin)
    with selectors.DefaultSelector() as ready:
        for pipe in collected:
            os.set_blocking(pipe.fileno(), False)
            ready.register(pipe, selectors.EVENT_READ)
        os.set_blocking(process.stdin.fileno(), False)
        ready.register(process.stdin, selectors.EVENT_WRITE)
        while ready.get_map():
            if time.monotonic() >= deadline:
                raise SshError(host, "command", f"no end after {timeout:g} s", "--timeout gives it more")
            for key, _ in ready.select(timeout=max(0.0, deadline - time.monotonic())):
                if key.fileobj is process.stdin:
                    try:
                        rest = rest[os.write(process.stdin.fileno(), rest[:65536]) :] if rest else rest
                    except OSError:  # it doesn't read any more
                        rest = memoryview(b"")
                    if not rest:
                        ready.unregister(process.stdin)
                        with contextlib.suppress(OSError):
                            process.stdin.close()
                    continue
                block = os.read(key.fd, 65536)
                target = collected[key.fileobj]  # type: ignore[index]
                target += block
                if not block:
                    ready.unregister(key.fileobj)
                if sum(map(len, collected.values())) > OUTPUT_LIMIT:
                    raise SshError(host, "command", f"printed more than {OUTPUT_LIMIT >> 20} MiB")
    return bytes(collected[process.stdout]), bytes(collected[process.stderr])
