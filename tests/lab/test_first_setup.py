"""From three machines that know only a password to a hostfile, by the README's two commands, and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from machines import Machine, nvidia_gpu
from ssh_server import make_key
from terminal import type_into

from lab.hosts import NETWORK, Host, Lab

pytestmark = [pytest.mark.lab, pytest.mark.needs("/usr/bin/python3", "openssl")]
PASSWORD = "correct horse battery"
SYSTEM_PYTHON = "/usr/bin/python3"  # one that every account may read


class Desk:
    """A person at the master: commands run in its folder, as root there, with its home and the project's tools."""

    def __init__(self, lab: Lab) -> None:
        self.master, self.folder = lab.master, lab.folder / "desk"
        self.folder.mkdir()
        self.home = lab.master.homes / "root"

    def words(self, *command: str) -> list[str]:
        """Return a command line that runs an invoke task at the desk."""
        settings = [f"HOME={self.home}", f"PATH={Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
                    "TERM=xterm", "COLUMNS=200"]
        line = ["env", "-C", str(self.folder), *settings, "invoke", "-r", str(ROOT), *command]
        return self.master.words(*line)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run an invoke task without a terminal."""
        done = subprocess.run(self.words(*command), capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert "Traceback" not in done.stderr, done.stderr
        return done


@pytest.fixture
def hosts(lab: Lab) -> list[Host]:
    """gpu1 with two GPUs, gpu2 of whose two one is lost; gpu3 has an address and no machine."""
    found = []
    for name, gpus in (("gpu1", [nvidia_gpu(0), nvidia_gpu(1)]),
                       ("gpu2", [nvidia_gpu(0), "Unable to determine the device handle for GPU1: 0000:02:00.0: "
                                 "GPU is lost.  Reboot the system to recover this GPU"])):
        host, machine = lab.add(name, PASSWORD), Machine(lab.folder / f"{name}-machine")
        machine.nvidia(*gpus, python=SYSTEM_PYTHON)
        host.serve(GPU_DETECT_SYSROOT=str(machine.root), PATH=f"{machine.bin}:/usr/bin:/bin")
        found.append(host)
    lab.master.resolve(*found)
    with (lab.master.etc / "hosts").open("a") as file:
        file.write(f"{NETWORK}.99 gpu3\n")
    return found


def files_of(host: Host) -> dict[str, str]:
    """All that stands in a worker's home."""
    return {str(path.relative_to(host.home)): path.read_text() for path in host.home.rglob("*") if path.is_file()}


def test_two_commands_lead_from_passwords_to_a_hostfile_and_back(lab: Lab, hosts: list[Host]) -> None:
    from deepspeed.launcher.runner import _parse_hostfile

    desk = Desk(lab)
    (hosts[1].home / ".profile").write_text("echo hello from gpu2\n")
    before = [files_of(host) for host in hosts]
    nodes = ("--nodes", "gpu[1-3]")
    more = ("--", "--ssh-user", "worker", "--connect-timeout", "3")
    code, screen = type_into(desk.words("setup-keys", *nodes, *more), {
        "Trust them from now on?": "yes", "their password": PASSWORD, "reach the hosts too?": "yes"})
    assert code == 1, screen  # gpu3 refuses
    assert screen.count("their password") == 1 and PASSWORD not in screen
    assert screen.count("  installed") >= 2 and "gpu3  -" in screen and "FAILED: TCP" in screen
    assert all((host.home / ".ssh" / "authorized_keys").stat().st_mode & 0o777 == 0o600 for host in hosts)

    done = desk.run("hostfile", *nodes)
    hostfile = desk.folder / "hostfile.txt"
    assert done.returncode == 1 and hostfile.exists(), done.stderr
    assert hostfile.read_text() in done.stdout
    assert dict(_parse_hostfile(hostfile.read_text().splitlines())) == {"gpu1": 2, "gpu2": 1}
    assert "# gpu2: 1x NVIDIA GeForce RTX 3090 24576 MiB; 1 GPU unusable (NV_GPU_LOST)" in hostfile.read_text()
    assert "# gpu3: TCP: gpu3 port 22: No route to host" in hostfile.read_text()
    cluster = json.loads((desk.folder / "cluster.json").read_text())
    assert [(host["name"], host["address"]) for host in cluster["hosts"]] == [
        ("gpu1", hosts[0].address), ("gpu2", hosts[1].address)]

    state = hostfile.read_bytes(), [files_of(host) for host in hosts], (desk.home / ".ssh" / "config").read_text()
    again = desk.run("setup-keys", *nodes, *more)
    assert again.stdout.count("  was there\n") == 2 and "write" not in again.stderr, again.stderr
    assert "hostfile.txt: unchanged" in desk.run("hostfile", *nodes).stderr
    assert (hostfile.read_bytes(), [files_of(host) for host in hosts],
            (desk.home / ".ssh" / "config").read_text()) == state

    gone = desk.run("setup-keys", *nodes, "--remove", "--", "--yes", *more[1:])
    assert gone.stdout.count("  removed\n") == 2, gone.stdout + gone.stderr
    assert [files_of(host) for host in hosts] == before
    assert not (desk.home / ".ssh" / "config").exists()


def test_this_machine_as_a_node_has_the_address_that_the_others_see(lab: Lab, hosts: list[Host]) -> None:
    desk = Desk(lab)
    (desk.home / ".ssh").mkdir(mode=0o700)
    key = make_key(desk.home / ".ssh" / "id_ed25519")
    folder = hosts[0].home / ".ssh"
    folder.mkdir()
    (folder / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
    subprocess.run(["chown", "-R", "3001:3001", str(folder)], check=True)
    done = desk.run("hostfile", "--nodes", "localhost,gpu1", "--cpu-slots", "2", "--", "--ssh-user", "worker",
                    "--host-keys", "accept-new")
    assert done.returncode == 0, done.stderr
    cluster = json.loads((desk.folder / "cluster.json").read_text())
    assert [host["address"] for host in cluster["hosts"]] == [lab.master.address, hosts[0].address]
