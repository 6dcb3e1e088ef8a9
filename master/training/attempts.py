"""A training's attempts: the first start, and after a failure as many more as are wanted, on the hosts that are there.

A restart waits for all hosts. With --min-hosts it continues after --patience seconds with those that answer, and uses
the others again at the next restart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from master.core.terminal import listed, say
from master.diagnosis.run_history import EVENTS, HOSTS, measured_hosts, noting
from master.inventory.cluster_file import known_by_name, read_cluster
from master.inventory.hostfile import Slots, read_hostfile
from master.run.command_record import RECORD as COMMAND
from master.run.command_record import own_command, write_command
from master.run.launcher_process import LOCK, RECORD, survive_hangup, write_launcher_record
from master.run.run_folder import RunError, save_hosts
from master.ssh.node_names import parse_node
from master.ssh.options import host_key_prompt
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import run_on_all
from master.training.cluster_run import Training
from master.training.conclusion import conclude
from master.training.job import JobResult
from master.training.rank_output import RankOutput
from master.training.request import TrainingRequest, on_hosts
from master.training.supervisor import ClusterJob
from master.training.takeover import RECORD as JOB
from master.training.takeover import forget_job

RESTART_WAIT = 300.0  # seconds that a restart waits for the hosts to be back
TRY_EVERY = 10.0


def train(request: TrainingRequest, ssh: SshOptions) -> int:
    """Train and return 0, 1 on a fault, 2 if the ranks can't take their flags. Raises UsageError."""
    training = Training(request)
    restarts = request.supervision.restarts
    write_launcher_record(training.run)
    record(training)
    survive_hangup(training.run)
    for attempt in range(restarts + 1):
        if attempt:
            noting(training.run)(f"restart {attempt} of {restarts}: from the newest checkpoint that every host has")
            training, result = start_again(request, training, ssh)
        else:
            result = run_once(training, ssh)
        if result is None:
            say("stopped: nothing was started" if training.stopped else "nothing was started")
            if not attempt:
                _forget(training)
            return 1
        forget_job(training.run, result)
        code = conclude(training.place, result, ssh)
        if code == 0 or result.asked_to_stop or result.is_unknown:
            return code
    return code


def with_whole_checkpoint(request: TrainingRequest, before: Path, ssh: SshOptions) -> TrainingRequest:
    """Return the request with its hosts holding all of the resumed run's checkpoint, whose path is passed to the ranks.

    `before` is the hostfile that it ran on. Raises RunError where the checkpoint can't be had.
    """
    from master.run.checkpoint_transfer import gather_and_send

    hosts = read_hostfile(before)
    known = known_by_name(read_cluster(before.with_name("cluster.json")))
    if own_command(before.parent) is None:  # nobody is asked whom the user didn't name
        known = {}
        if unnamed := {host.host for host in hosts} - {host.host for host in request.hosts.slots}:
            say(f"{before} is not this machine's own: {', '.join(sorted(unnamed))} won't be asked for shards")
            return request
    known = {**known, **request.hosts.known}
    if not (found := gather_and_send(request.run, hosts, request.hosts.slots, known, ssh)):
        return request
    return replace(request, arguments=(*request.arguments, "--resume_from_checkpoint", str(found)))


def is_possible(request: TrainingRequest, ssh: SshOptions) -> bool:
    """Return whether a training could start now, after telling what prevents it; nothing is started or kept."""
    before, answers = [path.exists() for path in (request.run, request.run.parent)], list[bool]()
    training = Training(request)

    def look(facts: dict[str, dict[str, Any]], unreached: dict[str, SshError]) -> None:
        answers.append(training.is_ready(facts, unreached))

    job = ClusterJob(training.parts, ssh, training.new_name(), request.supervision, training.run,
                     RankOutput(training.run), say)
    try:
        job.start(training.wanted(), look, host_key_prompt())
    finally:
        (training.run / f".{training.name}").unlink(missing_ok=True)
        if not before[0]:
            _forget(training)
        if not before[1]:
            request.run.parent.rmdir()
    return answers == [True]


