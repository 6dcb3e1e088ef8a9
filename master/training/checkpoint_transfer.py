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

from master.core.atomic_write import write_whole
from master.core.terminal import say
from master.inventory.hostfile import Slots
from master.inventory.node_facts import place_of
from master.ssh.channel import Channel
from master.ssh.node_names import Node, parse_node
from master.ssh.options import question
from master.ssh.route import Access, SshError
from master.ssh.run_on_all import on_all
from master.ssh.session import Session
from master.training.fetch_run import END, MARK, Progress, unpacked
from master.training.run_folder import RunError, job_prefix

SEAL, SEALED = "complete.json", "@@SEAL "
PART = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt$")
SCRATCH = ".gathered"  # in the run folder
METRICS, GOES_ON = "metrics.jsonl", "@@GOES_ON"
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


def lacks(seal: Mapping[str, Any] | None, whole: Whole) -> list[str]:
    """Return the files of a checkpoint that a host lacks: all of them if what it has is another's."""
    if seal is None or seal["layout"] != whole.layout:
        return list(whole.files)
    return [name for name, (_, sums) in whole.files.items() if seal["files"].get(name) != sums]


def bring_together(run: Path, before: Sequence[Slots], now: Sequence[Slots], known: Mapping[str, Any],
                   access: Access) -> Path | None:
    """Have every host that trains `now` hold the newest whole checkpoint of a run that `before` trained.

    `known` has what cluster.json says of each host. Return the checkpoint's path, None where there is nothing to do.
    Raises RunError where parts are missing or can't be moved.
    """
    if [(host.host, host.use) for host in before] == [(host.host, host.use) for host in now]:
        return None
    seals, unreached = _ask(run, list(dict.fromkeys([host.host for host in (*before, *now)])), known, access)
    whole = newest_whole(seals)
    newer = sorted({step for each in seals.values() for step in each if whole is None or step > whole.step})
    if whole is None or (newer and unreached):
        why = "; ".join(unreached) or "no host has a whole one"
        raise RunError(f"{run}: the checkpoint's parts can't be brought to other hosts or slots: {why}")
    if newer:
        say(f"parts of checkpoint-{newer[-1]} are nowhere: checkpoint-{whole.step} is the newest whole one")
    lacking = {host.host: names for host in now if (names := lacks(seals.get(host.host, {}).get(whole.step), whole))}
    scratch = run / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        if lacking:
            _fetch(run, whole, known, access, {name for names in lacking.values() for name in names}, scratch)
        if lacking or newer:
            _send(run, whole, known, access, {host.host: lacking.get(host.host, []) for host in now}, newer, scratch)
    except (OSError, tarfile.TarError) as error:
        raise RunError(f"{run}: checkpoint-{whole.step} can't be brought together: {error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return run / "checkpoints" / f"checkpoint-{whole.step}"


def _ask(run: Path, names: Sequence[str], known: Mapping[str, Any], access: Access
         ) -> tuple[dict[str, Seals], list[str]]:
    """Return the seals of each host's checkpoints, and why others can't be asked; RunError if the run goes on there."""
    program = (f"grep -aqsF {shlex.quote(f'LANSPEED_JOB={job_prefix(run)}-')} /proc/[0-9]*/environ && echo {GOES_ON}; "
               f"for seal in {shlex.quote(str(run))}/checkpoints/checkpoint-*/{SEAL}; do "
               f'[ -f "$seal" ] && echo "{SEALED}" && cat "$seal"; done; exit 0')

    def work(session: Session) -> str:
        words = f"{entered(str(session.node), known)} && {{ {program}; }}"
        return session.run(f"exec sh -c {shlex.quote(words)}", timeout=120).out

    results = on_all([parse_node(name) for name in names], access, work, question())
    for node, result in results.items():
        if isinstance(result, str) and GOES_ON in result.splitlines():
            raise RunError(f"{node}: the run goes on there: --stop {shlex.quote(str(run))} ends it")
    good = {str(node): read_seals(result) for node, result in results.items() if isinstance(result, str)}
    return good, [str(result) for result in results.values() if isinstance(result, SshError)]


def _fetch(run: Path, whole: Whole, known: Mapping[str, Any], access: Access, names: set[str], scratch: Path) -> None:
    """Fetch files, each from a host that has it."""
    folder = scratch / f"checkpoint-{whole.step}"
    wanted: dict[Node, list[str]] = {}
    for name in sorted(names):
        wanted.setdefault(parse_node(whole.files[name][0]), []).append(name)
    sizes = {node: sum(whole.files[name][1][0] for name in mine) for node, mine in wanted.items()}
    total = sum(sizes.values())
    if shutil.disk_usage(run).free < total:
        raise RunError(f"{run}: {total / 1e9:.1f} GB are needed here for the parts of checkpoint-{whole.step}")
    say(f"checkpoint-{whole.step}: fetching its parts from {', '.join(map(str, wanted))} ({total / 1e6:,.1f} MB)")

    def work(session: Session) -> int:
        host, shown = str(session.node), Progress(str(session.node))
        mine = " ".join(map(shlex.quote, wanted[session.node]))
        program = (f"{entered(host, known)} && cd {shlex.quote(str(run))}/checkpoints/checkpoint-{whole.step} || exit; "
                   f"echo '{MARK}'{sizes[session.node]}; tar -cf - -- {mine}; echo {END}$?")
        try:
            return unpacked(session, program, folder, shown)
        finally:
            shown.close()

    for node, result in on_all(list(wanted), access, work, at_once=1).items():  # one bar at a time
        if isinstance(result, SshError):
            raise RunError(f"{node}: {result}")


def tar_size(sizes: Sequence[int]) -> int:
    """Return the bytes of a tar of files of these sizes, whose names are short."""
    blocks = sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes) + 2 * BLOCK
    return -(-blocks // RECORD) * RECORD


class _Sink:
    """A channel as the file that tarfile writes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def write(self, data: bytes) -> int:
        self._channel.send(data)
        return len(data)


def _send(run: Path, whole: Whole, known: Mapping[str, Any], access: Access, lacking: Mapping[str, Sequence[str]],
          newer: Sequence[int], scratch: Path) -> None:
    """Send each host what it lacks and the seal of the whole, last; with the metrics, if it has fewer.

    What there is of newer checkpoints loses its seal. A checkpoint that is cut off on its way has none.
    """
    step, place = f"checkpoint-{whole.step}", shlex.quote(str(run))
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / METRICS).write_bytes((run / METRICS).read_bytes() if (run / METRICS).exists() else b"")
    (scratch / step).mkdir(exist_ok=True)
    write_whole(scratch / step / SEAL, whole.seal)
    hosts = [host for host, names in lacking.items() if names]
    say(f"{step}: sending " + (f"what they lack of it to {', '.join(hosts)}" if hosts else "its seal"))
    unsealed = "".join(f"rm -f checkpoints/checkpoint-{other}/{SEAL}; " for other in newer)

    def work(session: Session) -> None:
        host, coming = str(session.node), shlex.quote(f"{METRICS}-{session.node}")
        members = [METRICS, *(f"{step}/{name}" for name in lacking[host]), f"{step}/{SEAL}"]
        size = tar_size([(scratch / name).stat().st_size for name in members])
        clear = f"rm -rf checkpoints/{step}" if len(lacking[host]) == len(whole.files) else ":"
        program = " && ".join([
            entered(host, known), f"mkdir -p {place}/checkpoints", f"cd {place}", f"{{ {unsealed}:; }}", clear,
            f"rm -f checkpoints/{step}/{SEAL}", f"head -c {size} | tar -xf - -C checkpoints",
            f"mv checkpoints/{METRICS} {coming}",
            f"if [ $(wc -c < {coming}) -gt $(cat {METRICS} 2>/dev/null | wc -c) ]; "
            f"then mv -f {coming} {METRICS}; else rm -f {coming}; fi"])
        with contextlib.closing(session.open(f"exec sh -c {shlex.quote(f'{program}; echo {END}$?')}")) as channel:
            with tarfile.open(fileobj=cast(IO[bytes], _Sink(channel)), mode="w|", format=tarfile.GNU_FORMAT) as archive:
                for name in members:
                    archive.add(scratch / name, name)
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
