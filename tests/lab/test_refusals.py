"""Machines that refuse logins, or many at once: each is reported for what it is, and costs the others nothing."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from conftest import ROOT
from ssh_server import make_key

from lab.hosts import NETWORK, Host, Lab

pytestmark = pytest.mark.lab
CPU = ("--cpu-slots", "1")


def ask(lab: Lab, tool: str, nodes: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a tool at the master."""
    folder = lab.folder / "desk"
    folder.mkdir(exist_ok=True)
    done = subprocess.run(lab.master.words(
        "env", "-C", str(folder), "-u", "SSH_AUTH_SOCK", f"HOME={lab.master.homes / 'root'}", sys.executable,
        str(ROOT / "master" / tool), "--nodes", nodes, "--ssh-user", "worker", "--host-keys", "accept-new",
        "--connect-timeout", "4", *words), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def add(lab: Lab, name: str, options: str = "") -> Host:
    """Switch on a machine that knows the master's key."""
    key = lab.master.homes / "root" / ".ssh" / "id_ed25519"
    if not key.exists():
        key.parent.mkdir(mode=0o700)
        make_key(key)
    host = lab.add(name)
    folder = host.home / ".ssh"
    folder.mkdir(mode=0o700)
    (folder / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
    subprocess.run(["chown", "-R", "3001:3001", str(folder)], check=True)
    host.serve(options)
    lab.master.resolve(host)
    return host


def test_an_account_that_has_ended_is_told(lab: Lab) -> None:
    ended, _ = add(lab, "ended"), add(lab, "good")
    shadow = ended.etc / "shadow"
    lines = [line if not line.startswith("worker:") else "worker:*:20000:0:99999:7::1:"  # shadow(5): ended in 1970
             for line in shadow.read_text().splitlines()]
    shadow.write_text("\n".join(lines) + "\n")
    done = ask(lab, "generate_hostfile.py", "ended,good", *CPU)
    assert done.returncode == 1 and "good slots=1 type=CPU\n" in done.stdout, done.stderr
    assert "ended  failed    authentication: user worker: refused" in done.stderr, done.stderr


def test_a_server_that_takes_few_logins_at_once_is_asked_again(lab: Lab) -> None:
    host = add(lab, "busy", "MaxStartups 2:100:2")
    with (lab.master.etc / "hosts").open("a") as file:
        file.writelines(f"{host.address} busy{number}\n" for number in range(1, 5))
    done = ask(lab, "generate_hostfile.py", "busy[1-4]", *CPU)
    assert done.stdout.count(" slots=1 type=CPU") == 4, done.stderr


def test_a_home_that_cannot_be_written_is_told(lab: Lab) -> None:
    host = add(lab, "frozen")
    mounted = subprocess.run(host.words("sh", "-c", f"mount --bind {host.home} {host.home} && "
                                        f"mount -o remount,ro,bind {host.home}"), capture_output=True)
    assert mounted.returncode == 0, mounted.stderr
    new = make_key(lab.folder / "new_key")
    done = ask(lab, "setup_keys.py", "frozen", "--ssh-key", str(new), "--no-config")
    assert done.returncode == 1 and "or the home read-only?" in done.stdout, done.stdout + done.stderr


def test_five_dead_of_sixty_four_cost_one_timeout(lab: Lab) -> None:
    """One machine with 59 addresses stands for as many: two cores can't start 64."""
    host = add(lab, "many", "MaxStartups 200")
    for number in range(100, 159):
        host.network(f"ip address add {NETWORK}.{number}/24 dev eth0")
    with (lab.master.etc / "hosts").open("a") as file:
        file.writelines(f"{NETWORK}.{number} n{number}\n" for number in range(100, 164))
    started = time.monotonic()
    alive = ask(lab, "generate_hostfile.py", "n[100-158]", *CPU)
    assert alive.returncode == 0 and alive.stdout.count(" slots=1") == 59, alive.stderr
    usual = time.monotonic() - started
    started = time.monotonic()
    done = ask(lab, "generate_hostfile.py", "n[100-163]", *CPU, "--output", "other.txt", "--connect-timeout", "15")
    taken = time.monotonic() - started
    assert done.returncode == 1 and done.stdout.count(" slots=1") == 59, done.stderr
    assert done.stderr.count("  failed  ") == 5 and "64 hosts" in done.stderr
    assert taken < usual + 50  # one after the other they would cost 75 s
