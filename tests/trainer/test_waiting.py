"""Between ranks: whose time goes by in waiting, a flag that all see at the same step, what a rank says that it does."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import RunRanks

from trainer.distributed import heartbeat
from trainer.distributed.communication_time import time_shares


def test_the_rank_that_waits_least_is_the_slowest() -> None:
    found = time_shares([5.0, 2.0, 7.0], [10.0, 10.0, 10.0], ["gpu1", "gpu2", "gpu3"])
    assert found == {"network": 0.2, "slowest": 0.4, "slowest_rank": 1, "slowest_host": "gpu2",
                     "hosts": {"gpu1": 0.5, "gpu2": 0.2, "gpu3": 0.7}}


@pytest.mark.parametrize("steps", [[10.0], [0.0, 10.0], []])
def test_without_steps_of_several_ranks_nothing_is_said(steps: list[float]) -> None:
    assert time_shares([1.0] * len(steps), steps, ["gpu1"] * len(steps)) is None


def test_real_collectives_are_measured_in_steps_alone(run_ranks: RunRanks) -> None:
    one, other = run_ranks("""
import time
import torch
import torch.distributed as dist
from trainer.distributed.communication_time import CommunicationTimer

waiting = CommunicationTimer("cpu")
waiting.install()
value = torch.ones(4)
dist.all_reduce(value)
told["outside"] = waiting.waited_s
for step in range(2):
    waiting.on_step_begin()
    if ranks.rank == 1:
        time.sleep(0.5)  # the other waits for this one
    if step == 0:
        dist.all_reduce(value)
    else:
        work = dist.all_gather([torch.zeros(4), torch.zeros(4)], value, async_op=True)
        told["pending"] = type(work.is_completed()).__name__  # what else a pending one can do
        work.wait()
    waiting.on_step_end()
told.update(waited=waiting.waited_s, steps=waiting.steps_s, value=value.tolist())
""")
    for told in (one, other):
        assert told["outside"] == 0 and told["pending"] == "bool" and told["value"] == [4.0] * 4
        assert told["waited"] <= told["steps"] and told["steps"] >= 1.0
    assert one["waited"] >= 0.9 and one["waited"] > other["waited"]
    found = time_shares([one["waited"], other["waited"]], [one["steps"], other["steps"]], ["gpu1", "gpu2"])
    assert found and found["slowest_rank"] == 1


@pytest.mark.parametrize("raisers", ["0", "1", "01", ""])
def test_a_flag_is_seen_by_all_ranks_at_the_same_step(raisers: str, run_ranks: RunRanks) -> None:
    told = run_ranks("""
import time
from trainer.distributed.shared_flag import SharedFlag

flag = SharedFlag(ranks)
told["seen"] = []
for step in range(6):
    if step == 2 + ranks.rank and str(ranks.rank) in sys.argv[1]:
        flag.raised = True
    time.sleep(0.02 * ranks.rank)  # nor do ranks come to a step at the same time
    told["seen"].append(flag.check())
flag.close()
""", raisers)
    first = {"0": 2, "1": 3, "01": 2, "": 6}[raisers]  # the step at which one is raised, seen by all at the next
    assert [each["seen"] for each in told] == [[step > first for step in range(6)]] * 2


@pytest.mark.parametrize("raisers", ["0", "1", ""])
def test_where_steps_are_long_a_flag_is_seen_at_once(raisers: str, run_ranks: RunRanks) -> None:
    told = run_ranks("""
import time
from trainer.distributed import shared_flag

shared_flag.LONG_STEP_S = 0.1
flag = shared_flag.SharedFlag(ranks)
told["seen"] = []
for step in range(7):
    flag.raised = step == 4 and str(ranks.rank) in sys.argv[1]
    time.sleep(0.2 if ranks.rank else 0.01)  # one of the ranks is slow: the others know
    told["seen"].append(flag.check())
flag.close()
""", raisers)
    assert [each["seen"] for each in told] == [[bool(raisers) and step == 4 for step in range(7)]] * 2


def test_a_rank_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    heartbeat.report("to nobody")
    monkeypatch.setenv("LANSPEED_PROGRESS", str(tmp_path))
    heartbeat.report("saving")
    heartbeat.report("step 1/9", often=True)  # too soon after the other
    assert (tmp_path / "3").read_text() == "saving"
    heartbeat.report("step 2/9")
    assert (tmp_path / "3").read_text() == "step 2/9"
    monkeypatch.setenv("LANSPEED_PROGRESS", str(tmp_path / "gone"))
    heartbeat.report("to a folder that isn't there")
