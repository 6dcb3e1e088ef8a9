"""One training over several hosts as data: what each host does, and what happened."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from master.inventory.hostfile import Slots
from master.inventory.node_facts import RemoteCheckout, checkout_of
from master.ssh.node_names import Node, parse_node
from master.training.root_cause import RankExit

KEPT_LINES = 200  # lines of each rank that are kept for the report of a failure


@dataclass(frozen=True)
class HostAssignment:
    """What one host does: its slots, where lanspeed lives there."""

    node: Node
    slots: tuple[int, ...]
    place: RemoteCheckout


@dataclass(frozen=True)
class Supervision:
    """How a training is watched over. Times in seconds.

    `grace`: to save in after Ctrl-C; `restarts`: how often to start again after a failure; `stall_timeout`: without
    progress until that is reported (0 never, None the default); `survives_master`: the hosts continue without us;
    `patience`: without contact until a host counts as lost, and, on the host, until the ranks save and end;
    `ends_hangs`: a hang that was reported ends the training; `min_hosts`: with how many hosts it continues when others
    are lost for good (None: with all of them).
    """

    grace: float
    restarts: int
    stall_timeout: float | None
    survives_master: bool
    patience: float
    ends_hangs: bool
    min_hosts: int | None = None


@dataclass(frozen=True)
class RunPlace:
    """Where a run is. `folders`: by host, where its ranks start; `is_here`: rank 0's run folder is this machine's;
    `is_ours`: the trainer makes it, not a script of the user's."""

    run: Path
    parts: tuple[HostAssignment, ...]
    folders: Mapping[str, str]
    is_here: bool
    is_ours: bool


@dataclass
class JobResult:
    """What happened: ends of ranks, hosts that were lost, the last lines by host and rank; by host its launcher's exit
    code and complete checkpoints; hosts where the job ended while nobody was connected, and those out of reach; why it
    hung, where that ended it."""

    exits: list[RankExit] = field(default_factory=list)
    lost_hosts: dict[str, str] = field(default_factory=dict)
    output: dict[tuple[str, int | None], deque[str]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=KEPT_LINES)))
    launcher_codes: dict[str, int] = field(default_factory=dict)
    checkpoints: dict[str, set[int]] = field(default_factory=dict)
    ended_alone: set[str] = field(default_factory=set)
    out_of_reach: set[str] = field(default_factory=set)
    asked_to_stop: bool = False
    first_failure_at: float | None = None
    hang: str = ""

    @property
    def is_unknown(self) -> bool:
        """True if contact was lost to hosts whose ranks may well be training."""
        return bool(self.out_of_reach) and self.first_failure_at is None

    def note(self, host: str, event: Mapping[str, Any], at: float) -> None:
        """Note what a host told, `at` seconds after the start."""
        kind = event["event"]
        if kind == "line":
            self.output[host, event["rank"]].append(event["text"])
        elif kind == "rank":
            self.exits.append(RankExit(host, event["rank"], event["code"], at, event["asked"]))
        elif kind == "ended":
            self.launcher_codes[host] = event["code"]
            self.checkpoints[host] = set(event["checkpoints"])
        elif kind == "failed":
            self.lost_hosts[host] = event["text"]


class RankOutput(Protocol):
    """Where the ranks' output goes (rank None: the launcher's), and the metrics of a run folder elsewhere."""

    def show(self, host: str, rank: int | None, text: str) -> None: ...

    def add_metrics(self, line: str | None) -> None: ...

    def show_progress(self, rank: int, text: str) -> None: ...

    def pass_time(self) -> None: ...

    def close(self) -> None: ...


def assignments(hosts: Sequence[Slots], known: Mapping[str, Mapping[str, Any]]) -> tuple[HostAssignment, ...]:
    """Return what each host of a hostfile does; `known` has what cluster.json says of it."""
    return tuple(HostAssignment(parse_node(host.host), host.use, checkout_of(known.get(host.host, {})))
                 for host in hosts)


def ranks_by_host(parts: Sequence[HostAssignment]) -> dict[str, range]:
    """Return the ranks of each host; DeepSpeed numbers them in the hosts' order."""
    found, first = {}, 0
    for part in parts:
        found[str(part.node)] = range(first, first + len(part.slots))
        first += len(part.slots)
    return found
