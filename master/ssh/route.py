"""How a host is reached, as OpenSSH itself would: `ssh -G` reads the user's configuration, nobody else does.

So Include, Match, ProxyJump, IdentityFile, UserKnownHostsFile and all the rest work as they do by hand.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from master.ssh.node_names import Node

ABSENT = {"", "none"}
FAMILIES = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}
HOST_KEY_WORDS = {"yes": "yes", "true": "yes", "ask": "ask", "accept-new": "accept-new", "no": "accept-new",
                  "off": "accept-new", "false": "accept-new"}  # a changed key is refused here even with "no"


class SshError(Exception):
    """Why a host can't be worked on: the stage, the fault, and the command that fixes it."""

    def __init__(self, host: str, stage: str, reason: str, fix: str = "") -> None:
        self.host, self.stage, self.fix = host, stage, fix
        self.reason = "".join(character if character.isprintable() else " " for character in reason)[:300]
        super().__init__(f"{host}: {stage}: {self.reason}" + (f": {fix}" if fix else ""))


class NeedsOpenSsh(Exception):
    """A host that only OpenSSH's own client can reach; the message says why."""


@dataclass(frozen=True)
class Login:
    """How a host was reached before; None: as the ssh configuration says."""

    user: str | None
    port: int | None
    key: Path | None


@dataclass(frozen=True)
class SshOptions:
    """What the flags say on reaching hosts; they win over the user's ssh configuration. Times in seconds.

    `host_keys` is OpenSSH's word (yes, ask, accept-new) or None for what the configuration says; `password` is tried
    after every key. `only`: offer nothing but the `key`, or nothing but the `password`.
    """

    ssh_config: Path | None = None
    user: str | None = None
    port: int | None = None
    key: Path | None = None
    password: str | None = field(default=None, repr=False)
    host_keys: str | None = None
    connect_timeout: float = 10
    timeout: float = 90
    more_keys: tuple[Path, ...] = ()  # lanspeed's own, offered after the configured ones
    only: str | None = None
    logins: Mapping[str, Login] = field(default_factory=dict)  # of hosts, where the flags say nothing

    def for_node(self, node: Node) -> SshOptions:
        """Return the options for one node: flags first, then how it was reached before."""
        login = self.logins.get(str(node))
        if login is None or self.only:
            return self
        return replace(self, user=self.user or login.user, port=self.port or login.port, key=self.key or login.key)


@dataclass(frozen=True)
class Route:
    """Where a node is and how to get in, ready for a connection."""

    node: Node
    address: str
    port: int
    user: str
    key_files: tuple[Path, ...]
    only_key_files: bool
    known_hosts: tuple[Path, ...]
    host_key_name: str
    host_keys: str
    proxy: str | None
    agent: str | None
    needs_openssh: str | None
    hashes_names: bool = False
    host_key_kinds: tuple[str, ...] = ()  # that may be asked for; empty: any
    min_rsa_bits: int = 1024
    new_keys_file: Path | None = None  # that a new host key is added to; None: nowhere, the user wants none kept
    family: int = socket.AF_UNSPEC
    bind_address: str | None = None  # of this machine, to connect from


def ssh_words(ssh: SshOptions, node: Node) -> list[str]:
    """Return the words of an ssh command line up to the host, which must come next after `--`."""
    user, port = node.user or ssh.user, node.port or ssh.port
    words = ["ssh", *(["-F", str(ssh.ssh_config)] if ssh.ssh_config else [])]
    words += [*(["-l", user] if user else []), *(["-p", str(port)] if port else [])]
    return words + (["-i", str(ssh.key)] if ssh.key else [])


def resolve(node: Node, ssh: SshOptions) -> Route:
    """Ask OpenSSH how it would reach a node; raise SshError if it can't tell."""
    command = [*ssh_words(ssh, node), "-G", "--", node.host]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=ssh.connect_timeout, errors="replace")
    except FileNotFoundError:
        raise SshError(str(node), "configuration", "no ssh here", "sudo apt install openssh-client") from None
    except subprocess.TimeoutExpired:
        raise SshError(str(node), "configuration", "ssh -G did not answer: a Match exec in your config hangs",
                       shlex.join(command)) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["ssh -G failed"]
        raise SshError(str(node), "configuration", lines[0], "fix that line of your ssh config")
    return route_of(node, ssh, settings_of(done.stdout))


def settings_of(text: str) -> dict[str, list[str]]:
    """Return ssh -G's lines as {key: values}; a few keys come more than once."""
    settings: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        settings.setdefault(key.lower(), []).append(value.strip())
    return settings


