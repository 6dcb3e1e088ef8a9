"""Where every rank of a running job is now: `invoke watch --stacks`, which disturbs nothing.

    python master/watch_training.py runs/20261124-020457-tiny --stacks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from master.core.terminal import print_lines, say
from master.diagnosis.hang_report import HostAnswer, ask, explain
from master.inventory.cluster_file import known_by_name, read_cluster, with_logins
from master.inventory.hostfile import read_hostfile
from master.run.launcher_process import read_launcher_record
from master.run.run_folder import RunError
from master.ssh.options import host_key_prompt, ssh_options
from master.ssh.route import SshError
from master.ssh.run_on_all import run_on_all
from master.ssh.session import Session
from master.training.job import assignments, ranks_by_host


def show_stacks(run: Path, options: argparse.Namespace) -> int:
    """Print where each rank of a run is, and keep all stacks in the run folder; return 0, 1 if a host can't be asked.

    Raises RunError for a run that has no job.
    """
    job = read_launcher_record(run).job
    if job is None or not (run / "hostfile.txt").exists():
        raise RunError(f"{run}: nothing of it was started from here: no ranks to look at")
    cluster = read_cluster(run / "cluster.json")
    parts = assignments(read_hostfile(run / "hostfile.txt"), known_by_name(cluster))
    pythons = {str(part.node): part.place.python for part in parts}

    def work(session: Session) -> HostAnswer:
        return ask(session, pythons[str(session.node)], job)

    found = run_on_all([part.node for part in parts], with_logins(ssh_options(options), cluster), work,
                       host_key_prompt())
    answers = {str(node): answer for node, answer in found.items()}
    if all(isinstance(answer, HostAnswer) and not answer.state.ranks for answer in answers.values()):
        raise RunError(f"{run}: none of its ranks is running")
    report = explain(answers, ranks_by_host(parts))
    if options.json:
        print(json.dumps(report.record(), indent=1))
    else:
        print_lines(*report.lines())
        say(f"all stacks: {report.keep(run)}")
    return int(any(isinstance(answer, SshError) for answer in answers.values()))
