"""Real sshd processes on loopback addresses, for this user, each with keys, a home and a login shell of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import program

# What a ProxyCommand does: between its own input and output and a port.
RELAY = """
import os, select, socket, sys
there = socket.create_connection((sys.argv[1], int(sys.argv[2])))
while True:
    for ready in select.select([0, there], [], [])[0]:
        block = os.read(ready if ready == 0 else there.fileno(), 65536)
        if not block:
            sys.exit()
        os.write(1, block) if ready is there else there.sendall(block)
"""


def free_port() -> int:
    """Return a port that was free on all addresses a moment ago."""
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]


def make_key(path: Path) -> Path:
    """Make an Ed25519 key pair without a passphrase."""
    subprocess.run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)
    return path


class SshServer:
    """An sshd below `folder`; `home` is what its sessions have as HOME. `options` are more lines of its sshd_config."""

    def __init__(self, folder: Path, shell: str = "bash", address: str = "127.0.0.1", options: str = "",
                 command: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.home, self.address, self.port = folder, folder / "home", address, free_port()
        self.home.mkdir(exist_ok=True)
        self.host_key, self.authorized_keys = make_key(folder / "host_key"), folder / "authorized_keys"
        # The account's shell is what it is: it only starts the shell that plays the login shell here.
        command = command or (f"HOME='{self.home}' XDG_CONFIG_HOME='{self.home}/.config' exec {program(shell)} -c "
                              '"$SSH_ORIGINAL_COMMAND"')
        (folder / "sshd_config").write_text(f"""
ListenAddress {address}
Port {self.port}
HostKey {self.host_key}
PidFile {folder}/sshd.pid
AuthorizedKeysFile {self.authorized_keys} {self.home}/.ssh/authorized_keys
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
PrintMotd no
{options}
ForceCommand {command}
""")
        self.prefix: list[str] = []  # of the command that starts it
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SshServer:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        log = self.folder / "sshd.log"
        self._process = subprocess.Popen(
            [*self.prefix, program("sshd"), "-D", "-f", str(self.folder / "sshd_config"), "-E", str(log)])
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                socket.create_connection((self.address, self.port), timeout=1).close()
                return self
            except OSError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.05)
        pytest.fail(f"sshd does not start: {log.read_text() if log.exists() else ''}")

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait(timeout=60)


class SshClient:
    """A user's ssh files below `folder`: a key, an ssh_config with a Host block for each server, a known_hosts."""

    def __init__(self, folder: Path, **servers: SshServer) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.key, self.known_hosts, self.config = make_key(folder / "key"), folder / "known_hosts", folder / "config"
        blocks = ""
        for name, server in servers.items():
            server.authorized_keys.write_text(self.key.with_suffix(".pub").read_text())
            blocks += f"Host {name}\n  HostName {server.address}\n  Port {server.port}\n"
        self.config.write_text(f"""{blocks}
Host *
  IdentityFile {self.key}
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {self.known_hosts}
  GlobalKnownHostsFile none
""")

    def trust(self, server: SshServer, key: Path | None = None) -> None:
        """Note a server's key (or another) as known."""
        kind, blob = (key or server.host_key).with_suffix(".pub").read_text().split()[:2]
        with self.known_hosts.open("a") as file:
            file.write(f"[{server.address}]:{server.port} {kind} {blob}\n")

    def run(self, name: str, command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command as OpenSSH's client does, with this text as its input."""
        words = [program("ssh"), "-F", str(self.config), "-T", "-o", "BatchMode=yes",
                 "-o", "StrictHostKeyChecking=accept-new", name, command]
        return subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=60)


# -- servers that are none ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listener(act: Callable[[socket.socket], None]) -> Iterator[int]:
    """A TCP server that does `act` with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=act, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def silent(connection: socket.socket) -> None:
    time.sleep(60)
    connection.close()


def half_a_banner(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-Open")
    connection.close()


def chatty(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"220 mail ready\r\n" * 1000)