def record(training: Training) -> None:
    """Write which hosts train, and with which flags, into the run folder: `--resume`, watch and stop read it."""
    save_hosts(training.run, training.request.hosts.slots, training.request.hosts.cluster)
    if training.request.is_ours:
        write_command(training.run, training.request.arguments)


def run_once(training: Training, ssh: SshOptions) -> JobResult | None:
    """Run the job to its end; None if it couldn't begin."""
    name = training.new_name()
    job = ClusterJob(training.parts, ssh, name, training.request.supervision, training.run, RankOutput(training.run),
                     noting(training.run))
    pythons = {str(part.node): part.place.python for part in training.parts}
    try:
        with measured_hosts(training.run, pythons, job.sessions):
            return job.start(training.wanted(), training.approve, host_key_prompt())
    finally:
        training.stopped = job.stop_requested
        (training.run / f".{name}").unlink(missing_ok=True)


def start_again(request: TrainingRequest, last: Training, ssh: SshOptions) -> tuple[Training, JobResult | None]:
    """Run the job once more, as soon as its hosts are there, and return how it ended; None if they don't come back."""
    began, missed = time.monotonic(), set[str]()
    training = last
    while True:
        waited = time.monotonic() - began
        absent = unreachable(request, ssh)
        away = {host.host for host in request.hosts.slots} & (set(absent) | training.failing)
        slots = left_over(request, away) if away and waited >= request.supervision.patience else None
        if slots is None and not absent:
            slots = list(request.hosts.slots)
        elif slots is None and set(absent) != missed:
            missed = set(absent)
            noting(request.run)(f"waiting for {'; '.join(map(str, absent.values()))}")
        if slots is not None:
            if len(slots) < len(request.hosts.slots):
                noting(request.run)(f"continuing without {listed(sorted(away))}, which the next restart uses again")
            training, result = try_on(slots, request, last, ssh)
            if result is not None or training.stopped:
                return training, result
        if waited >= RESTART_WAIT:
            return training, None
        time.sleep(TRY_EVERY)


def unreachable(request: TrainingRequest, ssh: SshOptions) -> dict[str, SshError]:
    """Return why hosts of a training can't be reached now."""
    found = run_on_all([parse_node(host.host) for host in request.hosts.slots], ssh, lambda session: None)
    return {str(node): error for node, error in found.items() if isinstance(error, SshError)}


def left_over(request: TrainingRequest, away: set[str]) -> list[Slots] | None:
    """Return the hosts that continue without those that are `away`, None where that is not wanted."""
    left = [host for host in request.hosts.slots if host.host not in away]
    return left if request.supervision.min_hosts and len(left) >= request.supervision.min_hosts else None


def try_on(slots: Sequence[Slots], request: TrainingRequest, last: Training, ssh: SshOptions
           ) -> tuple[Training, JobResult | None]:
    """Run the job on these hosts, from the newest checkpoint; those that have changed get its shards first."""
    before = last.request.hosts
    resume = ["--resume_from_checkpoint", "auto"] if request.is_ours else []
    training = Training(on_hosts(request, slots), resume)
    if [host.host for host in slots] != [host.host for host in before.slots]:
        from master.run.checkpoint_transfer import gather_and_send

        try:
            found = gather_and_send(request.run, before.slots, slots, training.known, ssh, may_lose=True)
        except RunError as error:
            say(str(error))
            return training, None
        training.resume = ["--resume_from_checkpoint", str(found)] if found else resume
        record(training)
    return training, run_once(training, ssh)


def _forget(training: Training) -> None:
    """Remove the folder of a run that never began."""
    run = training.run
    if any((run / name).exists() for name in ("run.json", "metrics.jsonl")):
        return
    for name in (RECORD, LOCK, COMMAND, JOB, EVENTS, HOSTS, "hostfile.txt", "cluster.json"):
        (run / name).unlink(missing_ok=True)
    for folder in (run / "logs", run):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
