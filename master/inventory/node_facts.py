"""Each node's facts, from the Python that will train there, and what prevents a start.

`worker/describe_node.py` answers; `node_problems` compares the answers with this machine's.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from master.core.paths import ROOT, WORKER
from master.inventory.gpu_query import query_gpus
from master.ssh.route import SshError
from master.ssh.session import Session

MARK = "@@NODE_FACTS "
NOT_FOUND = (126, 127)  # what a shell says of a program that isn't there, or isn't one
MIN_FREE_BYTES = 2 << 30  # bytes
BUSY_MIB = 1024  # MiB held on a GPU by other programs, from which it is reported: a desktop takes less


@dataclass(frozen=True)
class RemoteCheckout:
    """Where lanspeed lives on a node: the folder of the checkout, the Python that trains, paths (here, there)."""

    folder: str
    python: str
    paths: tuple[tuple[str, str], ...] = ()

    def translate_path(self, word: str) -> str:
        """Return a word of a command as the node has it: this machine's paths become the node's."""
        head, equals, tail = word.partition("=") if word.startswith("--") else ("", "", word)
        for local_facts, there in sorted([*self.paths, (str(ROOT), self.folder)], key=lambda pair: -len(pair[0])):
            if tail == local_facts or tail.startswith(local_facts + "/"):
                return head + equals + there + tail[len(local_facts) :]
        return word


def checkout_of(known: Mapping[str, Any]) -> RemoteCheckout:
    """Return a host's place by what cluster.json says of it; this machine's path where it says nothing."""
    return RemoteCheckout(known.get("dir") or str(ROOT), known.get("python") or sys.executable,
                          tuple(known.get("paths", {}).items()))


@dataclass(frozen=True)
class NodeProblem:
    """What prevents a start on one host, and how to fix it."""

    host: str
    text: str

    def __str__(self) -> str:
        return f"{self.host}: {self.text}"


def stdin_loader(script: Path) -> str:
    """Return the words after PYTHON that run a script sent over standard input and leave the rest of the input to it.

    Not `python3 -`, which reads to the end of the input.
    """
    size = len(script.read_bytes())
    program = f'import os;d=b"";exec("while len(d)<{size}:d+=os.read(0,{size}-len(d)) or os._exit(1)");exec(d)'
    return f"-u -c {shlex.quote(program)}"


def query_facts(session: Session, place: RemoteCheckout, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node's facts; raise SshError with the fix where they can't be had.

    Paths in `wanted`, and those that are missing there, are this machine's.
    """
    paths = {place.translate_path(path): path for path in wanted.get("paths", [])}
    words = json.dumps({"folder": place.folder, **wanted, "paths": list(paths)})
    command = f"exec {shlex.quote(place.python)} {stdin_loader(WORKER / 'describe_node.py')} {shlex.quote(words)}"
    done = session.run(command, (WORKER / "describe_node.py").read_bytes())
    host = str(session.node)
    for line in done.out.splitlines():
        if line.startswith(MARK):
            facts: dict[str, Any] = json.loads(line[len(MARK) :])
            if "content" in facts:
                facts["content"] = {paths.get(path, path): value for path, value in facts["content"].items()}
            return {**facts, "missing": [paths.get(path, path) for path in facts["missing"]]}
    if done.code in NOT_FOUND:
        raise SshError(host, "Python", f"no {place.python} there",
                       "invoke sync brings lanspeed and its environment there")
    said = (done.err.strip().splitlines() or ["it printed nothing"])[-1]
    raise SshError(host, "Python", f"{place.python} does not answer: {said[:200]}")


def query_gpu_use(session: Session) -> dict[str, Any]:
    """Return what a node's GPUs are like now: slots to use, slots that other programs hold (MiB), problems."""
    report = query_gpus(session).report
    busy = {str(gpu.index): gpu.busy_mib for gpu in report.usable if (gpu.busy_mib or 0) > BUSY_MIB}
    return {"vendor": report.vendor, "use": list(report.slots_use), "busy": busy,
            "problems": [problem.code for problem in report.problems if problem.is_fault]}


