"""Why a training hangs, by what its ranks tell: each kind of hang, and what looks like one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import extreme

from master.diagnosis.hang_cause import Cause, find_cause
from master.diagnosis.hang_report import HangReport, explain
from master.diagnosis.rank_rows import RankRow, own_frame, ranges, row_of
from master.diagnosis.rank_states import Collective, Connection, Frame, HostState, ProcessState, RankState, rank_of
from master.ssh.route import SshError
from master.ssh.worker_message import SCHEMA, check_message

TORCH = "/v/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"
IN_TORCH: tuple[Frame, ...] = ((TORCH, 3252, "all_reduce"), ("/home/me/mine.py", 10, "train"))
IN_PYTHON: tuple[Frame, ...] = (("/usr/lib/python3.11/subprocess.py", 5, "wait"), ("/home/me/mine.py", 33, "load"))
CLOCK = 1_700_000_000.0


def process(stack: Sequence[Frame] = IN_TORCH, state: str = "S", cpu: int = 0, waits_in: str = "futex") -> ProcessState:
    return ProcessState(4000, state, waits_in, cpu, (tuple(stack),) if stack else ())


def collective(sequence: int, operation: str = "all_reduce", is_over: bool = False, group: str = "0",
               sizes: str = "[[8]]") -> Collective:
    return Collective(group, "gloo", operation, sequence, False, is_over, sizes, 60.0)


def waiting(rank: int, *collectives: Collective, connections: Sequence[Connection] = ()) -> RankState:
    return RankState(rank, process(), (), tuple(collectives) or (collective(16),), tuple(connections))


def elsewhere(rank: int, stack: Sequence[Frame] = IN_PYTHON, **others: object) -> RankState:
    return RankState(rank, process(stack, **others), (), (collective(15, is_over=True),), ())  # type: ignore[arg-type]


def cause_of(*ranks: RankState, gone: dict[int, str] | None = None) -> Cause:
    """The cause for two hosts with two ranks each."""
    return report_of(*ranks, gone=gone).cause


def report_of(*ranks: RankState, gone: dict[int, str] | None = None) -> HangReport:
    from master.diagnosis.hang_report import HostAnswer

    node = {"load": 1.0, "cores": 2, "disk_free_bytes": 10**9, "ram_bytes": 2**31, "ram_available_bytes": 2**30}
    answers = {host: HostAnswer(HostState({one.rank: one for one in ranks if one.rank in own}, node), {})
               for host, own in (("gpu1", (0, 1)), ("gpu2", (2, 3)))}
    return explain(answers, {"gpu1": (0, 1), "gpu2": (2, 3)}, gone, lambda: CLOCK)


def test_a_rank_in_python_is_what_the_others_wait_for() -> None:
    found = cause_of(waiting(0), waiting(1), waiting(2), elsewhere(3))
    assert found.ranks == (3,) and found.is_hang
    assert found.sentence.startswith("all ranks wait in all-reduce 16 since ")
    assert found.sentence.endswith(", except rank 3 on gpu2, which is in load (me/mine.py:33)")


def test_a_rank_that_computes_may_only_be_slow() -> None:
    found = cause_of(waiting(0), waiting(1), waiting(2), elsewhere(3, cpu=99))
    assert found.ranks == (3,) and not found.is_hang and found.sentence.endswith("and computes")


def test_of_two_ranks_in_python_the_one_further_back_is_named() -> None:
    ahead = replace(elsewhere(1), collectives=(collective(17, is_over=True),))
    found = cause_of(waiting(0), ahead, waiting(2), elsewhere(3))
    assert found.ranks == (3,) and found.sentence.startswith("ranks 0,2 wait in all-reduce 16")


@pytest.mark.parametrize(("state", "said"), [
    (elsewhere(3, state="T"), "which is stopped by a signal: kill -CONT 4000 there continues it"),
    (elsewhere(3, (), state="D", waits_in="nfs_wait"), "which is in a system call (nfs_wait): a disk or"),
    (elsewhere(3, (), waits_in="pipe_read"), "which gives no answer (it waits in pipe_read)")])
def test_what_the_kernel_says_of_a_rank_is_told(state: RankState, said: str) -> None:
    found = cause_of(waiting(0), waiting(1), waiting(2), state)
    assert found.ranks == (3,) and said in found.sentence


def test_a_rank_that_has_ended_is_named_with_its_exit_code() -> None:
    found = cause_of(waiting(0), waiting(1), waiting(2), gone={3: "exited with code 0"})
    assert found.ranks == (3,) and "except rank 3 on gpu2, which has ended (exited with code 0)" in found.sentence


def test_a_host_that_cannot_be_asked_is_named() -> None:
    good = report_of(waiting(0), waiting(1)).answers["gpu1"]
    found = explain({"gpu1": good, "gpu2": SshError("gpu2", "TCP", "no route")}, {"gpu1": (0, 1), "gpu2": (2, 3)})
    assert found.cause.ranks == (2, 3) and "rank 2 on gpu2, which can't be asked: TCP: no route" in found.cause.sentence
    assert "  gpu2: TCP: no route" in found.lines()


def test_another_operation_under_the_same_number_is_a_mismatch() -> None:
    found = cause_of(waiting(0), waiting(1, collective(16, "broadcast")), waiting(2), waiting(3))
    assert found.ranks == (1,)
    assert found.sentence.startswith("ranks are in different collectives: ranks 0,2-3 in all-reduce 16 at train "
                                     "(me/mine.py:10); rank 1 on gpu1 in broadcast 16")


def test_a_broadcast_that_its_root_has_left_is_a_mismatch_too() -> None:
    root = waiting(0, collective(16, "broadcast", is_over=True), collective(17))
    found = cause_of(root, waiting(1), waiting(2), waiting(3))
    assert found.ranks == (0,) and "rank 0 on gpu1 in broadcast 16" in found.sentence


def test_other_sizes_are_a_mismatch_where_they_must_agree() -> None:
    found = cause_of(waiting(0), waiting(1), waiting(2), waiting(3, collective(16, sizes="[[16]]")))
    assert found.ranks == (3,) and "ranks 0-2 in all-reduce 16 of [[8]]" in found.sentence
    gathers = [waiting(rank, collective(16, "gather", sizes=f"[[{rank}]]")) for rank in range(4)]
    assert cause_of(*gathers).ranks == ()


def test_a_rank_in_the_collective_of_another_group_is_behind() -> None:
    late = waiting(2, collective(15, is_over=True), collective(1, "barrier", group="5"))
    found = cause_of(waiting(0), waiting(1), late, waiting(3))
    assert found.ranks == (2,) and "rank 2 on gpu2 in barrier 1" in found.sentence


def connected(own: str, peer: str, waits: int, repeats: int, acknowledged: int, received: int) -> Connection:
    return Connection(own, peer, waits, repeats, acknowledged, received)


def test_the_direction_in_which_nothing_arrives_is_told() -> None:
    a, b = "10.0.0.1 40000", "10.0.0.2 50000"
    one_way = [waiting(1, connections=[connected(a, b, 900, 6, 5001, 700)]),
               waiting(2, connections=[connected(b, a, 0, 0, 701, 5000)])]
    found = cause_of(waiting(0), *one_way, waiting(3))
    assert found.ranks == () and "none is missing" in found.sentence
    assert "gpu2 receives nothing from gpu1 (packets repeated 6 times)" in found.sentence
    other_way = [waiting(1, connections=[connected(a, b, 900, 6, 5001, 700)]),
                 waiting(2, connections=[connected(b, a, 0, 0, 701, 5900)])]
    assert "gpu1 receives nothing from gpu2" in cause_of(waiting(0), *other_way, waiting(3)).sentence
    assert "no connection between the hosts is stuck" in cause_of(*map(waiting, range(4))).sentence


def test_a_collective_that_one_rank_has_finished_is_the_networks() -> None:
    finished = waiting(0, collective(16, is_over=True), collective(17))
    assert cause_of(finished, waiting(1), waiting(2), waiting(3)).ranks == ()
    apart = waiting(2, collective(30, is_over=True, group="1"), collective(16))
    others = [waiting(rank, collective(16, is_over=True), collective(31, group="1")) for rank in (0, 1, 3)]
    assert cause_of(others[0], others[1], apart, others[2]).ranks == ()


def test_a_gpu_is_in_the_oldest_collective_that_it_was_given() -> None:
    given = [replace(collective(number), backend="nccl", seconds=100.0 - number) for number in (16, 17, 18)]
    ahead = [replace(waiting(rank, *given), process=process(cpu=100)) for rank in (0, 1, 2)]
    found = cause_of(*ahead, elsewhere(3))
    assert found.ranks == (3,) and found.sentence.startswith("all ranks wait in all-reduce 16 since ")


def test_ranks_that_all_compute_wait_for_nobody() -> None:
    found = cause_of(*[elsewhere(rank, cpu=99) for rank in range(4)])
    assert not found.is_hang
    assert found.sentence.startswith("no rank waits for another: rank 0 on gpu1, which is in load")


def test_a_data_worker_is_told_with_its_rank() -> None:
    child = (("/home/me/rows.py", 7, "decode"), ("/usr/lib/python3.11/multiprocessing/process.py", 314, "_bootstrap"),
             ("/home/me/mine.py", 1, "<module>"))
    idle = (("/usr/lib/python3.11/multiprocessing/queues.py", 103, "get"), *child[1:])
    rank = replace(elsewhere(3), helpers=(process(idle), replace(process(child), pid=4001)))
    found = cause_of(waiting(0), waiting(1), waiting(2), rank)
    assert "rank 3 on gpu2, whose data worker (process 4001) is in decode (me/rows.py:7)" in found.sentence
    held = replace(elsewhere(3), helpers=(replace(process((), state="T"), pid=4001),))
    found = cause_of(waiting(0), waiting(1), waiting(2), held)
    assert "(process 4001) is stopped (kill -CONT 4001 there continues it)" in found.sentence


def test_ranks_that_agree_share_a_line_of_the_table_and_the_cause_comes_first() -> None:
    lines = report_of(waiting(0), waiting(1), waiting(2), elsewhere(3)).table()
    assert [line.split()[0] for line in lines] == ["rank", "3", "0-1", "2"]
    assert lines[2].split() == "0-1 gpu1 in a collective all-reduce 16 60 train (me/mine.py:10)".split()  # noqa: SIM905


def test_what_a_host_says_cannot_move_the_cursor() -> None:
    lines = report_of(waiting(0), waiting(1), waiting(2), elsewhere(3, (("/x/\x1b[2J.py", 1, "f\x1b[31m"),))).lines()
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("high", [True, False])
def test_the_worst_that_a_host_may_say_is_told_and_kept(high: bool, tmp_path: Path) -> None:
    from master.diagnosis.hang_report import HostAnswer

    said = extreme(json.loads(SCHEMA.read_text())["$defs"]["ranks"], high)
    check_message("ranks", said, "evil")
    state = HostState({rank["rank"]: rank_of(rank) for rank in said["ranks"]}, said["node"])
    report = explain({"evil": HostAnswer(state, {})}, {"evil": (0, *state.ranks)})
    assert all(line.isprintable() for line in report.lines())
    assert all(line.isprintable() for line in report.keep(tmp_path).read_text().splitlines())


def test_frames_and_ranges_as_a_person_reads_them() -> None:
    frozen: tuple[Frame, ...] = (("<frozen importlib._bootstrap>", 241, "_call"), (TORCH, 1, "x"))
    assert own_frame(IN_PYTHON) == IN_PYTHON[1] and own_frame(frozen) == frozen[0]
    assert own_frame([(TORCH, 1, "x")]) is None
    assert ranges([3, 0, 1, 2, 7]) == "0-3,7"
    assert row_of("gpu1", RankState(0, process(cpu=99), (), (collective(16),), ())).state == "in a collective"


def test_rows_alone_are_enough_for_a_cause() -> None:
    rows = [RankRow(0, "gpu1", "at the rendezvous", "the rendezvous"),
            RankRow(1, "gpu1", "in Python", frame="f (a.py:1)")]
    assert find_cause(rows, {}, CLOCK).sentence == (
        "all ranks wait at the rendezvous, except rank 1 on gpu1, which is in f (a.py:1)")
