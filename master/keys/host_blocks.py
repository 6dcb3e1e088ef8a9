"""The Host blocks that make plain `ssh gpu1`, `rsync` and `deepspeed` reach the hosts as lanspeed does.

They stand in a file of their own, config.d/lanspeed beside the user's ssh configuration, which gets one Include line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from master.core.atomic_write import write_atomically
from master.core.run_cli import UsageError
from master.ssh.node_names import Node

HEADER = "# Written by `invoke setup-keys`; `invoke setup-keys --nodes ... --remove` takes it away again.\n"


def alias_of(node: Node) -> str:
    """Return the name by which a host is reached once its block is there: no user, port or colon in it."""
    return re.sub("[:%]+", "-", node.host).strip("-")


def aliases_of(nodes: Sequence[Node]) -> dict[Node, str]:
    """Return the names of several nodes; where two would share one (as me@box:2201 and me@box:2202), each also has its
    port, or else its user. Raises UsageError where that doesn't tell them apart."""
    found = {node: alias_of(node) for node in nodes}
    for shared in {alias for alias in found.values() if list(found.values()).count(alias) > 1}:
        for node in [node for node in nodes if found[node] == shared]:
            ports = {other.port for other in nodes if alias_of(other) == shared}
            what = str(node.port or 22) if len(ports) > 1 else re.sub(r"[^A-Za-z0-9_.-]+", "-", node.user or "me")
            found[node] = f"{shared}-{what}"
    if len(set(found.values())) < len(found):
        raise UsageError(f"{', '.join(map(str, nodes))}: several of them are one host and port: name it once")
    return found


def block_of(node: Node, user: str | None, port: int | None, key: Path, alias: str = "") -> str:
    """Return a host's block: only what its name or the flags give, and the key."""
    alias, user, port = alias or alias_of(node), node.user or user, node.port or port
    home = Path.home()
    shown = f"~/{key.relative_to(home)}" if key.is_relative_to(home) else str(key)
    lines = [f"Host {alias}", *([f"  HostName {node.host}"] if alias != node.host else []),
             *([f"  User {user}"] if user else []), *([f"  Port {port}"] if port else []),
             f"  IdentityFile {quoted(shown)}"]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """Return a path as ssh_config takes it."""
    return f'"{text}"' if " " in text else text


def blocks_in(text: str) -> dict[str, str]:
    """Return the blocks of the managed file by their hosts."""
    return {found.group(1): found.group(0).rstrip("\n") + "\n"
            for found in re.finditer(r"^Host (\S+)\n(?:[ \t].*\n?)*", text, re.M)}


def own_file(config: Path) -> Path:
    """Return the managed file beside an ssh configuration."""
    return config.parent / "config.d" / "lanspeed"


def include_of(config: Path) -> str:
    """Return the line that makes OpenSSH read the managed file; it takes relative names to be below ~/.ssh."""
    usual = config == Path.home() / ".ssh" / "config"
    return "Include config.d/lanspeed" if usual else f"Include {quoted(str(own_file(config).absolute()))}"


def read_text(path: Path) -> str:
    """Return a file's text, '' if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return ""


def plan(config: Path, blocks: Iterable[str], remove: Sequence[str] = ()) -> dict[Path, str | None]:
    """Return what is to be written to add `blocks` or remove hosts: {path: new text, None to delete}."""
    path, include = own_file(config), include_of(config)
    before, main = read_text(path), read_text(config)
    have = blocks_in(before)
    for block in blocks:
        have.update(blocks_in(block))
    for alias in remove:
        have.pop(alias, None)
    after = HEADER + "".join("\n" + have[name] for name in sorted(have)) if have else None
    included = re.search(rf"^\s*{re.escape(include)}\s*$", main, re.M) is not None
    changes: dict[Path, str | None] = {}
    if (after or "") != before:
        changes[path] = after
    if after and not included:
        changes[config] = f"{include}\n\n{main}" if main else f"{include}\n"
    elif not after and included:
        rest = re.sub(rf"^\s*{re.escape(include)}[ \t]*\n\n?", "", main, count=1, flags=re.M)
        changes[config] = rest or None
    return changes


def apply(changes: dict[Path, str | None]) -> None:
    """Write the planned files, private to the user; a symbolic link stays one."""
    for path, text in changes.items():
        if text is None:
            path.unlink(missing_ok=True)
            continue
        fresh = not path.exists()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = 0o600 if fresh else path.stat().st_mode & 0o777
        write_atomically(path, text)
        path.resolve().chmod(mode)
