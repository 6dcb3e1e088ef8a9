"""A checkpoint whose shards are on several hosts, gathered and copied to others so that a run can resume there.

Each rank has written its part of the optimizer's states to its own host's disk. With other hosts, or another number of
slots, every host needs all parts: they are fetched here from where they are, and sent to whoever lacks some.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from master.core.atomic_write import write_atomically
from master.core.terminal import say
from master.inventory.hostfile import Slots
from master.inventory.node_facts import checkout_of, query_facts, start_folder
from master.run.fetch_run import END, MARK, Fetched, Progress, unpack_stream
from master.run.merged_checkpoint import (
    MANIFEST_MARK,
    STAGE_FILE,
    Manifests,
    MergedCheckpoint,
    given,
    missing_files,
    newest_complete,
    read_manifests,
)
from master.run.outgoing_archive import archive_to, tar_size
from master.run.run_folder import RunError, job_prefix
from master.ssh.node_names import Node, parse_node
from master.ssh.options import host_key_prompt
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import run_on_all
from master.ssh.session import OUTPUT_LIMIT, Session

MANIFEST = "complete.json"
SCRATCH = ".gathered"  # in the run folder
METRICS, STILL_RUNNING = "metrics.jsonl", "@@GOES_ON"
PATIENCE = 600.0  # seconds for a host to put away what it was sent


@dataclass(frozen=True)
class HostView:
    """What a host has of a run: the folder where its ranks start, whether it is running, checkpoints' manifests."""

    start: str
    is_running: bool
    manifests: Manifests