def route_of(node: Node, ssh: SshOptions, settings: dict[str, list[str]]) -> Route:
    """Return the route that ssh -G's settings describe."""

    def one(key: str, default: str = "") -> str:
        value = settings.get(key, [default])[0]
        return default if value.lower() in ABSENT else value

    address, port, user = one("hostname", node.host), int(one("port", "22")), one("user")
    home = Path.home()
    tokens = {"%%": "%", "%d": str(home), "%h": address, "%n": node.host, "%p": str(port), "%r": user,
              "%u": os.environ.get("USER", user), "%i": str(os.getuid())}

    def path(text: str) -> Path:
        return Path(re.sub("%.", lambda found: tokens.get(found.group(0), found.group(0)), text)).expanduser()

    own_files = [path(word) for word in shlex.split(settings.get("userknownhostsfile", ["~/.ssh/known_hosts"])[0])
                 if word.lower() not in ABSENT]
    all_files = own_files + [path(word) for word in shlex.split(one("globalknownhostsfile"))]
    name = one("hostkeyalias") or (address if port == 22 else f"[{address}]:{port}")
    return Route(
        node=node, address=address, port=port, user=user,
        key_files=tuple(dict.fromkeys([*map(path, settings.get("identityfile", [])), *ssh.more_keys])),
        only_key_files=one("identitiesonly", "no") == "yes",
        known_hosts=tuple(file for file in all_files if str(file) != "/dev/null"),
        new_keys_file=next((file for file in own_files[:1] if str(file) != "/dev/null"), None),
        family=FAMILIES.get(one("addressfamily", "any"), socket.AF_UNSPEC), bind_address=one("bindaddress") or None,
        host_key_name=name, host_keys=ssh.host_keys or HOST_KEY_WORDS.get(one("stricthostkeychecking"), "ask"),
        proxy=proxy_command(ssh, one("proxyjump"), one("proxycommand"), tokens, address, port),
        agent=agent_of(settings.get("identityagent", ["SSH_AUTH_SOCK"])[0], path),
        needs_openssh=needs_openssh_for(settings), hashes_names=one("hashknownhosts", "no") == "yes",
        host_key_kinds=tuple(one("hostkeyalgorithms").split(",")) if one("hostkeyalgorithms") else (),
        min_rsa_bits=int(one("requiredrsasize", "1024")))


def proxy_command(
    ssh: SshOptions, jump: str, command: str, tokens: dict[str, str], address: str, port: int
) -> str | None:
    """Return the shell command whose input and output are the way to the host, None for a direct one.

    The last jump host is reached by ssh itself, through those before it, so that its own part of the configuration
    holds and its host key is checked.
    """
    if jump:
        before, _, last = jump.rpartition(",")
        config = ["-F", str(ssh.ssh_config)] if ssh.ssh_config else []
        target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        words = ["ssh", *config, "-o", "BatchMode=yes", *(["-J", before] if before else []), "-W", target]
        return shlex.join([*words, *(["--", last] if "://" in last else jump_words(last))])
    if command:
        return re.sub("%.", lambda found: shlex.quote(tokens.get(found.group(0), found.group(0))), command)
    return None


def jump_words(text: str) -> list[str]:
    """Return ssh's words for a jump host written [user@]host[:port]."""
    user, _, rest = text.rpartition("@")
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]+))?", rest)
    host, port = (found.group(1).strip("[]"), found.group(2)) if found else (rest, None)
    return [*(["-l", user] if user else []), *(["-p", port] if port else []), "--", host]


def agent_of(text: str, path: object) -> str | None:
    """Return the agent's socket; IdentityAgent may name a variable, or a file."""
    if text.lower() in ABSENT:
        return None
    if text == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK") or None
    if text.startswith("$"):
        return os.environ.get(text.strip("${}")) or None
    return str(path(text))  # type: ignore[operator]


def needs_openssh_for(settings: dict[str, list[str]]) -> str | None:
    """Return the setting that only OpenSSH itself can follow, None if there is none."""
    for key, name in (("pkcs11provider", "PKCS11Provider"), ("knownhostscommand", "KnownHostsCommand"),
                      ("bindinterface", "BindInterface"), ("proxyusefdpass", "ProxyUseFdpass"),
                      ("revokedhostkeys", "RevokedHostKeys")):
        if settings.get(key, ["none"])[0].lower() not in {*ABSENT, "no"}:
            return name
    return None
