"""What differs between nodes that must be the same, and what on a node will harm a training: findings, each with how
to fix it.

`invoke check` shows them. The facts come from worker/describe_node.py; the majority decides which host differs.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from master.check.finding import Facts, Finding
from master.check.hardware import card_findings, gpu_findings
from master.inventory.addresses import card_of

GIB = 1 << 30
# free bytes for runs and checkpoints: an error below, a warning below
MIN_FREE_BYTES, LOW_FREE_BYTES = 2 * GIB, 20 * GIB
MIN_SHM_BYTES = 1 * GIB  # NCCL and data loaders of one node share memory there
MIN_OPEN_FILES = 4096  # open files: a loader's workers and a rank's sockets take thousands
MAX_CLOCK_SKEW_S = 2.0  # seconds: logs of several hosts can't be read side by side beyond it


@dataclass(frozen=True)
class ComparedFact:
    """A fact that should be the same on all nodes: its name, how to read it, what a difference causes, how to fix
    it."""

    name: str
    path: tuple[str, ...]
    level: str
    effect: str
    fix: str


VERSIONS = "ranks of different versions hang or compute different things"
SEND = "invoke sync with the same --model and --dataset (or does it have more files than here?)"
INSTALL = "invoke sync"
COMPARED_FACTS = [
    ComparedFact("lanspeed's code", ("code",), "error", "ranks would run different programs", "invoke sync"),
    *(ComparedFact(name, ("packages", name), "error", VERSIONS, INSTALL)
      for name in ("torch", "deepspeed", "transformers", "accelerate", "peft")),
    *(ComparedFact(name, ("packages", name), "warning", "data may be tokenized differently", INSTALL)
      for name in ("datasets", "tokenizers")),
    ComparedFact("Python", ("minor",), "error", "packages differ with it", "install the same minor release there"),
    ComparedFact("NCCL", ("nccl",), "error", "its ranks can't communicate with the others", INSTALL),
    ComparedFact("GPU driver", ("driver",), "warning", "one host may refuse what the others run", "update it there"),
    ComparedFact("glibc", ("glibc",), "info", "packages built on one host may not load on another", ""),
    ComparedFact("operating system", ("os",), "info", "none by itself", ""),
    ComparedFact("MTU of the training's network card", ("mtu",), "warning",
                 "large packets are lost silently, and all-reduce hangs", "sudo ip link set dev CARD mtu 1500 there"),
    ComparedFact("time zone", ("timezone",), "info", "the logs' times differ by it", ""),
]


def is_loopback(address: str) -> bool:
    """Return whether an address, with a scope or without, leads to the machine itself."""
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def value_at(facts: Facts, path: Sequence[str]) -> Any:
    """Return the part of the facts at a path, None where there is none."""
    found: Any = facts
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def normalized(facts: Facts, address: str | None) -> dict[str, Any]:
    """Return facts in the form that is compared: versions without their build, the card that the training will use."""
    packages = {name: version.split("+")[0] for name, version in facts["packages"].items()}
    card = card_of(facts, address)
    return {**facts, "packages": packages, "minor": ".".join(facts["python"].split(".")[:2]),
            "mtu": card and card["mtu"], "card": card}


def differences(nodes: Mapping[str, Facts]) -> list[Finding]:
    """Return in what single nodes differ from the majority; of a tie the first node's is the majority's."""
    found = []
    for fact in COMPARED_FACTS:
        values = {host: value_at(facts, fact.path) for host, facts in nodes.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        by_value: dict[Any, list[str]] = {}
        for host, value in values.items():
            if value != usual:
                by_value.setdefault(value, []).append(host)
        for value, hosts in by_value.items():
            has = f"{fact.name} {value}" if value is not None else f"no {fact.name}"
            others = f"the others have {usual}" if usual is not None else "the others have none"
            found.append(Finding(fact.level, tuple(hosts), f"{has}, {others}", fact.effect, fact.fix))
    return found


def node_findings(host: str, facts: Facts, here: float | None) -> list[Finding]:
    """Return what is wrong with a node by itself; `here`: seconds that its clock is ahead of this machine's."""
    found = []

    def add(level: str, what: str, effect: str, fix: str) -> None:
        found.append(Finding(level, (host,), what, effect, fix))

    for disk in facts["disks"]:
        if disk["free_bytes"] < LOW_FREE_BYTES:
            level = "error" if disk["free_bytes"] < MIN_FREE_BYTES else "warning"
            add(level, f"{disk['free_bytes'] / 1e9:.1f} GB are free on {disk['mount']}",
                "checkpoints or packages won't fit", "free disk space there")
    if facts["shm_bytes"] is not None and facts["shm_bytes"] < MIN_SHM_BYTES:
        add("warning", f"its shared memory has {facts['shm_bytes'] / 1e6:.0f} MB",
            "ranks of one host die of a bus error",
            "sudo mount -o remount,size=50% /dev/shm there (a container: --shm-size)")
    if facts["nofile"] is not None and facts["nofile"] < MIN_OPEN_FILES:
        add("warning", f"{facts['nofile']} open files are allowed", "data loaders fail with 'too many open files'",
            "a line 'nofile 65536' for the account in /etc/security/limits.conf there")
    if here is not None and abs(here) > MAX_CLOCK_SKEW_S:
        add("warning", f"its clock is {abs(here):.0f} s {'ahead' if here > 0 else 'behind'}",
            "logs can't be read side by side, and certificates may be refused", "sudo timedatectl set-ntp true there")
    if any(map(is_loopback, facts["own_name"])):
        add("info", f"its own name leads to itself ({', '.join(facts['own_name'])})",
            "gloo by itself would tell that address to the others; invoke train names the network card instead",
            "GLOO_SOCKET_IFNAME where you start ranks by hand")
    for path in facts["missing"]:
        add("error", f"{path} is not there", "its ranks would not find it", f"invoke sync -- --with {path}")
    for name, known in facts["names"].items():
        if name != facts["hostname"] and known and all(is_loopback(each) for each in known):
            add("warning", f"it knows {name} as {', '.join(known)}, which is itself",
                "ranks started by that name would wait for each other for ever", "fix /etc/hosts there")
    if facts["port"] is None:
        add("info", "another program listens on port 29500 there",
            "invoke train takes another; plain deepspeed would fail", "--master_port N for plain deepspeed")
    for slot, mib in facts["busy"].items():
        add("warning", f"other programs hold {mib / 1024:.1f} GiB on slot {slot}", "its rank may run out of memory",
            f"wait, or invoke train --exclude {host}:{slot}")
    if facts["jobs"]:
        add("warning", f"{', '.join(facts['jobs'])} runs there", "both trainings get slower, or run out of memory",
            "invoke stop, or wait")
    return found + gpu_findings(host, facts) + card_findings(host, facts)


