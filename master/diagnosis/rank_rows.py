"""Where each rank is, as a row, and how a person reads it: all-reduce 1516; slow (mine.py:12); rank 3 on gpu2."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from master.diagnosis.rank_states import Collective, Frame, ProcessState, RankState

GONE, STOPPED, SYSTEM_CALL, SILENT = "gone", "stopped", "in a system call", "no answer"
COLLECTIVE, RENDEZVOUS, PYTHON, UNKNOWN = "in a collective", "at the rendezvous", "in Python", "unknown"
WAITING = (COLLECTIVE, RENDEZVOUS)
LIBRARIES = re.compile(r"/(torch|deepspeed)/|/trainer/distributed/communication_time\.py$")  # it wraps torch's
STANDARD = re.compile(r"/lib/python3[0-9.]*/(?!site-packages|dist-packages)|^<frozen ")
C10D = "/torch/distributed/distributed_c10d.py"
COLLECTIVES = {"all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter",
               "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "barrier", "monitored_barrier", "gather",
               "scatter", "send", "recv"}
MEETING = ("/torch/distributed/rendezvous.py", "/trainer/distributed/store.py")  # ranks wait at a store, not in one
NCCL = "nccl"  # whose ranks spin while they wait
CHILD = "_bootstrap"  # multiprocessing's: what is outside of it is a copy of the parent's stack


@dataclass(frozen=True)
class RankRow:
    """Where a rank is: its state (one of the above), operation and its sequence number, since how many seconds, the
    first frame outside torch and deepspeed, and what else there is to say; whether it computes."""

    rank: int
    host: str
    state: str
    operation: str = ""
    sequence: int | None = None
    seconds: float | None = None
    frame: str = ""
    note: str = ""
    is_busy: bool = False

    @property
    def where(self) -> str:
        """The operation with its number: all-reduce 1516."""
        return self.operation + (f" {self.sequence}" if self.sequence is not None else "")


def own_frame(stack: Sequence[Frame]) -> Frame | None:
    """Return the first frame outside torch, deepspeed and, if there is one, Python's own library."""
    outside = [frame for frame in stack if not LIBRARIES.search(frame[0])]
    wanted = [*(frame for frame in outside if not STANDARD.search(frame[0])),
              *(frame for frame in outside if not frame[0].startswith("<")), *outside]
    return wanted[0] if wanted else None


def shown(frame: Frame | None) -> str:
    """Return a frame as a person reads it: slow (mine.py:12)."""
    if frame is None:
        return ""
    file, line, name = frame
    return f"{name} ({'/'.join(file.split('/')[-2:])}:{line})"


def busy_helper(helpers: Sequence[ProcessState]) -> tuple[ProcessState, Frame | None] | None:
    """Return the first data worker that is in code of somebody's own, or held, and where; idle ones wait in Python's
    library."""
    for helper in helpers:
        inside = next((number for number, frame in enumerate(helper.stack) if frame[2] == CHILD), len(helper.stack))
        frame = own_frame(helper.stack[:inside])
        if frame and not STANDARD.search(frame[0]):
            return helper, frame
        if helper.state in "TtD":
            return helper, frame
    return None


def under_way(rank: RankState) -> Collective | None:
    """Return the collective that a rank waits in, by its flight recorder.

    A GPU does what it was given in order, so it's in the oldest one; on CPUs older ones go on beside the newest.
    """
    found = [one for one in rank.collectives if not one.is_over]
    on_gpu = [one for one in found if one.backend == NCCL]
    if on_gpu:
        return max(on_gpu, key=lambda one: one.seconds)
    return min(found, key=lambda one: one.seconds) if found else None


