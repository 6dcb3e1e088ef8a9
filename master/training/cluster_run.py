"""What a training needs to start: each host's facts, the preflight check, and the job for run_node.py.

attempts.py starts it; supervisor.py runs the job, conclusion.py says how it ended.
"""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from master.core.paths import ROOT, WORKER
from master.core.run_cli import UsageError
from master.core.terminal import say
from master.inventory.addresses import own_address_towards
from master.inventory.node_facts import local_facts, start_folder
from master.inventory.preflight import NodeProblem, gpu_problems, node_problems, torch_problems
from master.inventory.worker_script import source
from master.run.launcher_process import make_private, write_launcher_record
from master.run.run_folder import job_prefix
from master.ssh.route import SshError
from master.training.job import RunPlace, assignments
from master.training.request import TrainingRequest
from master.training.takeover import write_job_record


class Training:
    """What runs where; the hosts' facts decide the rest. `resume`: the trainer's flags of a restart."""

    def __init__(self, request: TrainingRequest, resume: Sequence[str] = ()) -> None:
        self.request, self.resume = request, resume
        self.known = request.hosts.known
        self.variables = {**request.environment, "LANSPEED_PLAIN": request.plain_command}
        self.run = request.run
        self.stopped = False  # somebody asked for the end before it began
        self.failing: set[str] = set()  # hosts that prevented the start
        self.name = self.new_name()
        self.parts = assignments(request.hosts.slots, self.known)
        self.place = RunPlace(self.run, self.parts, {}, is_here=False, is_ours=request.is_ours)

    def new_name(self) -> str:
        """Give the job a name that no other has, and return it."""
        self.name = f"{job_prefix(self.run)}-{secrets.token_hex(3)}"
        return self.name

    def wanted(self) -> dict[str, Any]:
        """Return what each node is asked: do these paths exist, is the port free, does it see this folder?"""
        mark = self.run.absolute() / f".{self.name}"
        make_private(self.run)
        mark.touch()
        hosts = self.request.hosts
        gpus = hosts.slots[0].vendor != "CPU" and hosts.hostfile is not None  # else PyTorch was asked here already
        return {"gpus": gpus, "torch": gpus, "paths": self.request.files, "port": self.request.master_port,
                "marks": [str(Path.cwd()), str(mark)]}

    def approve(self, facts: dict[str, dict[str, Any]], unreached: dict[str, SshError]) -> dict[str, Any] | None:
        """Return the job, or None after telling what prevents it."""
        mark = self.run.absolute() / f".{self.name}"
        mark.unlink(missing_ok=True)
        if not self.is_ready(facts, unreached):
            return None
        first = str(self.parts[0].node)
        address = self._address(facts[first])
        port = self.request.master_port or facts[first]["port"]
        write_launcher_record(self.run, self.name)
        self._announce(facts, address, port)
        folders = {str(part.node): start_folder(facts[str(part.node)], part.place) for part in self.parts}
        self.place = replace(self.place, folders=folders, is_here=str(mark) in facts[first]["there"])
        follow = None if self.place.is_here else str(self.run / "metrics.jsonl")
        write_job_record(self.place, self.name, self.request.supervision, follow is not None)
        return {"world": {str(part.node): list(part.slots) for part in self.parts}, "master_addr": address,
                "master_port": port, "secret": secrets.token_hex(32),
                "observer": source(WORKER / "observe_rank.py").decode(),
                "environment": self.variables, "arguments": [*self.request.arguments, *self.resume],
                "sent": dict(self.request.sent),
                "continue_without_master": self.request.supervision.survives_master,
                "no_local_rank": self.request.no_local_rank, "module": self.request.is_module,
                "run": None if self.request.is_ours else str(self.run),
                "follow": follow, "folders": folders, "checkpoints": str(self.run / "checkpoints"),
                "logs": {str(part.node): str(self.run / "logs" / f"{part.node}.log") for part in self.parts},
                "scripts": {str(part.node): part.place.translate_path(str(self.request.script)) for part in self.parts}}

    def is_ready(self, facts: dict[str, dict[str, Any]], unreached: dict[str, SshError]) -> bool:
        """Return whether nothing prevents the training, after telling what does."""
        found: list[NodeProblem | SshError] = [*unreached.values()]
        found += node_problems(facts, local_facts({"folder": str(ROOT)}))
        found += [reason for part in self.parts if (gpus := facts.get(str(part.node), {}).get("gpus"))
                  for reason in gpu_problems(str(part.node), part.slots, gpus)]
        found += [reason for part in self.parts if (torch := facts.get(str(part.node), {}).get("torch"))
                  for reason in torch_problems(str(part.node), part.slots, torch)]
        for host, each in facts.items():  # it may have been started from elsewhere, or outlived its launcher
            mine = [job for job in each["jobs"] if re.fullmatch(re.escape(job_prefix(self.run)) + "-[0-9a-f]{6}", job)]
            found += [NodeProblem(host, f"{job} is still running there: invoke stop {shlex.quote(str(self.run))}")
                      for job in mine]
        self.failing = {problem.host for problem in found}
        for problem in found:
            say(str(problem))
        return not found

    def _address(self, facts: dict[str, Any]) -> str:
        """Return rank 0's address for the others: from cluster.json, as it was reached, or this machine's."""
        if len(self.parts) == 1:
            return "127.0.0.1"
        known = self.known.get(str(self.parts[0].node), {}).get("address")
        if known or facts["address"]:
            return str(known or facts["address"])
        other = next(str(part.node.host) for part in self.parts if not part.node.is_local)
        own = own_address_towards(self.known.get(other, {}).get("address") or other)
        if own is None:
            raise UsageError(f"localhost comes first, and there is no route to {other}: put another host first")
        return own

    def _announce(self, facts: dict[str, dict[str, Any]], address: str, port: int) -> None:
        hosts = self.request.hosts
        kind = "CPU slot" if self.variables.get("DS_ACCELERATOR") == "cpu" else "slot"
        slots = f"{hosts.ranks} {kind}{'s' * (hosts.ranks > 1)}"
        where = ", ".join(f"{part.node} x {len(part.slots)}" for part in self.parts)
        say(f"training on this machine: {slots}" if hosts.are_here else
            f"training on {len(self.parts)} host{'s' * (len(self.parts) > 1)}, {slots} ({where}), rank 0 at "
            f"{address}:{port}")
        for host, each in facts.items():
            if each["jobs"]:
                say(f"{host}: also runs {', '.join(each['jobs'])}")
            for slot, mib in (each["gpus"] or {"busy": {}})["busy"].items():
                say(f"{host}: other programs hold {mib / 1024:.1f} GiB on slot {slot}")
