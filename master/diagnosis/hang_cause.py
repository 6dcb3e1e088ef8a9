"""Why a training hangs, computed from what every rank does: which ranks the others wait for, and where those are.

A rank that waits for others says so by its flight recorder (a collective that isn't over) or its stack. The cause is a
rank that has ended, is stopped or is elsewhere; else the one with the lowest sequence number; else a collective that
isn't the same on all ranks; else, where all are in the same one, the network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from master.diagnosis.rank_rows import (
    GONE,
    PYTHON,
    SILENT,
    STOPPED,
    SYSTEM_CALL,
    UNKNOWN,
    WAITING,
    RankRow,
    described,
    named_ranks,
    placed,
    together,
    under_way,
)
from master.diagnosis.rank_states import Connection, RankState

SAME_SIZES = ("all_reduce", "broadcast", "_all_gather_base", "_reduce_scatter_base")  # on all ranks
REPEATS = 2  # of a packet, from which a connection is in trouble


@dataclass(frozen=True)
class Cause:
    """The ranks that the others wait for (none: the network, or nobody waits), and the sentence. `is_hang` is False
    where nobody waits, or where those that are waited for compute: that may only be slow."""

    ranks: tuple[int, ...]
    sentence: str
    is_hang: bool = True


def find_cause(rows: Sequence[RankRow], states: Mapping[int, RankState], clock: float) -> Cause:
    """Return why ranks wait. `states`: of the ranks that could be asked; `clock`: seconds since 1970."""
    waiting = [row for row in rows if row.state in WAITING]
    missing = [row for row in rows if row.state in (GONE, STOPPED)]
    missing = missing or [row for row in rows if row.state in (SYSTEM_CALL, SILENT)]
    missing = missing or lowest([row for row in rows if row.state == PYTHON], states)
    unknown = [row for row in rows if row.state == UNKNOWN]
    if not waiting:
        return Cause(ranks_of(missing), "no rank waits for another: " + "; ".join(described(row) for row in rows[:4])
                     + (" ..." if len(rows) > 4 else ""), is_hang=False)
    if missing:
        return Cause(ranks_of(missing), except_for(waiting, missing, len(rows), clock),
                     is_hang=not all(row.is_busy for row in missing))
    if unknown:
        return Cause(ranks_of(unknown), except_for(waiting, unknown, len(rows), clock))
    return (behind(waiting, states, clock) or mismatch(waiting, states) or Cause(
        (), f"{together(waiting, len(rows), clock)}, and none is missing: {network(states, rows)}"))


def ranks_of(rows: Sequence[RankRow]) -> tuple[int, ...]:
    """Return the ranks of rows."""
    return tuple(row.rank for row in rows)


def progress(states: Mapping[int, RankState]) -> dict[tuple[str, str], dict[int, int]]:
    """Return each process group's newest sequence number by rank, of the groups that somebody waits in."""
    found: dict[tuple[str, str], dict[int, int]] = {}
    active = set[tuple[str, str]]()
    for rank, state in states.items():
        for one in state.collectives:
            if not one.is_p2p:
                numbers = found.setdefault((one.backend, one.group), {})
                numbers[rank] = max(numbers.get(rank, 0), one.sequence)
                if not one.is_over:
                    active.add((one.backend, one.group))
    return {group: found[group] for group in found if group in active}


def lowest(rows: Sequence[RankRow], states: Mapping[int, RankState]) -> list[RankRow]:
    """Return those rows whose ranks have begun the fewest collectives; others may wait for them, or be computing."""
    if len(rows) < 2:
        return list(rows)
    groups = progress(states).values()
    count = {row.rank: sum(numbers.get(row.rank, 0) for numbers in groups) for row in rows}
    return [row for row in rows if count[row.rank] == min(count.values())]


def behind(waiting: Sequence[RankRow], states: Mapping[int, RankState], clock: float) -> Cause | None:
    """Return the cause where some ranks in collectives haven't begun what others wait in."""
    for numbers in progress(states).values():
        late = [row for row in waiting if numbers.get(row.rank, max(numbers.values())) < max(numbers.values())]
        if late:
            least = min(numbers[row.rank] for row in late)
            late = [row for row in late if numbers[row.rank] == least]
            ahead = [row for row in waiting if row not in late]
            return Cause(ranks_of(late), f"ranks are in different collectives: {placed(ahead, clock)}; {placed(late)}. "
                         "Each rank must call the same ones in the same order")
    return None


def mismatch(waiting: Sequence[RankRow], states: Mapping[int, RankState]) -> Cause | None:
    """Return the cause where ranks wait in different operations, sizes or groups; the fewer ranks are blamed."""
    def kind(row: RankRow) -> tuple[str, ...]:
        active = under_way(states[row.rank]) if row.rank in states else None
        if active is None:
            return row.where, "", ""
        return row.where, active.group, active.sizes if active.operation in SAME_SIZES else ""

    kinds = Counter(map(kind, waiting))
    if len(kinds) < 2:
        return None
    usual = kinds.most_common(1)[0][0]
    odd = [row for row in waiting if kind(row) != usual]
    sizes = len({each[:2] for each in kinds}) == 1
    parts = []
    for each in kinds:
        rows = [row for row in waiting if kind(row) == each]
        parts.append(f"{named_ranks(rows)} in {each[0]}" + (f" of {each[2]}" if sizes else "")
                     + (f" at {rows[0].frame}" if rows[0].frame else ""))
    return Cause(ranks_of(odd), f"ranks are in different collectives: {'; '.join(parts)}. Each rank must call the same "
                 "ones in the same order, with the same sizes")


def except_for(waiting: Sequence[RankRow], missing: Sequence[RankRow], all_ranks: int, clock: float) -> str:
    """Return the sentence where ranks wait for others."""
    rest = all_ranks - len(waiting) - len(missing)
    return f"{together(waiting, len(waiting) + rest, clock)}, except " + "; ".join(
        f"{described(row)}" for row in missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")


def network(states: Mapping[int, RankState], rows: Sequence[RankRow]) -> str:
    """Return what the connections of ranks say that wait in the same collective."""
    hosts = {row.rank: row.host for row in rows}
    ends = {(one.own, one.peer): (rank, one) for rank, state in states.items() for one in state.connections}
    ways: dict[tuple[str, str], int] = {}
    for (own, peer), (rank, one) in ends.items():
        if one.repeats < REPEATS or not one.waiting:
            continue
        other = ends.get((peer, own))
        there = hosts[other[0]] if other else peer.split()[0]
        way = (there, hosts[rank]) if other and has_arrived(one, other[1]) else (hosts[rank], there)
        ways[way] = max(ways.get(way, 0), one.repeats)
    if not ways:
        return "the network or the GPUs don't finish it; no connection between the hosts is stuck"
    return "the network between them doesn't carry it: " + "; ".join(
        f"{there} receives nothing from {here} (packets repeated {count} times)"
        for (here, there), count in sorted(ways.items())) + ". Cable, firewall, or a full switch?"


def has_arrived(sent: Connection, other: Connection) -> bool:
    """Return whether the other end has what this one still waits to have acknowledged: the way back is broken."""
    return other.received > sent.acknowledged + 1  # whose first byte is the opening itself (RFC 4898)
