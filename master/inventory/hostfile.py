"""hostfile.txt: which hosts train with how many slots, in the form that `deepspeed --hostfile` reads.

    # gpu2: 2x NVIDIA GeForce RTX 4090 24564 MiB; slot 0 unusable (NV_RESET_REQUIRED)
    gpu2 slots=2 type=NVIDIA
    # include: gpu1@gpu2:1

Slots are what the runtime enumerates; those to use stand in the include line, which is DeepSpeed's --include.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from master.core.atomic_write import write_atomically
from master.core.run_cli import UserError
from master.core.terminal import one_line
from master.core.text_file import read_text
from master.core.trust import refuse_foreign
from master.ssh.node_names import NodeError, parse_node

ENTRY = re.compile(r"^(\S+)\s+slots=([0-9]+)")  # as DeepSpeed 0.19 has it
KIND = re.compile(r"\stype=([A-Za-z]+)\b")
MAX_SLOTS, MAX_DIGITS = 1024, 20
FIRST_LINE = "# written by lanspeed "


class HostfileError(UserError):
    """A hostfile that DeepSpeed would refuse; the message begins with file and line."""


@dataclass(frozen=True)
class Slots:
    """One host: how many slots its runtime enumerates, which of them to use (ascending), the vendor ('' unknown)."""

    host: str
    total: int
    use: tuple[int, ...]
    vendor: str = ""

    @property
    def whole(self) -> bool:
        """True if every slot is used."""
        return self.use == tuple(range(self.total))


def include_filter(hosts: Sequence[Slots]) -> str:
    """Return DeepSpeed's --include for these hosts, '' if all slots are used."""
    if all(host.whole for host in hosts):
        return ""
    return "@".join(host.host if host.whole else f"{host.host}:{','.join(map(str, host.use))}" for host in hosts)


def read_hostfile(path: Path) -> list[Slots]:
    """Return the hosts of a hostfile in their order; raise HostfileError where DeepSpeed would, with the line.

    Raises TrustError for one that somebody else can change.
    """
    refuse_foreign(path)
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise HostfileError(f"{path}: {reason}: write one with invoke hostfile --nodes ...") from None
    hosts: dict[str, Slots] = {}
    include = ""
    for number, line in enumerate(map(str.strip, lines), 1):
        found = ENTRY.search(line)
        if line.startswith("# include: "):
            include = line.removeprefix("# include: ").strip()
        if not line or line.startswith("#"):
            continue
        if not found:
            raise HostfileError(f"{path}:{number}: not 'HOST slots=N': {line[:60]!a}")
        host, total = found.group(1), int(found.group(2)[:MAX_DIGITS])
        if host in hosts:
            raise HostfileError(f"{path}:{number}: {host} stands here twice: keep one of its lines")
        if total == 0:
            raise HostfileError(f"{path}:{number}: {host} has no slots: leave its line out")
        if total > MAX_SLOTS:
            raise HostfileError(f"{path}:{number}: {host} has {str(total)[:20]} slots: at most {MAX_SLOTS:,}")
        try:
            parse_node(host)
        except NodeError as error:
            raise HostfileError(f"{path}:{number}: {error}") from None
        kind = KIND.search(line)
        hosts[host] = Slots(host, total, tuple(range(total)), kind.group(1).upper() if kind else "")
    if not hosts:
        raise HostfileError(f"{path}: no hosts: write one with invoke hostfile --nodes ...")
    return filtered(hosts, include, Path(f"{path}: include line")) if include else list(hosts.values())


def select(hosts: Sequence[Slots], include: str, exclude: str) -> list[Slots]:
    """Return the hosts and slots that --include names, or those that --exclude doesn't: DeepSpeed's grammar, as in
    gpu1@gpu2:0,2. Raises HostfileError for names and slots that aren't there, and where nothing is left."""
    named = {host.host: host for host in hosts}
    if include and exclude:
        raise HostfileError("--include and --exclude: give one of them")
    if include:
        return filtered(named, include, Path("--include"))
    if not exclude:
        return list(hosts)
    without = {host.host: host for host in filtered(named, exclude, Path("--exclude"))}
    kept = [Slots(host.host, host.total, tuple(slot for slot in host.use if slot not in without[host.host].use)
                  if host.host in without else host.use, host.vendor) for host in hosts]
    kept = [host for host in kept if host.use]
    if not kept:
        raise HostfileError(f"--exclude {exclude}: no slots are left")
    return kept


