"""Logging in as people do: passwords that are asked for as questions, many keys, directory names, odd ssh settings."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import paramiko
import pytest
from conftest import ROOT
from ssh_server import SshClient, SshServer, make_key

from master.core.text_file import read_text
from master.inventory.hostfile import read_hostfile
from master.keys.host_blocks import aliases_of
from master.ssh.authentication import KEYS_BEFORE_PASSWORD, log_in
from master.ssh.known_hosts import HostKey, add_entry, refuse_changed_key
from master.ssh.node_names import NodeError, parse_node, read_nodes
from master.ssh.route import SshError, SshOptions, route_of, settings_of
from master.ssh.session import last_words, sh_command


class Asking(paramiko.ServerInterface):
    """A server with keyboard-interactive only, or with passwords and few tries."""

    def __init__(self, kinds: str) -> None:
        self.kinds, self.tries = kinds, 0

    def get_allowed_auths(self, username: str) -> str:
        return self.kinds

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.tries += 1
        return paramiko.AUTH_FAILED

    def check_auth_password(self, username: str, password: str) -> int:
        right = password == "secret" and self.tries < 6 and "password" in self.kinds
        return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED

    def check_auth_interactive(self, username: str, submethods: str) -> paramiko.InteractiveQuery:
        return paramiko.InteractiveQuery("", "", ("Password: ", False))

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        right = responses == ["secret"]
        return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED


@contextmanager
def connected(kinds: str) -> Iterator[paramiko.Transport]:
    """A client's transport to such a server."""
    ours, theirs = socket.socketpair()
    server, client = paramiko.Transport(theirs), paramiko.Transport(ours)
    server.add_server_key(paramiko.ECDSAKey.generate())
    server.start_server(event=threading.Event(), server=Asking(kinds))
    try:
        client.start_client(timeout=10)
        yield client
    finally:
        client.close()
        server.close()


def attempt(kinds: str, password: str | None, keys: tuple[Path, ...] = ()) -> str:
    ssh = SshOptions(password=password, more_keys=keys)
    route = route_of(parse_node("gpu1"), ssh, settings_of("user me\nport 22\nhostname gpu1\nidentityagent none"))
    with connected(kinds) as transport:
        return log_in(transport, route, ssh)


def test_a_password_that_is_asked_for_as_a_question_is_right_or_refused() -> None:
    assert attempt("keyboard-interactive", "secret") == "password"
    with pytest.raises(SshError, match="user me: refused password: invoke setup-keys installs a key") as error:
        attempt("keyboard-interactive", "wrong")
    assert "takes no passwords" not in str(error.value)
    with pytest.raises(SshError, match="the server takes no passwords, only publickey"):
        attempt("publickey", "secret")


def test_many_keys_leave_tries_for_the_password(tmp_path: Path) -> None:
    keys = tuple(make_key(tmp_path / f"key{number}") for number in range(KEYS_BEFORE_PASSWORD + 4))
    assert attempt("publickey,password", "secret", keys) == "password"


@pytest.mark.parametrize(("text", "user", "host"), [
    ("ann@corp.example@gpu1", "ann@corp.example", "gpu1"), ("CORP\\ann@gpu1:2222", "CORP\\ann", "gpu1")])
def test_directory_names_log_in(text: str, user: str, host: str) -> None:
    node = parse_node(text)
    assert (node.user, node.host) == (user, host) and str(node) == text


@pytest.mark.parametrize("text", ["a@b@c@gpu1", "@gpu1", "a b@gpu1", "$(id)@gpu1", "a\\@gpu1", "-x@gpu1"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(NodeError):
        parse_node(text)


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_that_windows_wrote_are_read(coding: str, tmp_path: Path) -> None:
    path = tmp_path / "nodes.txt"
    path.write_text("gpu1\r\ngpu2\r\n", encoding=coding)
    assert [str(node) for node in read_nodes([f"@{path}"])] == ["gpu1", "gpu2"]
    path.write_text("gpu1 slots=1\r\ngpu2 slots=2\r\n", encoding=coding)
    assert [host.host for host in read_hostfile(path)] == ["gpu1", "gpu2"]
    assert read_text(path).startswith("gpu1")


def test_one_host_at_two_ports_has_two_names() -> None:
    nodes = [parse_node(text) for text in ("me@box:2201", "me@box:2202", "gpu1:2222", "ann@gpu2", "bob@gpu2")]
    assert list(aliases_of(nodes).values()) == ["box-2201", "box-2202", "gpu1", "gpu2-ann", "gpu2-bob"]


def test_settings_that_keep_no_keys_are_followed(tmp_path: Path) -> None:
    text = f"hostname gpu1\nuser me\nport 22\nuserknownhostsfile %s\nglobalknownhostsfile {tmp_path}/system\n" \
        "identityagent none\naddressfamily inet6\nbindaddress 10.0.0.9"
    for word in ("/dev/null", "none"):
        route = route_of(parse_node("gpu1"), SshOptions(), settings_of(text % word))
        assert route.new_keys_file is None and route.known_hosts[-1] == tmp_path / "system"
        assert route.agent is None and route.family == socket.AF_INET6 and route.bind_address == "10.0.0.9"
    key = HostKey("ssh-ed25519", "AAAA" + word)
    assert refuse_changed_key(key, [], route) == "unknown"
    add_entry(route, key)
    assert refuse_changed_key(key, [], route) == "known" and not (tmp_path / "system").exists()


def test_the_last_words_are_those_of_whichever_output_has_some() -> None:
    assert last_words("\nThis account is currently not available.\n", "") == "This account is currently not available."
    assert last_words("noise", "one\nopen terminal failed\n\n") == "open terminal failed"
    assert last_words("", "") == "it printed nothing"


@pytest.mark.needs("sshd", "ssh", "ssh-keygen")
def test_a_host_that_runs_nothing_is_quoted(tmp_path: Path) -> None:
    nologin = "sh -c 'echo This account is currently not available.; exit 1'"
    with SshServer(tmp_path / "server", command=nologin) as server:
        client = SshClient(tmp_path / "client", gpu1=server)
        client.trust(server)
        (tmp_path / "hostfile.txt").write_text("gpu1 slots=1 type=CPU\n")
        for tool, *words in (("generate_hostfile", "--nodes", "gpu1"), ("check_cluster", "--hostfile", "hostfile.txt"),
                             ("sync_nodes", "--nodes", "gpu1", "--no-env"),
                             ("launch_training", "--hostfile", "hostfile.txt", "--model", "tiny")):
            done = subprocess.run([sys.executable, str(ROOT / "master" / f"{tool}.py"), *words, "--ssh-config",
                                   str(client.config)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert done.returncode == 1 and "This account is currently not available." in done.stdout + done.stderr, \
                f"{tool}: {done.stdout + done.stderr}"


@pytest.mark.parametrize("shell", ["sh", "bash", "zsh", "tcsh", "csh", "fish"])
@pytest.mark.needs("tcsh", "zsh", "fish")
def test_programs_of_many_lines_run_from_any_shell(shell: str) -> None:
    program = ("first=$1\nsay() { printf '%s!\\n' \"$*\"; }\nread -r line\n"
               "if [ -n \"$line\" ]; then say \"$first\" \"$line\" '\\n'; fi\n")
    done = subprocess.run([shell, "-c", sh_command(program, "it's one")], input="from stdin\n", capture_output=True,
                          text=True)
    assert done.stdout == "it's one from stdin \\n!\n", done.stderr
