"""One training over several hosts as data: what each host does, and what happened."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from master.inventory.node_facts import RemoteCheckout
from master.ssh.node_names import Node
from master.training.root_cause import RankExit

KEPT_LINES = 200  # lines of each rank that are kept for the report of a failure


@dataclass(frozen=True)
class HostAssignment:
    """What one host does: its slots, where lanspeed lives there."""

    node: Node
    slots: tuple[int, ...]
    place: RemoteCheckout


@dataclass
class JobResult:
    """What happened: ends of ranks, hosts that were lost, the last lines by host and rank, reasons of an early end."""

    exits: list[RankExit] = field(default_factory=list)
    lost_hosts: dict[str, str] = field(default_factory=dict)
    output: dict[tuple[str, int | None], deque[str]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=KEPT_LINES)))
    launcher_codes: dict[str, int] = field(default_factory=dict)
    asked_to_stop: bool = False
    first_failure_at: float | None = None


def ranks_by_host(parts: Sequence[HostAssignment]) -> dict[str, range]:
    """Return the ranks of each host; DeepSpeed numbers them in the hosts' order."""
    found, first = {}, 0
    for part in parts:
        found[str(part.node)] = range(first, first + len(part.slots))
        first += len(part.slots)
    return found
