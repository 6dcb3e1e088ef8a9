"""What each rank of a job does now: worker/inspect_ranks.py, run on every host over a session that is there."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from master.core.json_schema import loads
from master.core.paths import WORKER
from master.inventory.worker_script import source, stdin_loader
from master.ssh.route import SshError
from master.ssh.session import Session, last_words
from master.ssh.worker_message import check_message

MARK = "@@RANKS "
PATIENCE = 20.0  # seconds for a host's answer: a node that swaps is slow
BUSY_PERCENT = 15  # of a CPU: what an answer costs is less, what a swamped node leaves is more
Frame = tuple[str, int, str]  # file, line, function


@dataclass(frozen=True)
class Collective:
    """One entry of torch's flight recorder: which operation of which process group, whether it is over, its sequence
    number there, the sizes of its input, and the seconds since it began."""

    group: str
    backend: str
    operation: str
    sequence: int
    is_p2p: bool
    is_over: bool
    sizes: str
    seconds: float


@dataclass(frozen=True)
class ProcessState:
    """A process: the kernel's state of it (R S D T ...), the function of the kernel that it waits in, and its threads'
    stacks, the main thread's first, each with its innermost frame first."""

    pid: int
    state: str
    waits_in: str
    cpu_percent: float
    stacks: tuple[tuple[Frame, ...], ...]

    @property
    def is_busy(self) -> bool:
        """True if it computes, or would on a node with a CPU to spare."""
        return self.state == "R" or self.cpu_percent >= BUSY_PERCENT

    @property
    def stack(self) -> tuple[Frame, ...]:
        """The main thread's stack, () if it gave none."""
        return self.stacks[0] if self.stacks else ()


@dataclass(frozen=True)
class Connection:
    """A TCP connection to another host: bytes that wait to be acknowledged, how often the kernel has repeated the first
    of them, and the bytes that were acknowledged and received since it was opened."""

    own: str
    peer: str
    waiting: int
    repeats: int
    acknowledged: int
    received: int


@dataclass(frozen=True)
class RankState:
    """A rank: its process, the processes that it has started (data workers), its collectives and connections."""

    rank: int
    process: ProcessState
    helpers: tuple[ProcessState, ...]
    collectives: tuple[Collective, ...]
    connections: tuple[Connection, ...]


@dataclass(frozen=True)
class HostState:
    """The ranks of a host by number, and its load, memory and disk."""

    ranks: Mapping[int, RankState]
    node: Mapping[str, Any]


def query_ranks(session: Session, python: str, job: str) -> HostState:
    """Return what the ranks of a job do on a host. Raises SshError."""
    script, host = WORKER / "inspect_ranks.py", str(session.node)
    done = session.run(f"exec {shlex.quote(python)} {stdin_loader(script)} {shlex.quote(job)}", source(script),
                       timeout=PATIENCE)
    line = next((line for line in done.out.splitlines() if line.startswith(MARK)), None)
    if line is None:
        raise SshError(host, "ranks", last_words(done.out, done.err))
    try:
        told = loads(line[len(MARK) :])
    except ValueError:
        raise SshError(host, "message", "what it says of its ranks is no JSON") from None
    check_message("ranks", told, host)
    return HostState({rank["rank"]: rank_of(rank) for rank in told["ranks"]}, told["node"])


def rank_of(told: Mapping[str, Any]) -> RankState:
    """Return a rank as a host tells of it; the message is checked."""
    process, *helpers = map(process_of, told["processes"])
    return RankState(told["rank"], process, tuple(helpers),
                     tuple(Collective(**entry) for entry in told["collectives"]),
                     tuple(Connection(**each) for each in told["connections"]))


def process_of(told: Mapping[str, Any]) -> ProcessState:
    """Return a process as a host tells of it."""
    stacks = tuple(tuple((frame["file"], frame["line"], frame["name"]) for frame in stack) for stack in told["stacks"])
    return ProcessState(told["pid"], told["state"], told["waits_in"], told["cpu_percent"], stacks)