def content_findings(nodes: Mapping[str, Facts], own: Mapping[str, str | None]) -> list[Finding]:
    """Return models and data that differ from this machine's, or, where it has none, from most nodes'."""
    found: list[Finding] = []
    for name, digest in own.items() if nodes else ():
        usual = digest or Counter(facts["content"].get(name) for facts in nodes.values()).most_common(1)[0][0]
        for host, facts in nodes.items():
            theirs = facts["content"].get(name)
            if theirs == usual or name in facts["missing"]:  # which is reported anyway
                continue
            if theirs is None:
                found.append(Finding("warning", (host,), f"{name} is not in its Hugging Face cache",
                                     "it would be downloaded there, if there is internet", SEND))
            else:
                found.append(Finding("error", (host,), f"its {name} differs from this machine's",
                                     "ranks would start from different weights, or learn different text", SEND))
    return found


def grouped(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings, with equal ones about single hosts merged; pairs stay separate."""
    hosts: dict[Finding, list[str]] = {}
    for finding in findings:
        alone = len(finding.hosts) == 1
        hosts.setdefault(replace(finding, hosts=()) if alone else finding, []).extend(finding.hosts)
    return [replace(finding, hosts=tuple(dict.fromkeys(names))) for finding, names in hosts.items()]


def agreement(nodes: Mapping[str, Facts]) -> list[str]:
    """Return lines that summarize the nodes: nodes with equal facts share a line."""
    groups: dict[str, list[str]] = {}
    for host, facts in nodes.items():
        words = [f"{facts['os']}, Python {facts['minor']}"]
        words += [f"{name} {facts['packages'][name]}" for name in ("torch", "deepspeed", "transformers")
                  if name in facts["packages"]]
        words += [f"driver {facts['driver']}"] if facts.get("driver") else []
        words += [f"{facts['cores']} cores, {facts.get('ram_bytes', 0) / GIB:.0f} GiB"]
        groups.setdefault(", ".join(words), []).append(host)
    return [f"{', '.join(hosts)}: {words}" for words, hosts in groups.items()]
