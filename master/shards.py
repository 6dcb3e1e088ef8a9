"""A checkpoint whose parts lie on several hosts, brought whole to others, so that a run can go on there.

Each rank has written its part of the optimizer's states to its own host's disk. With other hosts, or another number of
slots, every host needs all parts: they are fetched here from where they are, and sent to whoever lacks some.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from master.access import question
from master.channels import Channel
from master.console import say
from master.files import write_whole
from master.fleet import on_all
from master.hostfile import Slots
from master.node_facts import place_of
from master.nodes import Node, parse_node
from master.run_fetch import END, MARK, Progress, unpacked
from master.runs import RunError
from master.ssh import Session
from master.ssh_config import Access, SshError

SEAL, SEALED = "complete.json", "@@SEAL "
PART = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt$")
SCRATCH = ".gathered"  # in the run folder
COMING = ".coming-"  # there, until all has come
PATIENCE = 600.0  # seconds for a host to put away what it was sent
BLOCK = 512  # bytes of tar's
RECORD = 10240


@dataclass
class Whole:
    """A checkpoint: who has which of its files (size, CRC-32), and who may say so."""

    step: int
    layout: dict[str, Any]
    files: dict[str, tuple[str, list[int]]] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """True if no rank's part is missing, or every rank has written the same."""
        parts = {int(found[1]) for name in self.files if (found := PART.search(name))}
        return not parts or (len(parts), max(parts) + 1) == (self.layout["world_size"],) * 2

    @property
    def seal(self) -> str:
        """complete.json of all of it."""
        files = {name: sums for name, (_, sums) in self.files.items()}
        return json.dumps({"step": self.step, "layout": self.layout, "files": files}, indent=1)


Seals = dict[int, dict[str, Any]]  # a host's complete.json by step


def entered(host: str, known: Mapping[str, Any]) -> str:
    """Return the shell's words that go where a host's ranks start: this folder there too, or lanspeed's."""
    if parse_node(host).is_local:
        return f"cd {shlex.quote(str(Path.cwd()))}"
    folder = place_of(known.get(host, {})).folder
    return f"{{ cd {shlex.quote(str(Path.cwd()))} 2>/dev/null || cd {shlex.quote(folder)}; }}"


def read_seals(text: str) -> Seals:
    """Return what a host says of its checkpoints; what makes no sense is left out."""
    found: Seals = {}
    for block in text.split(SEALED)[1:]:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, IndexError):
            seal = json.loads(block)
            int(seal["layout"]["world_size"])
            if all(re.fullmatch(r"\w[\w./-]*", name) and ".." not in name and int(sums[0]) >= 0
                   for name, sums in seal["files"].items()):
                found[int(seal["step"])] = seal
    return found


def newest_whole(seals: Mapping[str, Seals]) -> Whole | None:
    """Return the newest checkpoint of which all parts are somewhere, from every host's seals; None if none is."""
    for step in sorted({step for each in seals.values() for step in each}, reverse=True):
        found: Whole | None = None
        for host, each in seals.items():
            seal = each.get(step)
            if not seal or (found and seal["layout"] != found.layout):
                continue
            found = found or Whole(step, seal["layout"])
            for name, sums in seal["files"].items():
                found.files.setdefault(name, (host, sums))
        if found and found.is_complete:
            return found
    return None


def has_all(seal: Mapping[str, Any] | None, whole: Whole) -> bool:
    """Tell whether a host's seal names every file of a checkpoint."""
    return seal is not None and all(name in seal["files"] and seal["files"][name][0] == sums[0]
                                    for name, (_, sums) in whole.files.items())


def bring_together(run: Path, before: Sequence[Slots], now: Sequence[Slots], known: Mapping[str, Any],
                   access: Access) -> Path | None:
    """Have every host that trains `now` hold the newest whole checkpoint of a run that `before` trained.

    `known` has what cluster.json says of each host. Return the checkpoint's path, None where there is nothing to do.
    Raises RunError where parts are missing or can't be moved.
    """
    if [(host.host, host.use) for host in before] == [(host.host, host.use) for host in now]:
        return None
    names = list(dict.fromkeys([host.host for host in (*before, *now)]))
    program = (f"for seal in {shlex.quote(str(run))}/checkpoints/checkpoint-*/{SEAL}; do "
               f'[ -f "$seal" ] && echo "{SEALED}" && cat "$seal"; done; exit 0')
    seals, unreached = _ask(names, known, access, program)
    whole = newest_whole(seals)
    if whole is None:
        why = "; ".join(unreached) or "no host has a whole one"
        raise RunError(f"{run}: the checkpoint's parts can't be brought to other hosts or slots: {why}")
    lacking = [host.host for host in now if not has_all(seals.get(host.host, {}).get(whole.step), whole)]
    if lacking:
        scratch = run / SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            _fetch(run, whole, known, access, scratch / f"checkpoint-{whole.step}")
            _send(run, whole, known, access, lacking, scratch)
        except (OSError, tarfile.TarError) as error:
            raise RunError(f"{run}: checkpoint-{whole.step} can't be brought together: {error}") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return run / "checkpoints" / f"checkpoint-{whole.step}"


