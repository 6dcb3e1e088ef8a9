"""Settings of ssh that protect, followed as OpenSSH follows them; secrets that stay where they belong."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ssh_server import SshClient, SshServer, make_key

from master.keys.authorized_keys import SCRIPT
from master.ssh.node_names import read_nodes
from master.ssh.options import PASSWORD_VARIABLE
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import run_on_all

pytestmark = pytest.mark.needs("sshd", "ssh", "ssh-keygen")


def reach(client: SshClient, setting: str = "", **ssh: Any) -> Any:
    """Reach gpu1 with one more line in the configuration; return the way, or the error."""
    client.config.write_text(f"{setting}\n{client.config.read_text()}" if setting else client.config.read_text())
    options = SshOptions(ssh_config=client.config, connect_timeout=5, **ssh)
    node = read_nodes(["gpu1"])[0]
    return run_on_all([node], options, lambda session: session.way)[node]


def test_a_revoked_host_key_is_refused(client: SshClient, server: SshServer, tmp_path: Path) -> None:
    client.trust(server)
    assert reach(client) == "paramiko"
    revoked = tmp_path / "revoked"
    revoked.write_text(server.host_key.with_suffix(".pub").read_text())
    assert isinstance(reach(client, f"RevokedHostKeys {revoked}"), SshError)


@pytest.mark.parametrize(("kinds", "reached"), [("ssh-ed25519", True), ("rsa-sha2-512", False)])
def test_only_the_allowed_kinds_of_host_key_are_asked_for(kinds: str, reached: bool, client: SshClient,
                                                          server: SshServer) -> None:
    client.trust(server)
    found = reach(client, f"HostKeyAlgorithms {kinds}")
    assert (found == "paramiko") is reached and (reached or isinstance(found, SshError))


def test_names_are_hashed_where_that_is_asked_for(client: SshClient, server: SshServer) -> None:
    assert reach(client, "HashKnownHosts yes", host_keys="accept-new") == "paramiko"
    text = client.known_hosts.read_text()
    assert text.startswith("|1|") and "127.0.0.1" not in text
    assert reach(client, host_keys="yes") == "paramiko"  # and found again
    assert client.known_hosts.read_text() == text
    assert subprocess.run(["ssh", "-F", str(client.config), "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes",
                           "gpu1", "exit 0"]).returncode == 0


def test_a_password_is_no_heirloom(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from master.ssh.options import add_ssh_flags, ssh_options

    parser = argparse.ArgumentParser()
    add_ssh_flags(parser)
    monkeypatch.setenv(PASSWORD_VARIABLE, "hunter2")
    assert ssh_options(parser.parse_args([])).password == "hunter2"
    assert PASSWORD_VARIABLE not in os.environ


def run_keys(home: Path, deed: str, key: Path) -> str:
    """Do what setup-keys does on a host, with a home of its own."""
    public = key.with_suffix(".pub").read_text().strip()
    done = subprocess.run(["sh", "-s", "--", deed, public.split()[1], public], input=SCRIPT, text=True,
                          env={**os.environ, "HOME": str(home)}, capture_output=True)
    return done.stdout.strip().splitlines()[-1]


def test_a_key_in_a_comment_or_an_option_is_no_key(tmp_path: Path) -> None:
    key, other = make_key(tmp_path / "key"), make_key(tmp_path / "other")
    blob = key.with_suffix(".pub").read_text().split()[1]
    theirs = other.with_suffix(".pub").read_text().split()[:2]
    file = tmp_path / ".ssh" / "authorized_keys"
    file.parent.mkdir()
    kept = (f"{' '.join(theirs)} replaces {blob}\n"
            f'command="echo \\"ssh-ed25519 {blob}\\"" {" ".join(theirs)} me\n# ssh-ed25519 {blob}\n')
    file.write_text(kept)
    assert run_keys(tmp_path, "check", key) == "@@KEYS was not there"
    assert run_keys(tmp_path, "remove", key) == "@@KEYS was not there"
    assert run_keys(tmp_path, "install", key) == "@@KEYS installed"
    file.write_text(file.read_text() + f'from="10.0.0.*",no-pty ssh-ed25519 {blob} again\n')
    assert run_keys(tmp_path, "remove", key) == "@@KEYS removed"
    assert file.read_text() == kept
    assert run_keys(tmp_path, "check", other) == "@@KEYS was there"


def test_a_folder_in_place_of_the_file_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / ".ssh" / "authorized_keys").mkdir(parents=True)
    assert "is a folder: move it away" in run_keys(tmp_path, "install", make_key(tmp_path / "key"))
    assert list((tmp_path / ".ssh" / "authorized_keys").iterdir()) == []