def gpu_problems(host: str, slots: Sequence[int], gpus: Mapping[str, Any]) -> list[NodeProblem]:
    """Return what is wrong with the slots that are to train on a host."""
    gone = [str(slot) for slot in slots if slot not in gpus["use"]]
    if not gone:
        return []
    why = f" ({', '.join(gpus['problems'])})" if gpus["problems"] else ""
    return [NodeProblem(host, f"slot {', '.join(gone)} can't be used now{why}: invoke detect there says more, "
                        "invoke hostfile writes a new hostfile")]


def torch_problems(host: str, slots: Sequence[int], torch: Mapping[str, Any]) -> list[NodeProblem]:
    """Return why the PyTorch of a host can't use these slots, by its own report (describe_node.py)."""
    version = f"torch {torch.get('version', '')}".strip()
    if not torch.get("built_for"):
        if "version" not in torch:
            return [NodeProblem(host, f"{torch['error']}: invoke sync")]
        return [NodeProblem(host, f"{version} there is built without GPUs: invoke sync")]
    if torch["error"] and not torch["devices"]:
        why = torch["error"].splitlines()[0]
        return [NodeProblem(host, f"{version} (for {torch['built_for']}) can't use the GPUs: {why}")]
    found = []
    for slot in slots:
        if slot >= len(torch["devices"]):
            found.append(NodeProblem(host, f"{version} finds {len(torch['devices'])} devices, not slot {slot}: is "
                                     "CUDA_VISIBLE_DEVICES set there?"))
        elif not runs_on(torch["archs"], torch["devices"][slot]["arch"]):
            device = torch["devices"][slot]
            found.append(NodeProblem(host, f"slot {slot} ({device['name']}, {device['arch']}): not supported by "
                                     f"{version} (built for {' '.join(torch['archs'])}): --exclude {host}:{slot}"))
    return found


def runs_on(archs: Sequence[str], device: str | None) -> bool:
    """Return whether code built for these architectures runs on a device; an unknown one is believed to.

    NVIDIA: binary code (sm_MN) runs on the same major version from that minor one on, PTX (compute_MN) on all later
    ones (CUDA C++ programming guide, "binary compatibility" and "PTX compatibility"). AMD: on the same name.
    """
    if not archs or not device:
        return True
    if not device.startswith("sm_"):
        return device in archs
    number = int(device[3:])
    for arch in archs:
        kind, _, digits = arch.partition("_")
        built = int("".join(filter(str.isdigit, digits)) or 0)
        if (kind == "compute" and built <= number) or (built // 10 == number // 10 and built <= number):
            return True
    return False


def load_worker(name: str) -> ModuleType:
    """Return a file of worker/ as a module of this process: both sides then work alike."""
    spec = importlib.util.spec_from_file_location(name, WORKER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def local_facts(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return this machine's facts, by the same file."""
    found: dict[str, Any] = load_worker("describe_node").describe(dict(wanted))
    return found


def version_problems(host: str, facts: Mapping[str, Any], own: Mapping[str, Any]) -> list[NodeProblem]:
    """Return which packages, or Python, a host has otherwise than this machine."""
    found = []
    for name, version in own["packages"].items():
        theirs = facts["packages"].get(name)
        if theirs is None:
            found.append(NodeProblem(host, f"{name} is not installed: invoke sync"))
        elif theirs.split("+")[0] != version.split("+")[0]:
            found.append(NodeProblem(host, f"{name} {theirs}, here {version}: invoke sync"))
    if facts["python"].split(".")[:2] != own["python"].split(".")[:2]:
        found.append(NodeProblem(host, f"Python {facts['python']}, here {own['python']}: invoke sync takes the same"))
    return found


def node_problems(answers: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any]) -> list[NodeProblem]:
    """Return what stops a start, host by host; `own` are this machine's facts, which the others must agree with."""
    found = []
    for host, facts in answers.items():
        if facts["code"] != own["code"]:
            what = "a different version of lanspeed's code" if facts["code"] else "no lanspeed"
            found.append(NodeProblem(host, f"{what} in the folder it trains in: invoke sync"))
        found += version_problems(host, facts, own)
        found += [NodeProblem(host, f"{path} is not there: invoke sync -- --with {path}") for path in facts["missing"]]
        if facts["free_bytes"] is not None and facts["free_bytes"] < MIN_FREE_BYTES:
            found.append(NodeProblem(host, f"{facts['free_bytes'] / 1e9:.1f} GB are free on its disk: free some"))
        if facts["port"] is None:
            found.append(NodeProblem(host, "the port is taken: --master-port N picks another"))
    return found
