"""A command that keeps running on a host while both sides exchange data: its input stays open, its output is streamed.

    with contextlib.closing(session.open(command)) as channel:
        channel.send(b"...")
        block = channel.receive(1.0)
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from master.ssh.route import SshError

if TYPE_CHECKING:
    import paramiko

BLOCK = 65536
STDERR_TAIL = 4096  # bytes of standard error that are kept, the last ones
TICK = 0.1  # seconds after which a waiting side looks at the clock: both directions of a channel share one time limit
SEND_TIMEOUT_S = 60.0  # seconds in which a peer that takes nothing is gone


def wait_for(descriptor: int, event: int, seconds: float) -> bool:
    """Return whether a file is ready (select.POLLIN, POLLOUT) or at its end within the time; select() ends at 1,024."""
    watch = select.poll()
    watch.register(descriptor, event)
    return bool(watch.poll(seconds * 1000))


class Channel(Protocol):
    """Raises SshError if the connection breaks."""

    def send(self, data: bytes) -> None:
        """Write to the command's input."""
        ...

    def receive(self, seconds: float) -> bytes | None:
        """Return what came, None if nothing did within the time, b"" at the end."""
        ...

    def stderr_tail(self) -> str:
        """Return the last of what the command wrote to standard error."""
        ...

    def close(self) -> None:
        """Release the command; it sees the end of its input."""
        ...


class ProcessChannel:
    """A command that runs as a process here: a shell's, or OpenSSH's client."""

    def __init__(self, words: Sequence[str], host: str) -> None:
        self._host = host
        self._process = subprocess.Popen(list(words), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._err = self._process.stderr.fileno()
        os.set_blocking(self._err, False)
        os.set_blocking(self._in, False)
        self._stderr = b""

    def send(self, data: bytes) -> None:
        """Write all of it."""
        rest, since = memoryview(data), time.monotonic()
        try:
            while rest:
                if wait_for(self._in, select.POLLOUT, TICK):
                    rest, since = rest[os.write(self._in, rest[:BLOCK]) :], time.monotonic()
                elif time.monotonic() - since > SEND_TIMEOUT_S:
                    raise SshError(self._host, "command", f"it accepted no data for {SEND_TIMEOUT_S:.0f} s")
        except OSError as error:
            raise SshError(self._host, "command", f"it stopped reading: {error.strerror}") from None

    def receive(self, seconds: float) -> bytes | None:
        """Wait for output."""
        ready = wait_for(self._out, select.POLLIN, seconds)
        self.stderr_tail()
        return os.read(self._out, BLOCK) if ready else None

    def stderr_tail(self) -> str:
        """Read what is there."""
        with contextlib.suppress(BlockingIOError, ValueError):
            while block := os.read(self._err, BLOCK):
                self._stderr = (self._stderr + block)[-STDERR_TAIL:]
        return self._stderr.decode("utf-8", "replace").strip()

    def close(self) -> None:
        """Close the pipes; kill what does not end by itself within seconds."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in a driver can't be killed
                self._process.wait(timeout=5)
        if self._process.stderr:
            self._process.stderr.close()


class SshChannel:
    """A command in a channel of a paramiko connection."""

    def __init__(self, channel: paramiko.Channel, command: str, host: str) -> None:
        self._channel, self._host, self._stderr = channel, host, b""
        channel.exec_command(command)
        channel.settimeout(TICK)

    def send(self, data: bytes) -> None:
        """Write all of it; one thread may send while another receives."""
        rest, since = memoryview(data), time.monotonic()
        while rest:
            try:
                count = self._channel.send(bytes(rest[:BLOCK]))
                if not count:
                    raise OSError("it is closed")
                rest, since = rest[count:], time.monotonic()
            except TimeoutError:
                if time.monotonic() - since > SEND_TIMEOUT_S:
                    raise SshError(self._host, "command", f"it accepted no data for {SEND_TIMEOUT_S:.0f} s") from None
            except Exception as error:  # EOFError and paramiko's own among them
                raise SshError(self._host, "command", f"the connection broke: {error or 'closed'}") from None

    def receive(self, seconds: float) -> bytes | None:
        """Wait for output."""
        end = time.monotonic() + seconds
        while True:
            try:
                return self._channel.recv(BLOCK)
            except TimeoutError:
                if time.monotonic() >= end:
                    return None
            except OSError as error:
                raise SshError(self._host, "command", f"the connection broke: {error}") from None

    def stderr_tail(self) -> str:
        """Read what is there."""
        while self._channel.recv_stderr_ready():
            self._stderr = (self._stderr + self._channel.recv_stderr(BLOCK))[-STDERR_TAIL:]
        return self._stderr.decode("utf-8", "replace").strip()

    def close(self) -> None:
        """Close it."""
        self._channel.close()
