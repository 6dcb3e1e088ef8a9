"""The machines that a plan is made for: as cluster.json knows them, or as --gpus and --network describe them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from master.core.run_cli import UsageError
from master.inventory.addresses import card_of
from master.inventory.hostfile import Slots
from trainer.estimate.traffic import goodput

GIGABIT = 1e9
ASSUMED_LATENCY_S = 2e-4  # of a switch and two network stacks
UNITS = {"mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 1e6, "gb": 1e9, "tb": 1e12}
GROUP = re.compile(r"(?:(?P<count>\d+)x)?(?:(?P<name>[^:/]+):)?(?P<memory>[^:/]+?)(?:/(?P<ram>[^:/]+))?")


@dataclass(frozen=True)
class Machine:
    """A host: its slots' devices by name ("" unknown, "CPU") with the bytes of the smallest, its own bytes of memory,
    and what its network card carries in bytes a second, None where unknown.
    """

    name: str
    devices: tuple[str, ...]
    memory: float
    ram: float | None
    rate: float | None

    @property
    def on_gpu(self) -> bool:
        """True if its slots are GPUs."""
        return self.devices[0] != "CPU"


@dataclass(frozen=True)
class Network:
    """What was measured between hosts, by (from, to): bytes a second and seconds of a round trip.

    `rate`: what --network says of every link, None without it.
    """

    pairs: Mapping[tuple[str, str], float]
    latencies: Mapping[tuple[str, str], float]
    rate: float | None = None

    def between(self, machines: Sequence[Machine]) -> tuple[float, bool, str]:
        """Return the slowest link's bytes a second among machines, whether it was measured, and which host's it is.

        A card of unknown speed is taken for 1 Gbit/s.
        """
        slowest: tuple[float, bool, str] | None = None
        for one in machines:
            mine = [self.pairs[key] for other in machines if (key := (one.name, other.name)) in self.pairs]
            rate = min(mine) if mine else self.rate or one.rate or goodput(GIGABIT)
            found = (rate, bool(mine), one.name)
            slowest = found if slowest is None or found[0] < slowest[0] else slowest
        assert slowest
        return slowest

    def own_rate(self, machine: Machine, others: Sequence[Machine]) -> float:
        """Return the bytes a second of a machine's best link to another, as measured, or of its card."""
        measured = [self.pairs[key] for other in others if (key := (machine.name, other.name)) in self.pairs]
        return max(measured) if measured else self.rate or machine.rate or goodput(GIGABIT)

    def latency(self, machines: Sequence[Machine]) -> float:
        """Return the seconds of the longest round trip among machines."""
        names = {machine.name for machine in machines}
        found = [value for (one, other), value in self.latencies.items() if one in names and other in names]
        return max(found, default=ASSUMED_LATENCY_S)


def of_cluster(slots: Sequence[Slots], cluster: Mapping[str, Any], network: float | None) -> tuple[list[Machine],
                                                                                                  Network]:
    """Return the machines of a hostfile's lines, as cluster.json knows them; `network`: bytes a second, where given."""
    known = {host["name"]: host for host in (*cluster.get("absent", []), *cluster["hosts"])}
    machines = [of_host(host, known.get(host.host, {})) for host in slots]
    pairs = [pair for pair in cluster["pairs"] if pair["bandwidth_bytes_per_s"]] if network is None else []
    return machines, Network(
        {(pair["from"], pair["to"]): float(pair["bandwidth_bytes_per_s"]) for pair in pairs},
        {(pair["from"], pair["to"]): float(pair["latency_s"]) for pair in pairs if pair["latency_s"] is not None},
        network)


def slots_of(cluster: Mapping[str, Any], path: Path) -> list[Slots]:
    """Return a cluster.json's hosts with all usable GPUs of each. Raises UsageError if no host has one."""
    found = []
    for host in cluster["hosts"]:
        report = host["report"]
        if use := tuple(number for number in report.get("slots_use") or () if isinstance(number, int)):
            found.append(Slots(host["name"], max(use) + 1, use, str(report.get("vendor") or "")))
    if not found:
        raise UsageError(f"--cluster {path}: no host there has a usable GPU: --hostfile names CPU slots")
    return found


