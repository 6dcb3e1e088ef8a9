"""Why a training hangs, computed from what every rank does: which ranks the others wait for, and where those are.

A rank that waits for others says so by its flight recorder (a collective that isn't over) or its stack. The cause is a
rank that has ended, is stopped or is elsewhere; else the one with the lowest sequence number; else a collective that
isn't the same on all ranks; else, where all are in the same one, the network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    named,
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
                     is_hang=not any(row.is_busy for row in missing))
    if unknown:
        return Cause(ranks_of(unknown), except_for(waiting, unknown, len(rows), clock))
    return (mismatch(waiting, states) or behind(waiting, states, clock) or Cause(
        (), f"{together(waiting, len(rows), clock)}, and none is missing: {network(states, rows)}"))


def ranks_of(rows: Sequence[RankRow]) -> tuple[int, ...]:
    """Return the ranks of rows."""
    return tuple(row.rank for row in rows)


def open_groups(states: Mapping[int, RankState]) -> dict[tuple[str, str], int]:
    """Return the process groups that somebody waits in, each with the lowest sequence number that isn't over."""
    found: dict[tuple[str, str], int] = {}
    for state in states.values():
        for one in state.collectives:
            if not (one.is_over or one.is_p2p):
                key = one.backend, one.group
                found[key] = min(found.get(key, one.sequence), one.sequence)
    return found


def newest(state: RankState, group: tuple[str, str]) -> int | None:
    """Return the last sequence number that a rank has begun in a group, None if it has none there."""
    return max((one.sequence for one in state.collectives if (one.backend, one.group) == group and not one.is_p2p),
               default=None)


def is_attended(states: Mapping[int, RankState], group: tuple[str, str], sequence: int) -> bool:
    """Return whether every rank of a group has begun a collective, as far as they tell: then it's the network's."""
    begun = [number for state in states.values() if (number := newest(state, group)) is not None]
    return len(begun) > 1 and min(begun) >= sequence


def waits_in(state: RankState, groups: Collection[tuple[str, str]]) -> bool:
    """Return whether a rank waits in one of these groups."""
    active = under_way(state)
    return active is not None and (active.backend, active.group) in groups


def lowest(rows: Sequence[RankRow], states: Mapping[int, RankState]) -> list[RankRow]:
    """Return those rows whose ranks have begun the fewest collectives; others may wait for them, or be computing."""
    if len(rows) < 2:
        return list(rows)
    groups = open_groups(states)
    count = {row.rank: sum(newest(states[row.rank], group) or 0 for group in groups) for row in rows}
    return [row for row in rows if count[row.rank] == min(count.values())]


def behind(waiting: Sequence[RankRow], states: Mapping[int, RankState], clock: float) -> Cause | None:
    """Return the cause where some ranks in collectives haven't begun what others wait in."""
    groups = open_groups(states)
    whole = {group for group, sequence in groups.items() if is_attended(states, group, sequence)}
    for group, sequence in groups.items():
        last = {row.rank: newest(states[row.rank], group) if row.rank in states else None for row in waiting}
        late = [row for row in waiting if (number := last[row.rank]) is not None and number < sequence
                and not waits_in(states[row.rank], whole)]
        if late:
            ahead = [row for row in waiting if row not in late]
            return Cause(ranks_of(late), f"ranks are in different collectives: {placed(ahead, clock)}; {placed(late)}. "
                         "Each rank must call the same ones in the same order")
    return None


def mismatch(waiting: Sequence[RankRow], states: Mapping[int, RankState]) -> Cause | None:
    """Return the cause where ranks began different operations, or sizes, under one number; the fewer are blamed."""
    for group, sequence in open_groups(states).items():
        kinds: dict[tuple[str, str], list[RankRow]] = {}
        for row in waiting:
            for one in states[row.rank].collectives if row.rank in states else ():
                if (one.backend, one.group) == group and one.sequence == sequence and not one.is_p2p:
                    sizes = one.sizes if one.operation in SAME_SIZES else ""
                    kinds.setdefault((f"{named(one.operation)} {sequence}", sizes), []).append(row)
        if len(kinds) > 1:
            return differing(kinds)
    kinds = {}
    for row in waiting:
        if row.sequence is None:  # its stack says it, its flight recorder nothing
            kinds.setdefault((row.where, ""), []).append(row)
    return differing(kinds) if len(kinds) > 1 else None


def differing(kinds: Mapping[tuple[str, str], Sequence[RankRow]]) -> Cause:
    """Return the cause where ranks are in different operations, each (its name, its sizes)."""
    usual = max(kinds.values(), key=len)
    sizes = len({name for name, _ in kinds}) == 1
    parts = [f"{named_ranks(rows)} in {name}" + (f" of {size}" if sizes else "")
             + (f" at {rows[0].frame}" if rows[0].frame else "") for (name, size), rows in kinds.items()]
    odd = [row for rows in kinds.values() if rows is not usual for row in rows]
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
