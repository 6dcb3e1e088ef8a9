"""A job whose launcher has ended, supervised by a new one: RUN/job.json says what a new process must know.

    invoke watch RUN          starts this by itself where hosts still train
    python master/launch_training.py --attach RUN

The record is signed as command.json is: only a job that this user started on this machine is taken over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from master.core.atomic_write import write_atomically
from master.core.paths import ROOT
from master.core.terminal import say
from master.diagnosis.run_history import measured_hosts, noting
from master.inventory.cluster_file import known_by_name, read_cluster, with_logins
from master.inventory.hostfile import read_hostfile
from master.run.command_record import is_signed, signature
from master.run.launcher_process import (
    ensure_not_running,
    read_launcher_record,
    read_object,
    survive_hangup,
    write_launcher_record,
)
from master.run.run_folder import RunError
from master.ssh.options import ssh_flags
from master.ssh.route import SshOptions
from master.training.conclusion import conclude
from master.training.job import JobResult, RunPlace, Supervision, assignments
from master.training.rank_output import RankOutput
from master.training.supervisor import ClusterJob

RECORD = "job.json"
START_S = 10.0  # seconds in which a new launcher has found its feet


def write_job_record(place: RunPlace, name: str, supervision: Supervision, follows: bool) -> None:
    """Record a job that starts, for whoever takes it over. Raises OSError."""
    text = json.dumps({"job": name, "folders": dict(place.folders), "is_here": place.is_here, "is_ours": place.is_ours,
                       "follows": follows, "supervision": asdict(supervision)})
    write_atomically(place.run / RECORD, json.dumps({"record": text, "signature": signature(text)}) + "\n")


def read_job_record(run: Path) -> dict[str, Any]:
    """Return the record of a run's last job. Raises RunError if there is none, or none of this user's."""
    found = read_object(run / RECORD)
    text = found.get("record")
    try:
        if isinstance(text, str) and is_signed(text, found.get("signature")):
            record: dict[str, Any] = json.loads(text)
            return record
    except OSError:
        pass
    raise RunError(f"{run} was not started by lanspeed on this machine: no job to connect to")


def is_abandoned(run: Path) -> bool:
    """Return whether a run has a job that this machine started, and that may still be training without a launcher."""
    launcher = read_launcher_record(run)
    if launcher.is_alive_here or launcher.is_elsewhere:
        return False
    try:
        return bool(read_job_record(run))
    except RunError:
        return False


def take_over_in_background(run: Path, options: argparse.Namespace) -> None:
    """Start a process that supervises a run whose launcher has ended, and return once it does. `options`: of ssh."""
    say(f"{run}: its launcher has ended; connecting to its hosts")
    command = [sys.executable, str(ROOT / "master" / "launch_training.py"), "--attach", str(run), "--detach",
               *ssh_flags(options)]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + START_S
    while is_abandoned(run) and time.monotonic() < end:
        time.sleep(0.1)


def forget_job(run: Path, result: JobResult) -> None:
    """Remove the record of a job that has ended on all of its hosts."""
    if not result.lost_hosts:
        (run / RECORD).unlink(missing_ok=True)


def take_over(run: Path, ssh: SshOptions) -> int:
    """Supervise a run's job to its end; return the exit code as `train` does. Raises RunError, RunningError."""
    ensure_not_running(run)
    record = read_job_record(run)
    cluster = read_cluster(run / "cluster.json")
    parts = assignments(read_hostfile(run / "hostfile.txt"), known_by_name(cluster))
    place = RunPlace(run, parts, record["folders"], record["is_here"], record["is_ours"])
    write_launcher_record(run, record["job"])
    survive_hangup(run)
    ssh = with_logins(ssh, cluster)
    try:
        supervision = Supervision(**record["supervision"])
    except TypeError:
        raise RunError(f"{run}: its job was started by another version of lanspeed") from None
    say(f"{run}: connecting to its {len(parts)} host{'s' * (len(parts) > 1)}")
    job = ClusterJob(parts, ssh, record["job"], supervision, run, RankOutput(run), noting(run))
    with measured_hosts(run, {str(part.node): part.place.python for part in parts}, job.sessions):
        result = job.attach(record["follows"])
    assert result is not None
    forget_job(run, result)
    return conclude(place, result, ssh)