def of_host(slots: Slots, known: Mapping[str, Any]) -> Machine:
    """Return a hostfile's line as a machine."""
    facts = known.get("facts") or {}
    ram = float(facts["ram_bytes"]) if facts.get("ram_bytes") else None
    card = card_of(facts, known.get("address"))
    rate = goodput(card["mbit"] * 1e6) if card and card.get("mbit") else None
    gpus = {gpu["index"]: gpu for gpu in (known.get("report") or {}).get("gpus", [])}
    used = [gpus[number] for number in slots.use if number in gpus]
    if slots.vendor == "CPU" or not used:
        on_cpu = slots.vendor == "CPU"  # whose memory nobody has asked for yet is taken for enough
        size = (ram / len(slots.use) if ram else math.inf) if on_cpu else 0.0
        return Machine(slots.host, ("CPU" if on_cpu else "",) * len(slots.use), size, ram, rate)
    sizes = [gpu["memory_total_mib"] * 2**20 for gpu in used if gpu.get("memory_total_mib")]
    return Machine(slots.host, tuple(str(gpu.get("name") or "") for gpu in used), float(min(sizes, default=0)), ram,
                   rate)


def of_words(text: str, network: float | None) -> tuple[list[Machine], Network]:
    """Return the machines of --gpus "2xRTX 3090:24GiB/64GiB,1x12GiB": count, name, memory of a GPU / of the host.

    Raises UsageError.
    """
    machines = []
    for number, word in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
        found = GROUP.fullmatch(word)
        count = int(found["count"] or 1) if found else 0
        if not found or not 1 <= count <= 64:
            raise UsageError(f'--gpus {word}: like "4x24GiB/128GiB", "2xRTX 3090:24GiB" or "12GiB": the GPUs of one '
                             "host, the memory of each / of the host")
        ram = size_of(found["ram"], word) if found["ram"] else None
        machines.append(Machine(f"host{number}", ((found["name"] or "").strip(),) * count,
                                size_of(found["memory"], word), ram, None))
    if not machines:
        raise UsageError('--gpus: name one host at least, like "2x24GiB/64GiB"')
    return machines, Network({}, {}, network)


def size_of(text: str, where: str) -> float:
    """Return the bytes of "24GiB" or "24GB". Raises UsageError."""
    found = re.fullmatch(r"([0-9.]+)\s*([kmgt]i?b)", text.strip().lower())
    if found and found[1].replace(".", "", 1).isdigit() and found[2] in UNITS:
        return float(found[1]) * UNITS[found[2]]
    raise UsageError(f"--gpus {where}: {text!r} is no size: like 24GiB or 24GB")


def speed_of(text: str) -> float:
    """Return the bytes a second of data over a link of "1Gbit", "2.5Gbit/s" or "100Mbit". Raises UsageError."""
    found = re.fullmatch(r"([0-9.]+)\s*([mg])bit(/s|ps)?", text.strip().lower())
    try:
        if found and (value := float(found[1])) > 0:
            return goodput(value * (1e9 if found[2] == "g" else 1e6))
    except ValueError:
        pass
    raise UsageError(f"--network {text}: like 1Gbit, 2.5Gbit or 100Mbit")


def subsets(machines: Sequence[Machine], most: int, speed_of: Callable[[Machine], Hashable] = lambda _: None
            ) -> list[tuple[Machine, ...]]:
    """Return the choices of machines that differ, the largest first; alike ones count once.

    `speed_of`: what else tells machines apart. Of more than `most` choices only the first machines of each number.
    """
    kinds: dict[Hashable, list[Machine]] = {}
    for machine in machines:
        kinds.setdefault((replace(machine, name=""), speed_of(machine)), []).append(machine)
    groups = list(kinds.values())
    choices = 1
    for group in groups:
        choices *= len(group) + 1
    if choices > most:
        return [tuple(machines[:count]) for count in range(len(machines), 0, -1)]
    found: list[tuple[Machine, ...]] = [()]
    for group in groups:
        found = [(*chosen, *group[:count]) for chosen in found for count in range(len(group) + 1)]
    order = {machine: number for number, machine in enumerate(machines)}
    ordered = [tuple(sorted(chosen, key=order.__getitem__)) for chosen in found if chosen]
    return sorted(ordered, key=lambda chosen: (-len(chosen), [order[machine] for machine in chosen]))
