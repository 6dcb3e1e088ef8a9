"""A job whose launcher has ended, supervised by a new one: RUN/job.json says what a new process must know.

    invoke watch RUN          starts this by itself where hosts still train
    python master/launch_training.py --attach RUN

The record is signed as command.json is: only a job that this user started on this machine is taken over.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from master.core.atomic_write import write_atomically
from master.core.terminal import say
from master.inventory.cluster_file import known_by_name, read_cluster, with_logins
from master.inventory.hostfile import read_hostfile
from master.inventory.node_facts import checkout_of
from master.run.command_record import is_signed, signature
from master.run.launcher_process import JOB, ensure_not_running, read_object, survive_hangup, write_launcher_record
from master.run.run_folder import RunError
from master.ssh.node_names import parse_node
from master.ssh.options import host_key_prompt
from master.ssh.route import SshOptions
from master.training.conclusion import conclude
from master.training.job import HostAssignment, RunPlace, Supervision
from master.training.rank_output import RankOutput
from master.training.supervisor import ClusterJob

RECORD = "job.json"


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


def can_take_over(run: Path) -> bool:
    """Return whether a run has a job that may still be training without a launcher."""
    try:
        return bool(JOB.fullmatch(read_job_record(run)["job"]))
    except RunError:
        return False


def take_over(run: Path, ssh: SshOptions) -> int:
    """Supervise a run's job to its end; return the exit code as `train` does. Raises RunError, RunningError."""
    ensure_not_running(run)
    record = read_job_record(run)
    cluster = read_cluster(run / "cluster.json")
    known = known_by_name(cluster)
    parts = tuple(HostAssignment(parse_node(host.host), host.use, checkout_of(known.get(host.host, {})))
                  for host in read_hostfile(run / "hostfile.txt"))
    place = RunPlace(run, parts, record["folders"], record["is_here"], record["is_ours"])
    write_launcher_record(run, record["job"])
    survive_hangup(run)
    ssh = with_logins(ssh, cluster)
    supervision = Supervision(**record["supervision"])
    say(f"{run}: connecting to its {len(parts)} host{'s' * (len(parts) > 1)}")
    job = ClusterJob(parts, ssh, record["job"], supervision, RankOutput(run), say)
    result = job.attach(record["follows"], host_key_prompt())
    assert result is not None
    return conclude(place, result, ssh)
