"""A real sshd on the loopback address, for this user, with keys, a home folder and a login shell of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

INSTALL = "sudo apt install openssh-server openssh-client zsh tcsh fish dash"


def find_program(name: str) -> str | None:
    """Return a program's path; sshd is where users don't look."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def program(name: str) -> str:
    """Return a program's path, or fail the test with how to install it."""
    found = find_program(name)
    if not found:
        pytest.fail(f"needs {name}: {INSTALL}")
    return found


def free_port() -> int:
    """Return a port of the loopback address that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def make_key(path: Path) -> Path:
    """Make an Ed25519 key pair without a passphrase."""
    subprocess.run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)
    return path


class SshServer:
    """An sshd below `folder`; `home` is what its sessions have as HOME, `config` an ssh_config with the host `node`."""

    def __init__(self, folder: Path, shell: str = "bash") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.home, self.port = folder, folder / "home", free_port()
        self.home.mkdir()
        host_key, user_key = make_key(folder / "host_key"), make_key(folder / "user_key")
        (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
        # The account's shell is what it is: it only starts the shell that plays the login shell here.
        (folder / "sshd_config").write_text(f"""
ListenAddress 127.0.0.1
Port {self.port}
HostKey {host_key}
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
PrintMotd no
ForceCommand HOME='{self.home}' XDG_CONFIG_HOME='{self.home}/.config' exec {program(shell)} -c "$SSH_ORIGINAL_COMMAND"
""")
        self.config = folder / "ssh_config"
        self.config.write_text(f"""
Host node
  HostName 127.0.0.1
  Port {self.port}
  IdentityFile {user_key}
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking accept-new
  BatchMode yes
""")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SshServer:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        log = self.folder / "sshd.log"
        self._process = subprocess.Popen(
            [program("sshd"), "-D", "-f", str(self.folder / "sshd_config"), "-E", str(log)])
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            except OSError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.05)
        pytest.fail(f"sshd does not start: {log.read_text() if log.exists() else ''}")

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait(timeout=10)

    def run(self, command: str, stdin: str = "", words: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run a command there as OpenSSH's client does, with this text as its input."""
        return subprocess.run([program("ssh"), "-F", str(self.config), "-T", *words, "node", command], input=stdin,
                              capture_output=True, text=True, timeout=60)