def row_of(host: str, rank: RankState) -> RankRow:
    """Return where a rank is."""
    process = rank.process
    row = RankRow(rank.rank, host, PYTHON, frame=shown(own_frame(process.stack)),
                  is_busy=process.is_busy)
    if process.state in "Tt":
        return replace(row, state=STOPPED, note=f"kill -CONT {process.pid} there continues it")
    if process.state in "ZX":
        return replace(row, state=GONE)
    if process.state == "D" and not process.stack:
        return replace(row, state=SYSTEM_CALL, operation=process.waits_in)
    active = under_way(rank)
    if active and (not process.is_busy or active.backend == NCCL):
        return replace(row, state=COLLECTIVE, operation=named(active.operation), sequence=active.sequence,
                       seconds=active.seconds)
    in_torch = [name for file, _, name in process.stack if file.endswith(C10D)]
    if found := [name for name in in_torch if name in COLLECTIVES]:
        return replace(row, state=COLLECTIVE, operation=named(found[0]))
    if in_torch or any(file.endswith(MEETING) for file, _, _ in process.stack):
        return replace(row, state=RENDEZVOUS, operation="the rendezvous")
    if not process.stack:
        return replace(row, state=SILENT, operation=process.waits_in)
    if held := busy_helper(rank.helpers):
        helper, frame = held
        row = replace(row, frame=shown(frame), note=f"whose data worker (process {helper.pid})",
                      is_busy=helper.is_busy)
        if helper.state in "Tt":
            row = replace(row, operation=f"stopped (kill -CONT {helper.pid} there continues it)")
    if process.state == "D":
        return replace(row, state=SYSTEM_CALL, operation=process.waits_in)
    return row


def named(operation: str) -> str:
    """Return a collective's usual name: all-reduce."""
    return {"_all_gather_base": "all-gather", "_reduce_scatter_base": "reduce-scatter"}.get(
        operation, operation.strip("_").replace("_", "-")) or "a collective"


# -- words ------------------------------------------------------------------------------------------------------------


def together(waiting: Sequence[RankRow], others: int, clock: float) -> str:
    """Return what the waiting ranks do; `others`: how many ranks there are beside the missing ones."""
    who = "all ranks wait" if len(waiting) == others else f"{named_ranks(waiting)} wait{'s' * (len(waiting) == 1)}"
    places = Counter(row.where for row in waiting)
    where = places.most_common(1)[0][0]
    rest = [f"{place} ({count})" for place, count in places.items() if place != where]
    first = "at " if where == "the rendezvous" else "in "
    return f"{who} {first}{where}{since(waiting, clock)}" + (f" or {', '.join(rest)}" if rest else "")


def placed(rows: Sequence[RankRow], clock: float | None = None) -> str:
    """Return ranks with what they wait in."""
    kinds = dict.fromkeys((row.where, row.frame) for row in rows)
    return "; ".join(
        f"{named_ranks([row for row in rows if (row.where, row.frame) == each])} in {each[0]}"
        f"{since(rows, clock) if clock else ''}" + (f" at {each[1]}" if each[1] else "") for each in list(kinds)[:4])


def since(rows: Sequence[RankRow], clock: float) -> str:
    """Return since when the first of these ranks has waited."""
    seconds = [row.seconds for row in rows if row.seconds is not None]
    return f" since {time.strftime('%H:%M:%S', time.localtime(clock - max(seconds)))}" if seconds else ""


def named_ranks(rows: Sequence[RankRow]) -> str:
    """Return ranks as a person reads them: rank 3 on gpu2; ranks 0-2."""
    if len(rows) == 1:
        return f"rank {rows[0].rank} on {rows[0].host}"
    return f"ranks {ranges([row.rank for row in rows])}"


def ranges(ranks: Sequence[int]) -> str:
    """Return numbers in short: 0-2,5."""
    found: list[list[int]] = []
    for rank in sorted(ranks):
        if found and rank == found[-1][-1] + 1:
            found[-1].append(rank)
        else:
            found.append([rank])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in found)


def described(row: RankRow) -> str:
    """Return what a rank does that others wait for."""
    who = f"rank {row.rank} on {row.host}"
    at = f" in {row.frame}" if row.frame else ""
    said = {
        GONE: f"which has ended{f' ({row.note})' if row.note else ''}",
        STOPPED: f"which is stopped by a signal: {row.note}",
        SYSTEM_CALL: f"which is in a system call{f' ({row.operation})' if row.operation else ''}{at}: a disk or a "
                     "network drive that doesn't answer?",
        SILENT: f"which gives no answer{f' (it waits in {row.operation})' if row.operation else ''}",
        UNKNOWN: f"which can't be asked: {row.note}",
        COLLECTIVE: f"which waits in {row.where}{at}", RENDEZVOUS: f"which waits at {row.where}"}
    if row.state != PYTHON:
        return f"{who}, {said[row.state]}"
    does = f" {row.operation}" if row.operation else at or " in Python"
    return f"{who}, {row.note or 'which'} is{does}" + (" and computes" if row.is_busy else "")
