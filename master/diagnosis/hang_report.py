"""A hang explained: every rank is asked where it is, and why the others wait for it is told and kept in the run folder.

    report = explain(ask_all(sessions, ...), ...)
    report.lines()       what a person reads; report.keep(run) writes it with all stacks
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from master.core.atomic_write import write_atomically
from master.core.terminal import one_line
from master.diagnosis.hang_cause import Cause, find_cause
from master.diagnosis.host_metrics import measure_once
from master.diagnosis.rank_rows import COLLECTIVE, GONE, UNKNOWN, RankRow, ranges, row_of
from master.diagnosis.rank_states import HostState, ProcessState, query_ranks
from master.ssh.route import SshError
from master.ssh.session import Session

FOLDER = "hangs"  # in the run folder
MOST_KEPT = 20  # reports
GIB = 1 << 30


@dataclass(frozen=True)
class HostAnswer:
    """What a host tells: its ranks, and how busy it is, or the "problem" that only that can't be told."""

    state: HostState
    measured: Mapping[str, Any]


@dataclass(frozen=True)
class HangReport:
    """All that was told: why ranks wait, a row for each, the hosts' answers or why there is none; `at`: when, in
    seconds since 1970."""

    cause: Cause
    rows: tuple[RankRow, ...]
    answers: Mapping[str, HostAnswer | SshError]
    at: float

    def table(self) -> list[str]:
        """Return a line for each rank, those that agree in one, under a line of headings."""
        kinds: dict[tuple[str, ...], list[RankRow]] = {}
        for row in sorted(self.rows, key=lambda row: (row.rank not in self.cause.ranks, row.rank)):
            key = (row.host, row.state, row.where if row.state == COLLECTIVE else row.operation, row.frame or row.note)
            kinds.setdefault(key, []).append(row)
        lines = [("rank", "host", "state", "operation", "seconds", "where")]
        for (host, state, operation, where), rows in kinds.items():
            seconds = [row.seconds for row in rows if row.seconds is not None]
            lines.append((ranges([row.rank for row in rows]), host, state, operation,
                          f"{max(seconds):.0f}" if seconds else "", where))
        widths = [max(len(line[column]) for line in lines) for column in range(6)]
        return [one_line("  " + "  ".join(map(str.ljust, line, widths))).rstrip() for line in lines]

    def hosts(self) -> list[str]:
        """Return a line for each host: load, memory, disk, GPUs; or why it can't be asked."""
        return [one_line(f"  {host}: {host_state(answer)}") for host, answer in self.answers.items()]

    def lines(self) -> list[str]:
        """Return the sentence and both tables."""
        return [one_line(self.cause.sentence), *self.table(), *self.hosts()]

    def keep(self, run: Path) -> Path:
        """Write the report with all stacks into a run folder, for people and as JSON; return the path of the former.

        Raises OSError.
        """
        path = run / FOLDER / time.strftime("%Y%m%d-%H%M%S.txt", time.localtime(self.at))
        path.parent.mkdir(exist_ok=True)
        stacks = [line for host, answer in self.answers.items() if isinstance(answer, HostAnswer)
                  for rank, state in sorted(answer.state.ranks.items())
                  for who, process in ((f"rank {rank} on {host}", state.process),
                                       *((f"its data worker on {host}", helper) for helper in state.helpers))
                  for line in stack_lines(who, process)]
        write_atomically(path.with_suffix(".json"), json.dumps(self.record(), indent=1) + "\n")
        write_atomically(path, "\n".join([*self.lines(), *stacks]) + "\n")
        for old in sorted(path.parent.glob("*-*.*"))[: -2 * MOST_KEPT]:  # a hang that nobody ends is reported all night
            old.unlink(missing_ok=True)
        return path

    def record(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        told = {host: str(answer) if isinstance(answer, SshError) else asdict(answer)
                for host, answer in self.answers.items()}
        return {"at": self.at, "cause": asdict(self.cause), "ranks": [asdict(row) for row in self.rows], "hosts": told}


def ask(session: Session, python: str, job: str) -> HostAnswer:
    """Return what a host tells of a job's ranks and of itself. Raises SshError."""
    state = query_ranks(session, python, job)
    try:
        return HostAnswer(state, measure_once(session, python))
    except SshError as error:
        return HostAnswer(state, {"problem": f"how busy it is can't be told: {error.reason}"})


def ask_all(sessions: Mapping[str, Session | None], pythons: Mapping[str, str], job: str
            ) -> dict[str, HostAnswer | SshError]:
    """Return what each host tells, all asked at once over sessions that are there (None: no connection)."""
    def one(host: str) -> HostAnswer | SshError:
        session = sessions[host]
        try:
            if session is None:
                raise SshError(host, "connection", "none now")
            return ask(session, pythons[host], job)
        except SshError as error:
            return error
        except Exception as error:  # as in run_on_all: a host must not cost the others
            return SshError(host, "internal", f"{type(error).__name__}: {error}")

    with ThreadPoolExecutor(max(1, len(sessions))) as pool:
        return dict(zip(sessions, pool.map(one, sessions), strict=True))


def explain(answers: Mapping[str, HostAnswer | SshError], ranks: Mapping[str, Sequence[int]],
            ended: Mapping[int, str] | None = None, clock: Callable[[], float] = time.time) -> HangReport:
    """Return why a job's ranks wait. `ranks`: of each host; `ended`: how ranks ended that are known to have."""
    rows, states = [], {}
    for host, own in ranks.items():
        answer = answers.get(host)
        for rank in own:
            how = (ended or {}).get(rank)
            if isinstance(answer, HostAnswer) and rank in answer.state.ranks and how is None:
                states[rank] = answer.state.ranks[rank]
                rows.append(row_of(host, states[rank]))
            elif how is not None or isinstance(answer, HostAnswer):
                rows.append(RankRow(rank, host, GONE, note=how or ""))
            else:
                rows.append(RankRow(rank, host, UNKNOWN, note=f"{answer.stage}: {answer.reason}" if answer else ""))
    at = clock()
    return HangReport(find_cause(rows, states, at), tuple(rows), answers, at)


def host_state(answer: HostAnswer | SshError) -> str:
    """Return the state of a host in a line."""
    if isinstance(answer, SshError):
        return f"{answer.stage}: {answer.reason}"
    node, parts = answer.state.node, []
    parts.append(f"load {node['load']:g} on {node['cores']} core{'s' * (node['cores'] > 1)}")
    if None not in (node["ram_bytes"], node["ram_available_bytes"]):
        used = (node["ram_bytes"] - node["ram_available_bytes"]) / GIB
        parts.append(f"memory {used:.1f}/{node['ram_bytes'] / GIB:.0f} GiB")
    if node["disk_free_bytes"] is not None:
        parts.append(f"{node['disk_free_bytes'] / 1e9:.1f} GB of disk free")
    for gpu in answer.measured.get("gpus", []):
        figures = [f"{gpu[key]:.0f}{unit}" for key, unit in (
            ("use_percent", " %"), ("power_w", " W"), ("temperature_c", " °C")) if gpu[key] is not None]
        parts.append(f"GPU {gpu['slot']}: {' '.join(figures) or '?'}")
    if answer.measured.get("problem"):
        parts.append(answer.measured["problem"])
    return ", ".join(parts)


def stack_lines(who: str, process: ProcessState) -> list[str]:
    """Return all stacks of a process."""
    lines = ["", f"{who}, process {process.pid}, state {process.state}"
             + (f" in {process.waits_in}" if process.waits_in else "") + f", {process.cpu_percent} % of a CPU"]
    for number, stack in enumerate(process.stacks):
        lines += [f"  thread {number}:"] if len(process.stacks) > 1 else []
        lines += [f"    {file}:{line} in {name}" for file, line, name in stack]
    return list(map(one_line, lines if process.stacks else [*lines, "    no answer"]))