def gather_and_send(run: Path, before: Sequence[Slots], now: Sequence[Slots], known: Mapping[str, Any],
                    ssh: SshOptions, may_lose: bool = False) -> Path | None:
    """Have every host that trains `now` hold the newest whole checkpoint of a run that `before` trained.

    `known` has what cluster.json says of each host; `may_lose`: a newer checkpoint, parts of which are on hosts that
    can't be reached. Return the checkpoint's path, None where there is nothing to do. Raises RunError where parts are
    missing or can't be moved.
    """
    if [(host.host, host.use) for host in before] == [(host.host, host.use) for host in now]:
        return None
    views, unreached = _ask(run, list(dict.fromkeys([host.host for host in (*before, *now)])), known, ssh)
    manifests = {host: view.manifests for host, view in views.items()}
    merged = newest_complete(manifests)
    newer = sorted({step for each in manifests.values() for step in each if merged is None or step > merged.step})
    if merged is None or (newer and unreached and not may_lose) or any(host.host not in views for host in now):
        why = "; ".join(unreached) or "no host has a complete one"
        raise RunError(f"{run}: the checkpoint's shards can't be copied to other hosts or slots: {why}")
    if newer:
        say(f"checkpoint-{newer[-1]} is incomplete: checkpoint-{merged.step} is the newest complete one")
    there = given(manifests, [host.host for host in now], merged)
    lacking = {host.host: names for host in now
               if (names := missing_files(manifests[host.host].get(merged.step), merged, there))}
    scratch = run / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        if lacking:
            _fetch(run, merged, views, ssh, {name for names in lacking.values() for name in names}, scratch)
        if lacking or newer or now[0].host != before[0].host:  # rank 0's host has the metrics
            each = {host.host: lacking.get(host.host, []) for host in now}
            _send_in_turn(run, merged, views, ssh, each, newer, known, there)
    except (OSError, tarfile.TarError) as error:
        raise RunError(f"{run}: checkpoint-{merged.step} can't be gathered: {error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return run / "checkpoints" / f"checkpoint-{merged.step}"


def _ask(run: Path, names: Sequence[str], known: Mapping[str, Any], ssh: SshOptions
         ) -> tuple[dict[str, HostView], list[str]]:
    """Return what each host has of the run, and why others can't be asked. Raises RunError if it runs there."""
    job = shlex.quote(f"^LANSPEED_JOB={re.escape(job_prefix(run))}-")  # -z: a variable's beginning, as environ has them
    program = (f"grep -zqs {job} /proc/[0-9]*/environ && echo {STILL_RUNNING}; "
               f"for manifest in {shlex.quote(str(run))}/checkpoints/checkpoint-*/{MANIFEST}; do "
               f'[ -f "$manifest" ] && echo "{MANIFEST_MARK}" && cat "$manifest"; done; exit 0')

    def work(session: Session) -> HostView:
        checkout = checkout_of(known.get(str(session.node), {}))
        start = start_folder(query_facts(session, checkout, {"marks": [str(Path.cwd())]}), checkout)
        words = f"cd {shlex.quote(start)} && {{ {program}; }}"
        said = session.run(f"exec sh -c {shlex.quote(words)}", timeout=120).out
        return HostView(start, STILL_RUNNING in said.splitlines(), read_manifests(said))

    results = run_on_all([parse_node(name) for name in names], ssh, work, host_key_prompt())
    good = {str(node): result for node, result in results.items() if isinstance(result, HostView)}
    for host, view in good.items():
        if view.is_running:
            raise RunError(f"{host}: the run is still running there: invoke stop {shlex.quote(str(run))}")
    return good, [str(result) for result in results.values() if isinstance(result, SshError)]


def _fetch(run: Path, merged: MergedCheckpoint, views: Mapping[str, HostView], ssh: SshOptions, names: set[str],
           scratch: Path) -> None:
    """Fetch files, each from a host that has it."""
    folder = scratch / f"checkpoint-{merged.step}"
    wanted: dict[Node, list[str]] = {}
    for name in sorted(names):
        wanted.setdefault(parse_node(merged.files[name][0]), []).append(name)
    sizes = {node: sum(merged.files[name][1][0] for name in mine) for node, mine in wanted.items()}
    if shutil.disk_usage(run).free < (total := sum(sizes.values())):
        raise RunError(f"{run}: {total / 1e9:.1f} GB are needed here for the shards of checkpoint-{merged.step}")
    say(f"checkpoint-{merged.step}: fetching its shards from {', '.join(map(str, wanted))} ({total / 1e6:,.1f} MB)")

    def work(session: Session) -> Fetched:
        shown = Progress(str(session.node))
        mine = " ".join(map(shlex.quote, wanted[session.node]))
        program = (f"cd {shlex.quote(views[str(session.node)].start)} && "
                   f"cd {shlex.quote(str(run))}/checkpoints/checkpoint-{merged.step} || exit; "
                   f"echo '{MARK}'{sizes[session.node]}; tar -cf - -- {mine}; echo {END}$?")
        try:
            return unpack_stream(session, program, folder, shown, wanted[session.node])
        finally:
            shown.close()

    for node, result in run_on_all(list(wanted), ssh, work, at_once=1).items():  # one bar at a time
        if isinstance(result, SshError):
            raise RunError(f"{node}: {result}")


def _send_in_turn(run: Path, merged: MergedCheckpoint, views: Mapping[str, HostView], ssh: SshOptions,
                  lacking: Mapping[str, Sequence[str]], newer: Sequence[int], known: Mapping[str, Any],
                  there: set[str]) -> None:
    """Send each host what it lacks; first to one of them: the others may see the same disk, and then lack nothing.

    `there`: what ranks give each other; with it, what the first one was sent.
    """
    first, *others = sorted(lacking, key=lambda host: -len(lacking[host]))
    _send(run, merged, views, ssh, {first: lacking[first]}, newer)
    if merged.is_split:
        there = there | {name for name in lacking[first] if STAGE_FILE.fullmatch(name)}
    again, _ = _ask(run, others, known, ssh) if others else ({}, [])
    left = {host: missing_files(view.manifests.get(merged.step), merged, there) if lacking[host] else lacking[host]
            for host, view in again.items()}
    if left:
        _send(run, merged, {**views, **again}, ssh, left, newer)


def _send(run: Path, merged: MergedCheckpoint, views: Mapping[str, HostView], ssh: SshOptions,
          lacking: Mapping[str, Sequence[str]], newer: Sequence[int]) -> None:
    """Send each host the files it is missing and, last, the manifest of what it has; also the metrics, if it has fewer.

    Newer, incomplete checkpoints lose their manifest. A checkpoint that was only partly copied has none.
    """
    step, place, scratch = f"checkpoint-{merged.step}", shlex.quote(str(run)), run / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / METRICS).write_bytes((run / METRICS).read_bytes() if (run / METRICS).exists() else b"")
    (scratch / step).mkdir(exist_ok=True)
    for host, names in lacking.items():
        own = views[host].manifests.get(merged.step)
        others = set(missing_files(own, merged)) - set(names)
        write_atomically(scratch / step / f"{MANIFEST}-{host}", merged.manifest(without=others))
    hosts = [host for host, names in lacking.items() if names]
    say(f"{step}: sending " + (f"missing files to {', '.join(hosts)}" if hosts else "its manifest"))
    unsealed = "".join(f"rm -f checkpoints/checkpoint-{other}/{MANIFEST}; " for other in newer)

    def work(session: Session) -> None:
        host, coming = str(session.node), shlex.quote(f"{METRICS}-{session.node}")
        last = f"{step}/{MANIFEST}"
        files = {name: scratch / name for name in (METRICS, *(f"{step}/{name}" for name in lacking[host]))}
        files[last] = scratch / f"{last}-{host}"
        size = tar_size([path.stat().st_size for path in files.values()])
        own = views[host].manifests.get(merged.step)
        clear = ":" if own and own["layout"] == merged.layout else f"rm -rf checkpoints/{step}"
        program = " && ".join([
            f"cd {shlex.quote(views[host].start)}", f"mkdir -p {place}/checkpoints", f"cd {place}",
            f"{{ {unsealed}:; }}", clear, f"rm -f checkpoints/{step}/{MANIFEST}",
            f"head -c {size} | tar -xf - -C checkpoints", f"mv checkpoints/{METRICS} {coming}",
            f"if [ $(wc -c < {coming}) -gt $(cat {METRICS} 2>/dev/null | wc -c) ]; "
            f"then mv -f {coming} {METRICS}; else rm -f {coming}; fi"])
        with contextlib.closing(session.open(f"exec sh -c {shlex.quote(f'{program}; echo {END}$?')}")) as channel:
            with archive_to(channel) as archive:
                for name, path in files.items():
                    archive.add(path, name)
            said = b""
            while (END.encode() not in said or not said.endswith(b"\n")) and (block := channel.receive(PATIENCE)):
                said = (said + block)[-OUTPUT_LIMIT:]
            if f"{END}0".encode() not in said:
                raise SshError(host, "checkpoint", channel.stderr_tail()[-200:] or "it didn't arrive")

    for node, result in run_on_all([parse_node(host) for host in lacking], ssh, work).items():
        if isinstance(result, SshError):
            raise RunError(f"{node}: {result}")
