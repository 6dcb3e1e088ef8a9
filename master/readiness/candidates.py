"""Hosts that this machine knows already, to choose from: of the ssh configuration, known_hosts, neighbours, mDNS and
Tailscale. Nobody is scanned.

Only hosts of the ssh configuration and known_hosts are tried, at addresses of private networks; neighbours are listed.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from master.ssh.node_names import Node, NodeError, parse_node
from master.ssh.route import SshError, SshOptions, resolve
from master.ssh.run_on_all import run_on_all

CONFIG, KNOWN = "ssh config", "known_hosts"
TRIED = (CONFIG, KNOWN)
MOST_TRIED = 32  # hosts; a known_hosts file may have hundreds
TRY_LIMIT_S = 3.0
MOST_INCLUDES = 16  # deep, as in OpenSSH's readconf.c
ALIVE = {"REACHABLE", "STALE", "DELAY", "PROBE", "PERMANENT"}  # states of a neighbour that answered once
# Tailscale's addresses (RFC 6598) count as a network of one's own too.
SHARED = ipaddress.ip_network("100.64.0.0/10")


@dataclass(frozen=True)
class Candidate:
    """A host that may be meant; `source`: who knows it; `state`: what came of trying it, '' for one that wasn't."""

    node: Node
    source: str
    address: str = ""
    port: int = 22
    state: str = ""


def find_candidates(ssh: SshOptions) -> list[Candidate]:
    """Return the hosts that are known here, those of the ssh configuration first, each once, tried where they may be.
    """
    home = Path.home() / ".ssh"
    found = [*named(config_hosts(ssh.ssh_config or home / "config"), CONFIG),
             *named(known_names(home / "known_hosts"), KNOWN)]
    with ThreadPoolExecutor(MOST_TRIED) as pool:
        at_home = [each for each in pool.map(lambda each: with_address(each, ssh), found) if each and is_near(each)]
    unique: list[Candidate] = []
    for each in [*at_home, *named(neighbours(), "neighbour"), *named(mdns_names(), "mDNS"),
                 *named(tailscale_names(), "Tailscale")]:
        if not any(is_same(each, other) for other in unique):
            unique.append(each)
    return tried(unique, ssh)


def is_same(one: Candidate, other: Candidate) -> bool:
    """Return whether two candidates have a name or an address with its port in common."""
    return str(one.node) == str(other.node) or bool(
        one.address and (one.address, one.port) == (other.address, other.port))


def named(names: Sequence[str], source: str) -> list[Candidate]:
    """Return candidates of these names, without those that are none."""
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(Candidate(parse_node(name), source, name if is_address(name) else ""))
        except NodeError:
            continue
    return found


def is_address(text: str) -> bool:
    """Return whether a text is an IP address."""
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def is_near(candidate: Candidate) -> bool:
    """Return whether a host is worth trying: at an address of a private network, or of the ssh configuration without
    one."""
    if not candidate.address:
        return candidate.source == CONFIG
    address = ipaddress.ip_address(candidate.address.partition("%")[0])
    return address.is_private or (address.version == 4 and address in SHARED)


def with_address(candidate: Candidate, ssh: SshOptions) -> Candidate | None:
    """Return a candidate with the address that its name leads to, '' behind a jump host; None for a name of known_hosts
    that leads nowhere any more."""
    try:
        route = resolve(candidate.node, ssh)
        if route.proxy:
            return replace(candidate, address="")
        found = socket.getaddrinfo(route.address, route.port, type=socket.SOCK_STREAM)
    except (SshError, OSError, UnicodeError):
        return replace(candidate, address="") if candidate.source == CONFIG else None
    return replace(candidate, address=str(found[0][4][0]), port=route.port)


def config_hosts(path: Path, depth: int = 0) -> list[str]:
    """Return the names of an ssh configuration's Host lines, with the files that it includes; patterns are none."""
    names: list[str] = []
    try:
        lines = path.expanduser().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        word, _, rest = re.sub(r"\s*=\s*|\s+", " ", line.strip(), count=1).partition(" ")
        values = rest.replace('"', " ").split()
        if word.lower() == "host":
            names += [value for value in values if not set(value) & set("*?!%")]
        elif word.lower() == "include" and depth < MOST_INCLUDES:
            for value in values:
                for file in sorted(included(value)):
                    names += config_hosts(file, depth + 1)
    return [name for name in names if not name.startswith("#")]


def included(pattern: str) -> Iterator[Path]:
    """Yield the files of an Include: of a relative one below ~/.ssh (ssh_config(5))."""
    whole = Path(pattern).expanduser()
    base = Path(whole.anchor) if whole.is_absolute() else Path.home() / ".ssh"
    inner = whole.relative_to(whole.anchor) if whole.is_absolute() else whole
    if str(inner) != ".":
        yield from base.glob(str(inner))


def known_names(path: Path) -> list[str]:
    """Return the hosts of a known_hosts file, host:port where it isn't 22; hashed names can't be read."""
    names = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        field = line.split(" ", 1)[0]
        if not field or field[0] in "|@#":
            continue
        for word in field.split(","):
            port = re.fullmatch(r"\[([^\]]+)\]:(\d+)", word)
            name = word if not port else f"[{port[1]}]:{port[2]}" if ":" in port[1] else f"{port[1]}:{port[2]}"
            if not set(name) & set("*?!"):
                names.append(name)
    return names


def output_of(*command: str) -> str:
    """Return what a program prints, '' where it isn't there, fails or takes too long."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              timeout=TRY_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout


def objects(text: str) -> Any:
    """Return a program's JSON, None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def neighbours() -> list[str]:
    """Return the IPv4 addresses that this machine has talked with lately on its networks (`ip neigh`)."""
    rows = objects(output_of("ip", "-json", "-4", "neigh"))
    return [str(row["dst"]) for row in rows if isinstance(row, dict) and "dst" in row
            and set(row.get("state") or ()) & ALIVE] if isinstance(rows, list) else []


def mdns_names() -> list[str]:
    """Return the names that avahi has heard of machines with SSH; it asks nobody (--cache)."""
    rows = output_of("avahi-browse", "--cache", "--parsable", "--terminate", "_ssh._tcp").splitlines()
    return [f"{fields[3]}.local" for row in rows if len(fields := row.split(";")) > 3 and fields[0] == "+"]


def tailscale_names() -> list[str]:
    """Return the names of the machines of this tailnet that are online and run Linux."""
    status = objects(output_of("tailscale", "status", "--json"))
    peers = status.get("Peer") if isinstance(status, dict) else None
    return [str(peer.get("HostName")) for peer in peers.values() if isinstance(peer, dict) and peer.get("Online")
            and peer.get("OS") == "linux"] if isinstance(peers, dict) else []


def tried(candidates: Sequence[Candidate], ssh: SshOptions) -> list[Candidate]:
    """Return candidates with what came of trying the keys here on those that may be tried."""
    may = [each.node for each in candidates if each.source in TRIED][:MOST_TRIED]
    quick = replace(ssh, password=None, host_keys="yes", connect_timeout=min(ssh.connect_timeout, TRY_LIMIT_S))
    found = run_on_all(may, quick, lambda session: session.run("exit 0").code) if may else {}
    return [replace(each, state=state_of(found[each.node]) if each.node in found else "not tried")
            for each in candidates]


def state_of(result: int | SshError) -> str:
    """Return in words what came of trying a host."""
    if not isinstance(result, SshError):
        return "takes your key"
    return {"authentication": "asks for a password", "host key": "host key not known yet"}.get(
        result.stage, f"no answer ({result.reason})")
