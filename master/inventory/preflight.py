"""The preflight check: what a node's facts say against a start. The answers are compared with this machine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIN_FREE_BYTES = 2 << 30  # on the disk of the checkout: less doesn't hold a checkpoint


@dataclass(frozen=True)
class NodeProblem:
    """What prevents a start on one host, and how to fix it."""

    host: str
    text: str

    def __str__(self) -> str:
        return f"{self.host}: {self.text}"


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
