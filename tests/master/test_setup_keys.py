"""`invoke setup-keys` on real servers: installed once, proved, repeatable, undone without a trace; faults are named."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from lab.hosts import over_etc, write_accounts
from programs import let_others_in, program
from ssh_server import SshClient, SshServer, free_port, make_key
from terminal import type_into

from master.keys.host_blocks import alias_of, block_of, plan
from master.ssh.node_names import Node

pytestmark = pytest.mark.needs("sshd", "ssh", "ssh-keygen")
TOOL = ROOT / "master" / "setup_keys.py"
MINE = "# mine\nssh-rsa AAAAoldkey me@laptop"  # without a newline at its end


class Lab:
    """Two nodes that the client's own key opens, one that doesn't answer."""

    def __init__(self, folder: Path, one: SshServer, two: SshServer) -> None:
        self.one, self.two, self.folder = one, two, folder
        self.client = SshClient(folder / "client", gpu1=one, gpu2=two)
        self.client.config.write_text(f"Host gpu3\n  HostName 127.0.0.1\n  Port {free_port()}\n"
                                      + self.client.config.read_text())
        self.key = folder / "client" / "id_new"

    def run(self, *words: str, nodes: str = "gpu1,gpu2") -> subprocess.CompletedProcess[str]:
        """Run the tool with the client's files."""
        done = subprocess.run(
            [sys.executable, str(TOOL), "--nodes", nodes, "--ssh-config", str(self.client.config), "--ssh-key",
             str(self.key), "--host-keys", "accept-new", "--connect-timeout", "3", "--yes", *words],
            capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert "Traceback" not in done.stderr, done.stderr
        return done


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with SshServer(tmp_path / "1") as one, SshServer(tmp_path / "2", address="127.0.0.2") as two:
        (two.home / ".ssh").mkdir(mode=0o755)
        (two.home / ".ssh" / "authorized_keys").write_text(MINE)
        yield Lab(tmp_path, one, two)


def installed(server: SshServer) -> str:
    return (server.home / ".ssh" / "authorized_keys").read_text()


def test_a_key_is_made_installed_and_proved(lab: Lab) -> None:
    done = lab.run()
    assert done.returncode == 0, done.stderr
    public = lab.key.with_suffix(".pub").read_text()
    assert public.startswith("ssh-ed25519 ") and (lab.key.stat().st_mode & 0o777) == 0o600
    assert installed(lab.one) == public and installed(lab.two) == f"{MINE}\n{public}"
    for server in (lab.one, lab.two):
        folder = server.home / ".ssh"
        assert (folder.stat().st_mode & 0o777, (folder / "authorized_keys").stat().st_mode & 0o777) == (0o700, 0o600)
    assert done.stdout.count("SHA256:") == 2 and done.stdout.count("  installed\n") == 2


def test_a_second_run_changes_nothing_and_remove_leaves_no_trace(lab: Lab) -> None:
    before = lab.client.config.read_text()
    lab.run()
    state = installed(lab.one), installed(lab.two), lab.client.config.read_text()
    again = lab.run()
    assert again.returncode == 0 and again.stdout.count("  was there\n") == 2 and "write" not in again.stderr
    assert (installed(lab.one), installed(lab.two), lab.client.config.read_text()) == state
    gone = lab.run("--remove")
    assert gone.returncode == 0 and gone.stdout.count("  removed\n") == 2
    assert not (lab.one.home / ".ssh").exists()
    assert installed(lab.two) == MINE + "\n"
    assert lab.client.config.read_text() == before
    assert not (lab.client.config.parent / "config.d" / "lanspeed").exists()
    assert lab.run("--remove").stdout.count("  was not there\n") == 2


def test_plain_ssh_reaches_the_nodes_afterwards(lab: Lab) -> None:
    lab.run()
    for server in (lab.one, lab.two):
        server.authorized_keys.write_text("")  # the client's own key does no more
    done = lab.client.run("gpu1", "echo hello")
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    block = (lab.client.config.parent / "config.d" / "lanspeed").read_text()
    assert f"Host gpu1\n  IdentityFile {lab.key}\n" in block


def test_a_dry_run_does_nothing(lab: Lab) -> None:
    done = lab.run("--dry-run")
    assert done.returncode == 0 and done.stdout.count("would install") == 2
    assert not lab.key.exists() and not (lab.one.home / ".ssh").exists()
    assert "config.d" not in lab.client.config.read_text()


def test_a_dead_host_costs_the_others_nothing(lab: Lab) -> None:
    done = lab.run(nodes="gpu1,gpu3,gpu2")
    assert done.returncode == 1
    assert "FAILED: TCP: 127.0.0.1 port" in done.stdout and done.stdout.count("  installed\n") == 2


def test_rsa_has_4096_bits(lab: Lab) -> None:
    assert lab.run("--key-type", "rsa", nodes="gpu1").returncode == 0
    shown = subprocess.run(["ssh-keygen", "-lf", str(lab.key)], capture_output=True, text=True).stdout
    assert shown.startswith("4096 ") and "(RSA)" in shown


def test_a_key_that_is_there_in_another_shape_is_left_alone(lab: Lab) -> None:
    make_key(lab.key)
    blob = lab.key.with_suffix(".pub").read_text().split()[1]
    line = f'from="127.0.0.0/8",no-pty ssh-ed25519 {blob} somebody else wrote this'
    (lab.two.home / ".ssh" / "authorized_keys").write_text(f"# ssh-ed25519 {blob}\n{line}\n")
    assert "  was there\n" in lab.run(nodes="gpu2").stdout
    lab.run("--remove", nodes="gpu2")
    assert installed(lab.two) == f"# ssh-ed25519 {blob}\n"


def test_a_home_that_others_may_write_is_told(lab: Lab) -> None:
    lab.one.home.chmod(0o777)
    assert f"sshd refuses its keys: chmod go-w {lab.one.home}" in lab.run(nodes="gpu1").stdout


def test_a_link_stays_a_link(lab: Lab) -> None:
    real = lab.two.home / "keys"
    real.write_text("")
    file = lab.two.home / ".ssh" / "authorized_keys"
    file.unlink()
    file.symlink_to(real)
    assert lab.run(nodes="gpu2").returncode == 0
    assert file.is_symlink() and "ssh-ed25519" in real.read_text()


def test_without_a_terminal_the_configuration_is_left_alone(lab: Lab) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--nodes", "gpu1", "--ssh-config", str(lab.client.config), "--ssh-key",
         str(lab.key), "--host-keys", "accept-new"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and "--yes writes it" in done.stderr
    assert "config.d" not in lab.client.config.read_text()
    assert "config.d" not in lab.run("--no-config", nodes="gpu1").stderr


@pytest.mark.root
def test_a_full_disk_is_told_and_nothing_is_lost(lab: Lab) -> None:
    small = lab.two.home / ".ssh"
    shutil.rmtree(small)
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)], check=True)
    try:
        keys = small / "authorized_keys"
        keys.write_text("ssh-rsa AAAAmine me\n")
        with contextlib.suppress(OSError):
            (small / "filler").write_bytes(b"x" * 8192)
        done = lab.run(nodes="gpu1,gpu2")
        assert done.returncode == 1 and "cannot be written: is the disk full" in done.stdout
        assert keys.read_text() == "ssh-rsa AAAAmine me\n" and "  installed\n" in done.stdout
        assert sorted(path.name for path in small.iterdir()) == ["authorized_keys", "filler"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


# -- passwords: need an account of their own ---------------------------------------------------------------------------

PASSWORD = "correct horse battery"


ACCOUNT = "somebody"


@contextlib.contextmanager
def password_server(folder: Path) -> Iterator[SshServer]:
    """An sshd for which there is an ACCOUNT with PASSWORD; its home is `folder`/account."""
    let_others_in(folder)
    home, etc = folder / "account", folder / "etc"
    write_accounts(etc, {ACCOUNT: (3001, home)}, PASSWORD)
    server = SshServer(folder / "server", address="127.0.0.4", command='exec bash -c "$SSH_ORIGINAL_COMMAND"')
    config = server.folder / "sshd_config"
    text = config.read_text().replace("PasswordAuthentication no", "PasswordAuthentication yes")
    config.write_text(text.replace(f"{server.home}/.ssh", f"{home}/.ssh"))
    server.prefix = ["unshare", "-m", "sh", "-c", f'{over_etc(etc)} && exec "$@"', "sh"]
    with server:
        yield server


@pytest.mark.root
@pytest.mark.needs("unshare", "openssl")
def test_one_password_on_the_terminal_does_for_all_hosts(tmp_path: Path) -> None:
    home = tmp_path / "account"
    with password_server(tmp_path) as server:
        client = SshClient(tmp_path / "client", gpu1=server, gpu2=server)
        server.authorized_keys.write_text("")
        key = tmp_path / "client" / "id_new"
        command = [sys.executable, str(TOOL), "--nodes", "gpu1,gpu2", "--ssh-user", ACCOUNT, "--ssh-config",
                   str(client.config), "--ssh-key", str(key)]
        code, screen = type_into(command, {"Trust them from now on?": "yes", "their password": PASSWORD,
                                           "reach the hosts too?": "yes"})
        assert code == 0, screen
        assert screen.count("their password") == 1 and PASSWORD not in screen
        assert "no key was accepted by gpu1, gpu2" in screen
        assert (home / ".ssh" / "authorized_keys").read_text() == key.with_suffix(".pub").read_text()
        assert client.run("gpu1", "id -un").stdout.strip() == ACCOUNT


@pytest.mark.root
@pytest.mark.needs("unshare", "openssl")
def test_each_host_may_have_a_password_of_its_own(tmp_path: Path) -> None:
    with password_server(tmp_path) as server:
        client = SshClient(tmp_path / "client", gpu1=server, gpu2=server)
        server.authorized_keys.write_text("")
        command = [sys.executable, str(TOOL), "--nodes", "gpu1,gpu2", "--ssh-user", ACCOUNT, "--ssh-config",
                   str(client.config), "--ssh-key", str(tmp_path / "client" / "id_new"), "--password-per-host"]
        code, screen = type_into(command, {"Trust them from now on?": "yes", "password of gpu1": PASSWORD,
                                           "password of gpu2": "", "reach the hosts too?": "yes"})
        assert code == 1 and PASSWORD not in screen and "their password" not in screen, screen
        rows = [line.split() for line in screen.splitlines() if "SHA256:" in line or "FAILED" in line]
        assert [(row[0], "FAILED:" in row) for row in rows[-2:]] == [("gpu1", False), ("gpu2", True)], screen


@pytest.mark.root
@pytest.mark.needs("unshare", "openssl")
def test_a_wrong_password_is_tried_once_and_told(tmp_path: Path) -> None:
    with password_server(tmp_path) as server:
        client = SshClient(tmp_path / "client", gpu1=server)
        server.authorized_keys.write_text("")
        secret = tmp_path / "secret"
        secret.write_text("wrong secret\n")
        secret.chmod(0o600)
        done = subprocess.run(
            [sys.executable, str(TOOL), "--nodes", "gpu1", "--ssh-user", ACCOUNT, "--ssh-config", str(client.config),
             "--ssh-key", str(tmp_path / "id_new"), "--host-keys", "accept-new", "--ssh-password-file", str(secret)],
            capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 1
        assert "password: run this on a terminal" in done.stdout and "--ssh-password-file F" in done.stdout
        assert "wrong secret" not in done.stdout
        assert (server.folder / "sshd.log").read_text().count("Failed password") <= 1


# -- the Host blocks --------------------------------------------------------------------------------------------------


def test_blocks_say_only_what_names_and_flags_said(tmp_path: Path) -> None:
    key = tmp_path / "my key"
    assert block_of(Node("gpu1"), None, None, key) == f'Host gpu1\n  IdentityFile "{key}"\n'
    assert block_of(Node("10.0.0.2", "admin", 2222), "bob", None, key) == (
        f'Host 10.0.0.2\n  User admin\n  Port 2222\n  IdentityFile "{key}"\n')
    assert alias_of(Node("fe80::2%eth0", None, 22)) == "fe80-2-eth0"
    assert "Host fe80-2\n  HostName fe80::2\n" in block_of(Node("fe80::2"), None, None, key)


def test_what_the_user_wrote_stays(tmp_path: Path) -> None:
    from master.keys.host_blocks import apply

    config = tmp_path / "config"
    text = "# my hosts\nHost *\n  ForwardAgent no"
    config.write_text(text)
    apply(plan(config, ["Host b\n  IdentityFile k\n", "Host a\n  IdentityFile k\n"]))
    assert config.read_text() == f"Include {tmp_path}/config.d/lanspeed\n\n{text}"
    assert plan(config, ["Host a\n  IdentityFile k\n"]) == {}
    shown = subprocess.run([program("ssh"), "-F", str(config), "-G", "a"], capture_output=True, text=True).stdout
    assert "identityfile k\n" in shown and "forwardagent no" in shown
    apply(plan(config, [], ["a"]))
    assert "Host b" in (tmp_path / "config.d" / "lanspeed").read_text()
    apply(plan(config, [], ["b"]))
    assert config.read_text() == text
