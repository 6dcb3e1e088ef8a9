"""Which machines a tool is to work on: `--nodes`, the same syntax in every tool.

    gpu1 admin@gpu2:2222          names, addresses or ssh aliases, with or without user and port
    gpu[01-08,12] rack[1-2]n[1-4] ranges; leading zeros are kept
    [fe80::2%eth0]:22 ::1         IPv6 (in brackets where a port follows)
    @nodes.txt                    a file with one or more a line; # begins a comment
    localhost                     this machine, without SSH

Names are separated by spaces or commas.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from master.core.run_cli import UsageError
from master.core.text_file import read_text

MAX_NODES = 1024
MAX_NAME = 253  # characters of a host name, RFC 1035
# What neither a shell nor ssh can take for anything but a name: no leading hyphen, no space, no quote.
HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# A login name; of a directory it may hold its domain: ann@corp.example, CORP\\ann.
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?([@\\][A-Za-z0-9_][A-Za-z0-9_.-]*)?")
RANGE = re.compile(r"\[([0-9,-]+)\]")


class NodeError(UsageError):
    """A word that is no node, with what is wrong with it."""


@dataclass(frozen=True)
class Node:
    """A machine as the user named it. `host` may be an ssh alias; user and port are None where ssh's config decides."""

    host: str
    user: str | None = None
    port: int | None = None

    @property
    def is_local(self) -> bool:
        """True for this machine itself, which needs no SSH."""
        return self.host == "localhost" and self.user is None and self.port is None

    @property
    def is_ipv6(self) -> bool:
        """True for an IPv6 address."""
        return ":" in self.host

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        if self.port is None:
            return user + self.host
        return f"{user}[{self.host}]:{self.port}" if self.is_ipv6 else f"{user}{self.host}:{self.port}"


def read_nodes(words: Iterable[str]) -> list[Node]:
    """Return the nodes that the words name, in their order; raise NodeError for bad, doubled or too many ones."""
    nodes: list[Node] = []
    seen: dict[Node, str] = {}
    for word, where in each_word(words):
        for text in expand(word, where):
            node = parse_node(text, where)
            if node in seen:
                raise NodeError(f"{where}{show(text)} is named twice (also as {show(seen[node])})")
            if len(nodes) == MAX_NODES:
                raise NodeError(f"more than {MAX_NODES} nodes")
            seen[node] = text
            nodes.append(node)
    if not nodes:
        raise NodeError("no nodes: --nodes gpu1,gpu2 or --nodes @FILE")
    return nodes


def show(text: str) -> str:
    """Return a word for a message: quoted, short, and harmless to a terminal."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def each_word(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each single word and where it stands ('' for the command line), with @files opened."""
    for argument in words:
        for word in split_words(argument):
            if not word.startswith("@"):
                yield word, ""
                continue
            path = Path(word[1:]).expanduser()
            try:
                lines = read_text(path).splitlines()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not UTF-8"
                raise NodeError(f"{path}: {reason}") from None
            for number, line in enumerate(lines, 1):
                for inner in split_words(line.partition("#")[0]):
                    yield inner, f"{path}:{number}: "


def split_words(text: str) -> list[str]:
    """Split at spaces and at commas outside brackets."""
    return re.findall(r"(?:\[[^\]\s]*\]|[^\s,])+", text)


def expand(word: str, where: str) -> Iterable[str]:
    """Return the words that a word with ranges stands for."""
    parts = RANGE.split(word)
    if len(parts) == 1:
        return [word]
    choices: list[Sequence[str]] = []
    count = 1
    for position, part in enumerate(parts):
        choices.append(expand_range(part, word, where) if position % 2 else [part])
        count *= len(choices[-1])
    if count > MAX_NODES:
        raise NodeError(f"{where}{show(word)} names {count:,} nodes; at most {MAX_NODES} are allowed")
    return map("".join, itertools.product(*choices))


def expand_range(text: str, word: str, where: str) -> list[str]:
    """Return the numbers in '01-08,12'."""
    numbers: list[str] = []
    for piece in text.split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", piece)
        if not found:
            raise NodeError(f"{where}{show(word)}: a range is written like [1-4,7] or [01-08]")
        first, last = found.group(1), found.group(2) or found.group(1)
        if int(last) < int(first):
            raise NodeError(f"{where}{show(word)}: the range {piece} runs backwards")
        if int(last) - int(first) >= MAX_NODES:
            count = int(last) - int(first) + 1
            raise NodeError(f"{where}{show(word)} names {count:,} nodes; at most {MAX_NODES} are allowed")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def parse_node(text: str, where: str = "") -> Node:
    """Return one node of the form [user@]host[:port]; raise NodeError if it's none."""
    user, at, rest = text.rpartition("@")
    if at and not USER.fullmatch(user):
        raise NodeError(f"{where}{show(text)}: {show(user)} is no user name")
    host, port = split_port(rest, text, where)
    if ":" in host:
        address, _, scope = host.partition("%")
        try:
            ipaddress.IPv6Address(address)
        except ValueError:
            raise NodeError(f"{where}{show(text)}: neither host:port nor an IPv6 address") from None
        if "%" in host and not HOST.fullmatch(scope):
            raise NodeError(f"{where}{show(text)}: {show(scope)} is no network interface")
    elif not HOST.fullmatch(host) or len(host) > MAX_NAME:
        raise NodeError(f"{where}{show(text)} is no host name (letters, digits, '.', '_' and '-')")
    return Node(host, user or None, port)


def split_port(rest: str, text: str, where: str) -> tuple[str, int | None]:
    """Return host and port of 'host:port', '[v6]:port', 'host', '[v6]' or a bare IPv6 address."""
    found = re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", rest)
    if found:
        if ":" not in found.group(1):
            raise NodeError(f"{where}{show(text)}: a range is written like gpu[1-4]")
        host, port = found.group(1), found.group(2)
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    else:
        host, port = rest, None
    if port is None:
        return host, None
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise NodeError(f"{where}{show(text)}: {show(port)} is no port (1 to 65535)")
    return host, int(port)
