"""Which hosts `invoke up` offers: what ssh's files, the kernel, avahi and Tailscale know; nobody else is asked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ssh_server import SshClient, SshServer

from master.readiness import candidates
from master.readiness.candidates import config_hosts, find_candidates, is_near, known_names, named
from master.ssh.route import SshOptions

NEIGHBOURS = [{"dst": "10.0.0.9", "dev": "eth0", "lladdr": "52:54:00:12:34:56", "state": ["REACHABLE"]},
              {"dst": "10.0.0.77", "dev": "eth0", "state": ["FAILED"]},
              {"dst": "10.0.0.10", "dev": "eth0", "lladdr": "52:54:00:12:34:57", "state": ["STALE"]}]
AVAHI = ("+;eth0;IPv4;nas;_ssh._tcp;local\n+;eth0;IPv4;nas;_ssh._tcp;local\n"
         "=;eth0;IPv4;nas;_ssh._tcp;local;nas.local;10.0.0.4;22;\n+;eth0;IPv4;bad\\032name;_ssh._tcp;local\n")
TAILNET = {"Peer": {"a": {"HostName": "box", "Online": True, "OS": "linux"},
                    "b": {"HostName": "phone", "Online": True, "OS": "iOS"},
                    "c": {"HostName": "off", "Online": False, "OS": "linux"}}}
Fake = Callable[[str, str], None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a program in front of this machine's, that prints a text; those that are asked print nothing until then."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(name: str, text: str) -> None:
        (folder / f"{name}.txt").write_text(text)
        (folder / name).write_text(f"#!/bin/sh\ncat {folder}/{name}.txt\n")
        (folder / name).chmod(0o755)

    for name in ("ip", "avahi-browse", "tailscale"):
        put(name, "")
    return put


def test_names_of_an_ssh_configuration_with_what_it_includes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh" / "config.d").mkdir(parents=True)
    (tmp_path / ".ssh" / "config.d" / "lab").write_text('Host gpu1 gpu2\n  User ann\nHost "quoted"\n')
    (tmp_path / ".ssh" / "config").write_text(
        "# Host commented\nInclude config.d/*\nhost=gpu3\n  HostName 10.0.0.3\nHost *.corp !bad web?\nHost *\n")
    assert config_hosts(tmp_path / ".ssh" / "config") == ["gpu1", "gpu2", "quoted", "gpu3"]
    (tmp_path / ".ssh" / "config.d" / "lab").write_text("Include config\nHost a\n")  # a circle ends
    assert set(config_hosts(tmp_path / ".ssh" / "config")) == {"a", "gpu3"}
    assert config_hosts(tmp_path / "none") == []


def test_names_of_known_hosts(tmp_path: Path) -> None:
    (tmp_path / "known_hosts").write_text(
        "gpu1,10.0.0.1 ssh-ed25519 AAAA\n|1|abc=|def= ssh-ed25519 AAAA\n[gpu2]:2222 ssh-rsa AAAA\n# x\n"
        "@revoked gpu3 ssh-rsa AAAA\n*.corp ssh-rsa AAAA\n[::1]:2200 ssh-rsa AAAA\n\n")
    assert known_names(tmp_path / "known_hosts") == ["gpu1", "10.0.0.1", "gpu2:2222", "[::1]:2200"]


@pytest.mark.parametrize(("source", "address", "near"), [
    ("known_hosts", "192.168.1.5", True), ("known_hosts", "140.82.121.4", False), ("ssh config", "10.0.0.1", True),
    ("known_hosts", "100.101.102.103", True), ("known_hosts", "fe80::1%eth0", True), ("ssh config", "8.8.8.8", False),
    ("ssh config", "", True), ("known_hosts", "", False)])
def test_only_hosts_of_private_networks_are_tried(source: str, address: str, near: bool) -> None:
    (one,) = named(["x"], source)
    assert is_near(candidates.Candidate(one.node, source, address)) is near


def test_neighbours_are_listed_and_not_tried(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             server: SshServer, client: SshClient) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fake("ip", json.dumps(NEIGHBOURS))
    fake("avahi-browse", AVAHI)
    fake("tailscale", json.dumps(TAILNET))
    client.trust(server)
    text = client.config.read_text()
    client.config.write_text(f"Host gone\n  HostName 127.0.0.1\n  Port 9\n{text}")
    found = {str(each.node): each for each in find_candidates(SshOptions(ssh_config=client.config))}
    assert [(name, each.source) for name, each in found.items()] == [
        ("gone", "ssh config"), ("gpu1", "ssh config"), ("10.0.0.9", "neighbour"), ("10.0.0.10", "neighbour"),
        ("nas.local", "mDNS"), ("box", "Tailscale")]
    assert found["gone"].state.startswith("no answer") and found["10.0.0.9"].state == "not tried"
    assert found["nas.local"].state == found["box"].state == "not tried"


def test_what_trying_a_host_says(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: SshServer,
                                 client: SshClient) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    def state() -> str:
        (one,) = find_candidates(SshOptions(ssh_config=client.config))
        return one.state

    assert state() == "host key not known yet"
    client.trust(server)
    assert state() == "takes your key"
    server.authorized_keys.write_text("")
    assert state() == "asks for a password"


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"Peer": 3}', '[{"state": 5}]', "[" * 100_000])
def test_programs_may_say_anything(text: str, fake: Fake) -> None:
    for name in ("ip", "avahi-browse", "tailscale"):
        fake(name, text)
    assert candidates.neighbours() == candidates.mdns_names() == candidates.tailscale_names() == []
