"""Whole machines for tests: each with a network card, mounts, a name, process ids and accounts of its own.

They are namespaces of this kernel (as root: `unshare`), joined by a bridge in one more of them; nothing of this
machine's own network is touched, and no packet leaves it. Ending a machine's first process ends all that runs on it.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from programs import let_others_in, program
from ssh_server import make_key

NETWORK = "10.77.0"  # inside the namespaces only


class Namespaces:
    """A first process in namespaces of its own, in which others are started; `pid` is what this machine calls it."""

    def __init__(self, name: str, setup: str = "") -> None:
        self.name = name
        command = ["unshare", "-m", "-u", "-p", "-n", "-i", "--fork", "--mount-proc", "--kill-child", "sh", "-c",
                   f"hostname {name} && {setup or 'true'} && echo ready && exec sleep 3600"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        if self._process.stdout.readline() != "ready\n":
            pytest.fail(f"{name}: no namespaces here")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        self.pid = int(children.split()[0])

    def words(self, *command: str, network_only: bool = False) -> list[str]:
        """Return a command line that runs a command there."""
        spaces = ["-n"] if network_only else ["-m", "-u", "-p", "-n", "-i"]
        return ["nsenter", "-t", str(self.pid), *spaces, f"--wd={os.getcwd()}", "--", *command]

    def network(self, command: str) -> None:
        """Run a command of this machine in that network."""
        done = subprocess.run(self.words(*command.split(), network_only=True), capture_output=True, text=True)
        assert done.returncode == 0, f"{self.name}: {command}: {done.stderr}"

    def end(self) -> None:
        """End all that runs there."""
        self._process.kill()
        self._process.wait(timeout=60)
        if self._process.stdout:
            self._process.stdout.close()


def write_accounts(etc: Path, users: dict[str, tuple[int, Path]], password: str) -> None:
    """Write passwd and shadow into a folder, this machine's with other users (number and home), and make the homes.

    To be mounted over those in /etc, in a namespace: this machine's own stay as they are.
    """
    etc.mkdir(parents=True)
    lines = {name: Path(f"/etc/{name}").read_text().splitlines() for name in ("passwd", "shadow")}
    for user, (uid, home) in users.items():
        home.mkdir(parents=True)
        os.chown(home, uid, uid)
        home.chmod(0o755)
        for name in lines:
            lines[name] = [line for line in lines[name] if not line.startswith(f"{user}:")]
        lines["passwd"].insert(0, f"{user}:x:{uid}:{uid}::{home}:/bin/bash")
        secret = subprocess.run([program("openssl"), "passwd", "-6", "-stdin"], input=password, text=True,
                                capture_output=True, check=True).stdout.strip() if password else "*"
        lines["shadow"].insert(0, f"{user}:{secret}:20000:0:99999:7:::")
    for name, text in lines.items():
        (etc / name).write_text("\n".join(text) + "\n")
        (etc / name).chmod(0o640 if name == "shadow" else 0o644)


def over_etc(etc: Path) -> str:
    """Return the command that mounts a folder's files over those of the same names in /etc."""
    names = sorted(path.name for path in etc.iterdir() if Path("/etc", path.name).exists())
    return " && ".join(f"mount --bind {etc / name} /etc/{name}" for name in names)


class Host(Namespaces):
    """A machine of the lab, with an account `worker` and root, homes below `folder`/home, and an sshd on request."""

    def __init__(self, lab: Lab, name: str, number: int, password: str = "") -> None:
        self.folder, self.address = lab.folder / name, f"{NETWORK}.{number}"
        self.etc, self.homes = self.folder / "etc", self.folder / "home"
        users = {"root": (0, self.homes / "root"), "worker": (3001, self.homes / "worker")}
        write_accounts(self.etc, users, password)
        (self.etc / "machine-id").write_text(f"{number:032x}\n")
        (self.etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")  # as Debian's installer writes it
        super().__init__(name, over_etc(self.etc))
        self.network("ip link set lo up")
        lab.hosts.append(self)
        lab.switch.network(f"ip link add port{number} type veth peer name eth0 netns {self.pid}")
        lab.switch.network(f"ip link set port{number} master lan up")
        self.network(f"ip address add {self.address}/24 dev eth0")
        self.network("ip link set eth0 up")

    @property
    def home(self) -> Path:
        """The home of `worker`."""
        return self.homes / "worker"

    def serve(self, options: str = "", **variables: str) -> None:
        """Start sshd on port 22; its sessions have these environment variables."""
        Path("/run/sshd").mkdir(exist_ok=True)
        key = make_key(self.folder / "host_key")
        setenv = " ".join(f'"{name}={value}"' for name, value in variables.items())
        (self.folder / "sshd_config").write_text(
            f"HostKey {key}\nPidFile none\nUsePAM no\nPasswordAuthentication yes\nPrintMotd no\n"
            f"{f'SetEnv {setenv}' if setenv else ''}\n{options}\n")
        words = self.words(program("sshd"), "-D", "-f", str(self.folder / "sshd_config"),
                           "-E", str(self.folder / "sshd.log"))
        subprocess.Popen(words, stdin=subprocess.DEVNULL)  # ends with the machine
        probe = self.words("sh", "-c", "ss -ltn | grep -q ':22 '")
        end = time.monotonic() + 20
        while subprocess.run(probe, stderr=subprocess.DEVNULL).returncode:
            if time.monotonic() > end:
                pytest.fail(f"sshd does not start: {(self.folder / 'sshd.log').read_text()}")
            time.sleep(0.05)

    def resolve(self, *others: Host) -> None:
        """Let this machine find others by their names."""
        with (self.etc / "hosts").open("a") as file:
            file.writelines(f"{other.address} {other.name}\n" for other in others)


class Lab:
    """Machines on one bridge, and `master`, the one where a person sits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        let_others_in(folder)  # another account has its home below
        self.switch = Namespaces("switch")
        self.hosts: list[Host] = []
        try:
            self.switch.network("ip link add lan type bridge")
            self.switch.network("ip link set lan up")
            self.master = self.add("master")
        except BaseException:
            self.end()
            raise

    def add(self, name: str, password: str = "") -> Host:
        """Switch on one more machine."""
        return Host(self, name, 10 + len(self.hosts), password)

    def end(self) -> None:
        """Switch all off."""
        for host in [*self.hosts, self.switch]:
            host.end()