def filtered(hosts: dict[str, Slots], include: str, path: Path) -> list[Slots]:
    """Return the hosts that an include filter names, with its slots; raise HostfileError for what isn't there."""
    chosen: dict[str, set[int]] = {}
    for part in include.split("@"):
        name, _, text = part.partition(":")
        if name not in hosts:
            raise HostfileError(f"{path}: {name[:60]!a} has no line in the hostfile")
        host = hosts[name]
        if text and not re.fullmatch("[0-9]+(,[0-9]+)*", text):
            raise HostfileError(f"{path}: {part[:60]!a}: write HOST or HOST:0,1")
        slots = {int(slot) for slot in text.split(",")} if text else set()
        if max(slots, default=0) >= host.total:
            raise HostfileError(f"{path}: slot {max(slots)} of {name}, which has {host.total}")
        chosen.setdefault(name, set()).update(slots)
    return [Slots(name, host.total, tuple(sorted(chosen[name])) or host.use, host.vendor)
            for name, host in hosts.items() if name in chosen]


def render_hostfile(hosts: Sequence[Slots], notes: dict[str, str], now: float | None = None) -> str:
    """Return a hostfile's text. notes: a remark on each host, also on those without a line, which come after."""
    slots = sum(len(host.use) for host in hosts)
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
    hosts_in_use = f"{len(hosts)} host{'s' * (len(hosts) != 1)}, {slots} slot{'s' * (slots != 1)} in use"
    lines = [f"{FIRST_LINE}{date}; {hosts_in_use}"]
    for host in hosts:
        lines += [f"# {one_line(host.host)}: {one_line(notes[host.host])}"] if host.host in notes else []
        lines.append(f"{host.host} slots={host.total}" + (f" type={host.vendor}" if host.vendor else ""))
    written = {host.host for host in hosts}
    lines += [f"# {one_line(name)}: {one_line(note)}" for name, note in notes.items() if name not in written]
    include = include_filter(hosts)
    return "\n".join([*lines, *([f"# include: {include}"] if include else [])]) + "\n"


def write_hostfile(path: Path, text: str) -> bool:
    """Write a hostfile unless only its date would change; return whether it was written."""
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        before = ""
    if undated(before) == undated(text):
        return False
    write_atomically(path, text)
    return True


def undated(text: str) -> str:
    """Return a hostfile's text without the date in its first line."""
    return re.sub(rf"^({re.escape(FIRST_LINE)})[^;\n]*", r"\1", text)


def differences(before: Sequence[Slots], after: Sequence[Slots]) -> list[str]:
    """Return what changed, a line a host: 'gpu2: 4 -> 3 slots', 'gpu3: new, 2 slots', 'gpu4: gone'."""
    old, new = ({host.host: host for host in hosts} for hosts in (before, after))
    lines = []
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in new:
            lines.append(f"{name}: gone, had {len(old[name].use)} slots")
        elif name not in old:
            lines.append(f"{name}: new, {len(new[name].use)} slots")
        elif old[name].use != new[name].use:
            few, many = len(old[name].use), len(new[name].use)
            which = "" if few != many else f" ({span(old[name].use)} -> {span(new[name].use)})"
            lines.append(f"{name}: {few} -> {many} slots{which}")
        elif old[name].vendor != new[name].vendor:
            lines.append(f"{name}: {old[name].vendor or 'unknown'} -> {new[name].vendor or 'unknown'}")
    if not lines and [host.host for host in before] != [host.host for host in after]:
        lines.append("the order of hosts, and so their ranks")
    return lines


def span(numbers: Sequence[int]) -> str:
    """Return '0,1,3'."""
    return ",".join(map(str, numbers))
