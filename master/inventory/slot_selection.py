"""Decides which slots train: from the hosts' GPU reports to slots of one vendor, and a comment on each host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from master.core.terminal import listed
from master.inventory.addresses import own_address_towards
from master.inventory.gpu_query import GpuAnswer
from master.inventory.gpu_report import GpuReport
from master.inventory.hostfile import Slots
from master.ssh.node_names import Node

VENDORS = ("NVIDIA", "AMD", "INTEL")  # of equals the first


@dataclass(frozen=True)
class HostAnswer:
    """What came of asking a host: what was found there, or the fault. `node` is None for a report from a file."""

    name: str
    node: Node | None
    found: GpuAnswer | None
    reason: str | None


def choose_vendor(answers: Sequence[HostAnswer]) -> str:
    """Return the vendor with most usable GPUs over all hosts: one training can't mix them."""
    counts = Counter({vendor: 0 for vendor in VENDORS})
    for answer in answers:
        if answer.found:
            counts[answer.found.report.vendor] += len(answer.found.report.slots_use)
    return max(VENDORS, key=lambda vendor: counts[vendor])


def slots_of(answer: HostAnswer, vendor: str, cpu_slots: int | None, most: int | None = None) -> Slots | None:
    """Return a host's line of the hostfile, None if it has none; it uses `most` GPUs at most."""
    if not answer.found:
        return None
    if cpu_slots:
        return Slots(answer.name, cpu_slots, tuple(range(cpu_slots)), "CPU")
    report = answer.found.report
    if report.vendor != vendor or not report.slots_use:
        return None
    return Slots(answer.name, report.slots_total, report.slots_use[:most], vendor)


def name_problem(node: Node) -> str | None:
    """Return why DeepSpeed couldn't take a node's name from a hostfile, None if it can."""
    what = "a user name" if node.user else "a port" if node.port else "an IPv6 address" if node.is_ipv6 else None
    if what is None:
        return None
    lines = [f"HostName {node.host}", *([f"User {node.user}"] if node.user else []),
             *([f"Port {node.port}"] if node.port else [])]
    return (f"hostfile: DeepSpeed can't take {what} in a host's name: write 'Host NAME' with '{', '.join(lines)}' into "
            "~/.ssh/config and use NAME")


def host_comment(report: GpuReport, vendor: str | None = None) -> str:
    """Return a remark on a host for people: '2x NVIDIA GeForce RTX 4090 24564 MiB; slot 0 unusable (CODE)'."""
    kinds = Counter((gpu.name or f"{report.vendor} GPU", gpu.memory_total_mib) for gpu in report.gpus
                    if gpu.usable or (gpu.index is not None and not gpu.integrated))
    parts = [", ".join(f"{count}x {name}" + (f" {memory} MiB" if memory else "")
                       for (name, memory), count in kinds.items())] if kinds else []
    faults = [problem for problem in report.problems if problem.is_fault]
    why = f" ({', '.join(reason.code for reason in faults)})" if faults else ""
    broken = [str(gpu.index) for gpu in report.gpus if not gpu.usable and not gpu.integrated and gpu.index is not None]
    lost = sum(1 for gpu in report.gpus if not gpu.usable and gpu.index is None)
    if broken:
        parts.append(f"slot {', '.join(broken)} unusable{why}")
    if lost:
        parts.append(f"{lost} GPU{'s' * (lost != 1)} unusable{why}")
    if report.vendor == "NONE":
        parts.append("no GPU")
    elif vendor in VENDORS and report.vendor != vendor and report.slots_use:
        parts.append(f"left out: {report.vendor} can't train with {vendor} (--vendor {report.vendor} takes it)")
    if faults and not broken and not lost:
        parts.append(f"{faults[0].code}: {faults[0].message}")
    return "; ".join(parts)


def with_own_address(answers: Sequence[HostAnswer]) -> list[HostAnswer]:
    """Return the answers with this machine's address, where it is a node itself: the one on its way to the others."""
    others = [answer.found.address for answer in answers if answer.found and answer.found.address]
    own = own_address_towards(others[0]) if others else None
    return [replace(answer, found=replace(answer.found, address=own))
            if answer.found and answer.node and answer.node.is_local else answer for answer in answers]


def duplicate_hosts(answers: Sequence[HostAnswer]) -> list[str]:
    """Return warnings on hosts that seem to be one machine under two names: same host key and same network cards.

    Cloned disks share a host key and even the machine id, but not their network cards' addresses.
    """
    names: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for answer in answers:
        if answer.found and answer.found.fingerprint and answer.found.macs:
            names.setdefault((answer.found.fingerprint, answer.found.macs), []).append(answer.name)
    return [f"{listed(same[1:])} and {same[0]} are the same machine: name it once" for same in names.values()
            if len(same) > 1]


def only_slots(host: dict[str, Any], use: Sequence[int]) -> dict[str, Any]:
    """Return a host of cluster.json with only those GPUs whose slots train."""
    gpus = [gpu for gpu in host["report"]["gpus"] if gpu["index"] in use]
    return {**host, "report": {**host["report"], "gpus": gpus}}
