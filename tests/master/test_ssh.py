"""Reaching hosts: real servers, healthy and not; every host's failure is its own, named by stage."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import program
from ssh_server import (
    RELAY,
    SshClient,
    SshServer,
    chatty,
    free_port,
    half_a_banner,
    listener,
    make_key,
    silent,
)

from master.ssh.node_names import Node, read_nodes
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import UnknownHost, run_on_all
from master.ssh.session import CommandResult, Session

pytestmark = pytest.mark.needs("sshd", "ssh", "ssh-keygen", "ps")


def hello(session: Session) -> tuple[str, CommandResult]:
    return session.way, session.run("cat; echo $0 >&2; exit 3", b"x" * 300_000)


def reach(client: SshClient, *names: str, ask: Callable[..., bool] | None = None, **ssh: Any) -> dict[str, Any]:
    nodes = read_nodes(names)
    settings: dict[str, Any] = {"ssh_config": client.config, "connect_timeout": 2, "timeout": 10, **ssh}
    found = run_on_all(nodes, SshOptions(**settings), hello, ask)
    assert list(found) == nodes
    return {str(node): result for node, result in found.items()}


def refusal(result: object, stage: str, *words: str) -> None:
    assert isinstance(result, SshError), result
    assert result.stage == stage, result
    assert all(word in str(result) for word in words), result
    assert str(result).startswith("gpu1: ") and str(result).isprintable()


# -- the good ways ----------------------------------------------------------------------------------------------------


def test_a_known_host_is_reached_once_and_runs_commands(client: SshClient, server: SshServer) -> None:
    client.trust(server)
    way, result = reach(client, "gpu1")["gpu1"]
    assert (way, result.code, len(result.out)) == ("paramiko", 3, 300_000)
    assert result.err.strip().endswith("bash")


def test_this_machine_needs_no_ssh(client: SshClient) -> None:
    way, result = reach(client, "localhost")["localhost"]
    assert (way, result.code, len(result.out)) == ("local", 3, 300_000)


def test_an_ipv6_address_and_a_port_are_taken(tmp_path: Path) -> None:
    with SshServer(tmp_path / "server", address="::1") as server:
        client = SshClient(tmp_path / "client", gpu1=server)
        name = f"[::1]:{server.port}"
        assert reach(client, name, host_keys="accept-new")[name][0] == "paramiko"
        assert f"[::1]:{server.port} ssh-ed25519" in client.known_hosts.read_text()


def test_a_jump_host_is_gone_through(client: SshClient, server: SshServer, tmp_path: Path) -> None:
    with SshServer(tmp_path / "inner", address="127.0.0.2") as inner:
        inner.authorized_keys.write_text(server.authorized_keys.read_text())
        client.config.write_text(f"Host inner\n  HostName 127.0.0.2\n  Port {inner.port}\n  ProxyJump gpu1\n"
                                 + client.config.read_text())
        for one in (server, inner):
            client.trust(one)
        assert reach(client, "inner")["inner"][0] == "paramiko"


def test_the_agents_key_is_offered(client: SshClient, server: SshServer, tmp_path: Path) -> None:
    client.trust(server)
    socket_path = tmp_path / "agent"
    with subprocess.Popen([program("ssh-agent"), "-D", "-a", str(socket_path)], stdout=subprocess.DEVNULL) as agent:
        try:
            while not socket_path.exists():
                time.sleep(0.02)
            subprocess.run(["ssh-add", "-q", str(client.key)], env={**os.environ, "SSH_AUTH_SOCK": str(socket_path)},
                           check=True)
            client.key.unlink()
            text = client.config.read_text().replace("IdentityAgent none", f"IdentityAgent {socket_path}")
            client.config.write_text(text)
            assert reach(client, "gpu1")["gpu1"][0] == "paramiko"
        finally:
            agent.terminate()


def test_a_proxy_command_is_read_by_a_shell(client: SshClient, server: SshServer, tmp_path: Path) -> None:
    client.trust(server)
    relay = tmp_path / "relay.py"
    relay.write_text(RELAY)
    client.config.write_text(f"ProxyCommand {sys.executable} {relay} %h %p 2>/dev/null\n" + client.config.read_text())
    assert reach(client, "gpu1", connect_timeout=20)["gpu1"][0] == "paramiko"


def test_a_server_without_a_common_cipher_is_reached_by_openssh(tmp_path: Path) -> None:
    with SshServer(tmp_path / "server", options="Ciphers chacha20-poly1305@openssh.com") as server:
        client = SshClient(tmp_path / "client", gpu1=server)
        refusal(reach(client, "gpu1")["gpu1"], "host key", "ssh gpu1 asks about it")
        assert reach(client, "gpu1", host_keys="accept-new")["gpu1"][0] == "openssh"
        client.known_hosts.write_text("")
        client.trust(server, make_key(tmp_path / "other"))
        refusal(reach(client, "gpu1")["gpu1"], "host key", "not the one that is known", f"{client.known_hosts}:1")


def test_a_proxy_command_that_fails_is_told_in_its_own_words(client: SshClient) -> None:
    text = client.config.read_text()
    client.config.write_text("ProxyCommand echo no way to %h >&2; exit 1\n" + text)
    refusal(reach(client, "gpu1")["gpu1"], "jump host", "no way to 127.0.0.1", "ssh gpu1")
    client.config.write_text("ProxyCommand sleep 61\n" + text)
    refusal(reach(client, "gpu1")["gpu1"], "handshake", "no answer")
    assert "sleep 61" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines()


def test_what_paramiko_cannot_do_openssh_does(client: SshClient, server: SshServer) -> None:
    kind, blob = server.host_key.with_suffix(".pub").read_text().split()[:2]
    client.config.write_text(f"KnownHostsCommand /bin/echo [127.0.0.1]:{server.port} {kind} {blob}\n"
                             + client.config.read_text())
    way, result = reach(client, "gpu1")["gpu1"]
    assert (way, result.code, len(result.out)) == ("openssh", 3, 300_000)


# -- host keys --------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_without_somebody_to_ask(client: SshClient) -> None:
    refusal(reach(client, "gpu1")["gpu1"], "host key", "unknown: ssh-ed25519 SHA256:", "--host-keys accept-new")
    refusal(reach(client, "gpu1", host_keys="yes")["gpu1"], "host key", "unknown")
    assert not client.known_hosts.exists()


def test_accept_new_notes_the_key_and_nothing_else(client: SshClient, server: SshServer) -> None:
    client.known_hosts.write_text("# mine\n@revoked old ssh-ed25519 AAAA\nno newline at the end")
    before = client.known_hosts.read_text()
    for _ in range(2):
        assert reach(client, "gpu1", host_keys="accept-new")["gpu1"][0] == "paramiko"
    after = client.known_hosts.read_text()
    assert after.startswith(before + "\n[127.0.0.1]:") and after.count("\n") == 4


def test_several_unknown_hosts_are_one_question(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def ask(unknown_hosts: list[UnknownHost]) -> bool:
        asked.append([unknown.key.fingerprint for unknown in unknown_hosts])
        return len(asked) > 1

    with SshServer(tmp_path / "1") as one, SshServer(tmp_path / "2", address="127.0.0.2") as two:
        client = SshClient(tmp_path / "client", gpu1=one, gpu2=two)
        assert all(isinstance(result, SshError) for result in reach(client, "gpu[1-2]", ask=ask).values())
        assert all(result[0] == "paramiko" for result in reach(client, "gpu[1-2]", ask=ask).values())
        assert all(result[0] == "paramiko" for result in reach(client, "gpu[1-2]", ask=ask).values())
    assert len(asked) == 2 and asked[0] == asked[1] and len(set(asked[0])) == 2


def test_the_question_does_not_wait_for_work_that_waits_for_its_answer(tmp_path: Path) -> None:
    meeting = threading.Barrier(2)
    with SshServer(tmp_path / "1") as one, SshServer(tmp_path / "2", address="127.0.0.2") as two:
        client = SshClient(tmp_path / "client", gpu1=one, gpu2=two)
        client.trust(one)
        found = run_on_all(read_nodes(["gpu[1-2]"]), SshOptions(ssh_config=client.config, host_keys="ask"),
                           lambda session: meeting.wait(20) >= 0, lambda unknown_hosts: True)
    assert list(found.values()) == [True, True]


@pytest.mark.parametrize("host_keys", ["yes", "ask", "accept-new"])
def test_a_changed_key_is_always_refused(client: SshClient, server: SshServer, host_keys: str, tmp_path: Path) -> None:
    client.trust(server, make_key(tmp_path / "other"))
    result = reach(client, "gpu1", host_keys=host_keys, ask=lambda unknown_hosts: True)["gpu1"]
    refusal(result, "host key", "is not the one in", f"{client.known_hosts}:1", "ssh-keygen -R")


def test_a_revoked_key_is_refused(client: SshClient, server: SshServer) -> None:
    client.trust(server)
    client.known_hosts.write_text("@revoked " + client.known_hosts.read_text() + client.known_hosts.read_text())
    refusal(reach(client, "gpu1", host_keys="accept-new")["gpu1"], "host key", "revoked")


def test_hashed_names_are_found(client: SshClient, server: SshServer) -> None:
    client.trust(server)
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(client.known_hosts)], check=True, capture_output=True)
    assert "127.0.0.1" not in client.known_hosts.read_text()
    assert reach(client, "gpu1")["gpu1"][0] == "paramiko"


# -- authentication ---------------------------------------------------------------------------------------------------


def test_a_refused_key_is_named(client: SshClient, server: SshServer, tmp_path: Path) -> None:
    client.trust(server)
    server.authorized_keys.write_text("")
    refusal(reach(client, "gpu1")["gpu1"], "authentication", f"refused {client.key}", "user ")
    missing = tmp_path / "nowhere"
    refusal(reach(client, "gpu1", key=missing)["gpu1"], "authentication", f"{missing}: no such file")


def test_a_passphrase_is_told(client: SshClient, server: SshServer) -> None:
    client.trust(server)
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(client.key)], check=True, capture_output=True)
    refusal(reach(client, "gpu1")["gpu1"], "authentication", f"ssh-add {client.key}")


def test_a_password_is_in_no_word_and_no_error(client: SshClient, server: SshServer) -> None:
    client.trust(server)
    server.authorized_keys.write_text("")
    ssh = SshOptions(password="hunter2 secret")
    assert "hunter2" not in repr(ssh)
    assert "hunter2" not in str(reach(client, "gpu1", password="hunter2 secret")["gpu1"])


def test_a_server_that_closes_after_one_key_is_told(tmp_path: Path) -> None:
    with SshServer(tmp_path / "server", options="MaxAuthTries 1") as server:
        client = SshClient(tmp_path / "client", gpu1=server)
        client.trust(server)
        others = "".join(f"IdentityFile {make_key(tmp_path / str(number))}\n" for number in range(3))
        client.config.write_text(others + client.config.read_text())
        refusal(reach(client, "gpu1")["gpu1"], "authentication", "closed the connection")


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [silent, half_a_banner, chatty, socket.socket.close], ids=lambda act: act.__name__)
def test_a_server_that_is_none_is_told_in_time(client: SshClient, act: Callable[[socket.socket], None]) -> None:
    with listener(act) as port:
        client.config.write_text(f"Host gpu1\n  Port {port}\n" + client.config.read_text())
        started = time.monotonic()
        refusal(reach(client, "gpu1")["gpu1"], "handshake")
        assert time.monotonic() - started < 30  # not the 60 s of the silent one


def test_nobody_there_is_told(client: SshClient) -> None:
    text = client.config.read_text()
    client.config.write_text(f"Host gpu1\n  Port {free_port()}\n" + text)
    refusal(reach(client, "gpu1")["gpu1"], "TCP", "Connection refused")
    client.config.write_text("Host gpu1\n  HostName no-such-host.invalid\n" + text)
    refusal(reach(client, "gpu1")["gpu1"], "name lookup", "no-such-host.invalid")


def test_a_port_that_swallows_everything_costs_its_timeout_once(client: SshClient, server: SshServer) -> None:
    client.trust(server)
    with socket.socket() as full:
        full.bind(("127.0.0.3", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        time.sleep(0.2)
        client.config.write_text(f"Host dead*\n  HostName 127.0.0.3\n  Port {full.getsockname()[1]}\n"
                                 + client.config.read_text())
        started = time.monotonic()
        results = reach(client, "dead[1-5]", "gpu1", connect_timeout=8)
        assert time.monotonic() - started < 30  # one after the other they would take 40
        for filler in fillers:
            filler.close()
    assert results.pop("gpu1")[0] == "paramiko"
    assert all(isinstance(result, SshError) and "no answer within 8 s" in str(result) for result in results.values())


@pytest.mark.parametrize(("command", "words"), [
    ("kill -9 $PPID; sleep 5", "connection"), ("yes flood", "printed more than 8 MiB"),
    ("sleep 60", "no end after 3 s"),
])
def test_a_command_that_goes_wrong_is_told(tmp_path: Path, command: str, words: str) -> None:
    with SshServer(tmp_path / "server", command=command) as server:
        client = SshClient(tmp_path / "client", gpu1=server)
        client.trust(server)
        refusal(reach(client, "gpu1", timeout=3)["gpu1"], "command", words)


def test_a_bad_configuration_is_told(client: SshClient) -> None:
    client.config.write_text("NoSuchOption yes\n")
    refusal(reach(client, "gpu1")["gpu1"], "configuration", "nosuchoption", f"{client.config}")


def test_names_cannot_become_options(client: SshClient, tmp_path: Path) -> None:
    mark = tmp_path / "pwned"
    nodes = [Node(f"-oProxyCommand=touch {mark}")]
    found = run_on_all(nodes, SshOptions(ssh_config=client.config, connect_timeout=2), hello)
    assert isinstance(found[nodes[0]], SshError)
    assert not mark.exists()


def test_a_surprise_on_one_host_costs_the_others_nothing(client: SshClient, server: SshServer) -> None:
    client.trust(server)

    def work(session: Session) -> str:
        if session.way == "local":
            raise ValueError("a surprise\x1b[31m")
        return session.run("echo ok").out.strip()

    nodes = read_nodes(["localhost", "gpu1"])
    found = run_on_all(nodes, SshOptions(ssh_config=client.config, connect_timeout=5), work)
    assert isinstance(found[nodes[0]], SshError) and "ValueError: a surprise" in str(found[nodes[0]])
    assert str(found[nodes[0]]).isprintable() and found[nodes[1]] == "ok"