def _ask(names: Sequence[str], known: Mapping[str, Any], access: Access, program: str
         ) -> tuple[dict[str, Seals], list[str]]:
    def work(session: Session) -> Seals:
        host = str(session.node)
        done = session.run(f"exec sh -c {shlex.quote(f'{entered(host, known)} && {program}')}", timeout=120)
        return read_seals(done.out)

    results = on_all([parse_node(name) for name in names], access, work, question())
    good = {str(node): result for node, result in results.items() if not isinstance(result, SshError)}
    return good, [str(result) for result in results.values() if isinstance(result, SshError)]


def _fetch(run: Path, whole: Whole, known: Mapping[str, Any], access: Access, folder: Path) -> None:
    """Fetch every file from a host that has it."""
    wanted: dict[Node, list[str]] = {}
    for name, (host, _) in whole.files.items():
        wanted.setdefault(parse_node(host), []).append(name)
    size = sum(sums[0] for _, sums in whole.files.values())
    if shutil.disk_usage(run).free < size:
        raise RunError(f"{run}: {size / 1e9:.1f} GB are needed here for the parts of checkpoint-{whole.step}")
    say(f"checkpoint-{whole.step}: fetching its parts from {', '.join(map(str, wanted))} ({size / 1e6:.0f} MB)")

    def work(session: Session) -> int:
        host, shown = str(session.node), Progress(str(session.node))
        names = [shlex.quote(name) for name in wanted[session.node]]
        expected = sum(whole.files[name][1][0] for name in wanted[session.node])
        program = (f"{entered(host, known)} && cd {shlex.quote(str(run))}/checkpoints/checkpoint-{whole.step} || exit; "
                   f"echo '{MARK}'{expected}; tar -cf - -- {' '.join(names)}; echo {END}$?")
        try:
            return unpacked(session, program, folder, shown)
        finally:
            shown.close()

    for node, result in on_all(list(wanted), access, work, at_once=1).items():  # one bar at a time
        if isinstance(result, SshError):
            raise RunError(f"{node}: {result}")
    write_whole(folder / SEAL, whole.seal)


def packed(folder: Path, top: Path) -> tuple[list[tuple[Path, str]], int]:
    """Return a tar's members (path, name) below `top` and its size in bytes."""
    members = [(path, str(path.relative_to(top))) for path in sorted(folder.rglob("*")) if path.is_file()]
    size = sum(BLOCK + -(-path.stat().st_size // BLOCK) * BLOCK for path, _ in members) + 2 * BLOCK
    return members, -(-size // RECORD) * RECORD


class _Sink:
    """A channel as the file that tarfile writes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def write(self, data: bytes) -> int:
        self._channel.send(data)
        return len(data)


def _send(run: Path, whole: Whole, known: Mapping[str, Any], access: Access, lacking: Sequence[str],
          scratch: Path) -> None:
    """Send the whole checkpoint, and the metrics so far, to the hosts that lack some of it."""
    if (run / "metrics.jsonl").exists():
        shutil.copy(run / "metrics.jsonl", scratch)
    members, size = packed(scratch, scratch)
    step, place = f"checkpoint-{whole.step}", shlex.quote(str(run))
    say(f"{step}: sending it to {', '.join(lacking)}")

    def work(session: Session) -> None:
        host = str(session.node)
        coming = shlex.quote(COMING + host)  # hosts may share a disk: the first to be done is as good as any
        program = (f"{entered(host, known)} && mkdir -p {place}/checkpoints && cd {place} && rm -rf {coming} && "
                   f"mkdir {coming} && head -c {size} | tar -xf - -C {coming} && rm -rf checkpoints/{step} && "
                   f"{{ mv {coming}/{step} checkpoints/ || [ -f checkpoints/{step}/{SEAL} ]; }} && "
                   f"{{ mv -f {coming}/metrics.jsonl . 2>/dev/null || :; }}; "
                   f"code=$?; rm -rf {coming}; echo {END}$code")
        with contextlib.closing(session.open(f"exec sh -c {shlex.quote(program)}")) as channel:
            with tarfile.open(fileobj=cast(IO[bytes], _Sink(channel)), mode="w|", format=tarfile.GNU_FORMAT) as archive:
                for path, name in members:
                    archive.add(path, name)
            said = b""
            while END.encode() not in said or not said.endswith(b"\n"):
                block = channel.receive(PATIENCE)
                if not block:
                    break
                said += block
            if f"{END}0".encode() not in said:
                raise SshError(host, "checkpoint", channel.complaints()[-200:] or "it didn't arrive")

    for node, result in on_all([parse_node(host) for host in lacking], access, work).items():
        if isinstance(result, SshError):
            raise RunError(f"{node}: {result}")
