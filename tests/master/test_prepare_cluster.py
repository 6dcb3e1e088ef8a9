"""`prepare_cluster.py`: what it finds missing, what it would do, and what it says where it can't go on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ssh_server import SshClient, SshServer

from master.inventory.cluster_file import empty_cluster
from master.readiness.state import files_of, lacks_alias, measured_on, missing_parts, other_errors
from master.ssh.node_names import parse_node, read_nodes
from master.ssh.route import SshOptions

TOOL = ROOT / "master" / "prepare_cluster.py"


def up(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, TOOL, *words], cwd=cwd, capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL, env={**os.environ, "HOME": str(cwd), **variables})
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(("text", "nodes", "expected"), [
    (None, "a b", ((), False, False)), ("a slots=1\nb slots=1\n", "a b", ((), True, False)),
    ("a slots=1\n", "a b", ((), False, False)), ("a slots=1\nc slots=1\n", "a b", (("c",), False, False))])
def test_a_hostfile_is_compared_with_the_hosts_that_are_meant(text: str | None, nodes: str, expected: tuple[Any, ...],
                                                              tmp_path: Path) -> None:
    if text:
        (tmp_path / "hostfile.txt").write_text(text)
    found = files_of(tmp_path / "hostfile.txt", read_nodes([nodes]))
    assert (found.others, found.is_theirs, found.are_known) == expected


def test_what_a_sync_brings_is_told_from_what_it_does_not() -> None:
    def finding(level: str, what: str, fix: str) -> dict[str, Any]:
        return {"level": level, "hosts": ["a"], "what": what, "effect": "it fails", "fix": fix}

    report = {"hosts": {"a": {"code": "old"}, "b": {"code": "new"}}, "findings": [
        finding("error", "no torch", "invoke sync"),
        finding("warning", "notes is not there", "invoke sync -- --with x"),
        finding("error", "0.1 GB are free", "free disk space there"), finding("info", "another time zone", "")]}
    assert missing_parts(report, "new") == {"no torch": ["a"], "notes is not there": ["a"],
                                            "another version of lanspeed than here": ["a"]}
    assert other_errors(report) == ["a: 0.1 GB are free: it fails. free disk space there"]


def test_a_network_is_measured_when_every_pair_is() -> None:
    pairs = [{"from": one, "to": other, "bandwidth_bytes_per_s": 1e8, "latency_s": 1e-4, "read_at": 1.7e9 + number}
             for number, (one, other) in enumerate([("a", "b"), ("b", "a")])]
    assert measured_on(["a", "b"], {**empty_cluster(), "pairs": pairs}) == "2023-11-14"
    assert measured_on(["a", "b", "c"], {**empty_cluster(), "pairs": pairs}) is None
    pairs[0]["bandwidth_bytes_per_s"] = None
    assert measured_on(["a", "b"], {**empty_cluster(), "pairs": pairs}) is None


def test_a_user_or_port_needs_a_host_block(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host gpu1\n  HostName 127.0.0.1\n  User ann\n  Port 2222\n")
    ssh = SshOptions(ssh_config=config)
    assert not lacks_alias(parse_node("gpu1"), "gpu1", ssh)
    assert not lacks_alias(parse_node("ann@gpu1"), "gpu1", ssh)
    assert lacks_alias(parse_node("bob@gpu1"), "gpu1", ssh) and lacks_alias(parse_node("ann@gpu1:22"), "gpu1", ssh)


def test_it_says_what_it_would_do_and_changes_nothing(tmp_path: Path, server: SshServer, client: SshClient) -> None:
    words = ("gpu1", "--dry-run", "--ssh-config", str(client.config))
    unknown = up(*words, cwd=tmp_path)
    assert unknown.returncode == 0 and "1/6 keys       gpu1: no key of yours" in unknown.stderr
    client.trust(server)
    before = sorted(tmp_path.rglob("*"))
    done = up(*words, cwd=tmp_path)
    assert done.returncode == 0 and "1/6 keys       done: gpu1 takes your key" in done.stderr
    assert "would run: python master/generate_hostfile.py --nodes gpu1 --output hostfile.txt" in done.stderr
    assert "then: sync, check --network and plan" in done.stderr and not done.stdout
    assert [path for path in sorted(tmp_path.rglob("*")) if "server" not in path.parts] == [
        path for path in before if "server" not in path.parts]


def test_a_host_that_is_off_is_named_with_the_command_for_the_others(tmp_path: Path, server: SshServer,
                                                                     client: SshClient) -> None:
    client.trust(server)
    client.config.write_text(f"Host off\n  HostName 127.0.0.1\n  Port 9\n{client.config.read_text()}")
    done = up("gpu1", "off", "--ssh-config", str(client.config), cwd=tmp_path)
    assert done.returncode == 1 and "off: TCP: " in done.stderr
    assert "error: off can't be reached by key. " in done.stderr
    assert "or leave them out: invoke up --nodes gpu1\n" in done.stderr
    assert not (tmp_path / "hostfile.txt").exists()


@pytest.mark.parametrize(("words", "code", "message"), [
    ((), 2, "which hosts? none is known here yet: invoke up --nodes gpu1,gpu2"),
    (("--nodes", "a", "--cpu-slots", "0"), 2, "--cpu-slots: 1 to 1024"),
    (("--nodes", "a a"), 2, "named twice"), (("--nodez", "a"), 2, "no flag --nodez: did you mean --nodes?"),
    (("--hostfile", "lost/hostfile.txt"), 2, "which hosts?")])
def test_wrong_usage_is_one_line(words: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    for name in ("ip", "avahi-browse", "tailscale"):  # which know nobody here
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    done = up(*words, cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == code and message in done.stderr, done.stderr


def test_without_nodes_the_known_ones_are_listed(tmp_path: Path, server: SshServer, client: SshClient) -> None:
    client.trust(server)
    done = up("--ssh-config", str(client.config), cwd=tmp_path)
    assert done.returncode == 2 and "error: which of these? invoke up --nodes NAME,NAME" in done.stderr
    assert re.search(r"^  1  gpu1 +127\.0\.0\.1 +ssh config +takes your key$", done.stderr, re.M), done.stderr


def test_this_machine_alone_goes_all_the_way(tmp_path: Path) -> None:
    done = up("--nodes", "localhost", "--cpu-slots", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "invoke train --model tiny --hostfile hostfile.txt"
    assert "3/6 copies     done" in done.stderr and "5/6 network    done: one host needs none" in done.stderr
    again = up(cwd=tmp_path)
    assert again.returncode == 0 and again.stderr.count(" done: ") == 5, again.stderr
    changed = up("--nodes", "127.0.0.1", cwd=tmp_path)
    assert changed.returncode == 1
