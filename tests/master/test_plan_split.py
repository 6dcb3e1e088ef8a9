"""A plan of layers that hosts share: offered only where no host holds the model, in the best order, cut by both memory
and speed."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from master import plan_ds_config
from master.inventory.hostfile import Slots
from master.plan.layer_split import SplitBatch, best_split, compare_idle, in_order, split_over
from master.plan.machines import Machine, Network
from master.plan.rates import Rate, peak_rates
from master.plan.ways import FULL, LORA, Task
from trainer.estimate.memory import USABLE, inputs_of
from trainer.estimate.shape import of_numbers
from trainer.estimate.speed import Range
from trainer.estimate.stages import choose_counts, head_layers, stage_bytes, step_time

GIB = float(1 << 30)
SHAPE = of_numbers(14.8e9, 48, 5120, 152_064)
LARGE = Machine("large", ("RTX 3090",), 24 * GIB, 64 * GIB, None)
SMALL = Machine("small", ("RTX 3060",), 12 * GIB, 32 * GIB, None)
NETWORK = Network({}, {}, 117e6)
RATES = peak_rates(["RTX 3090", "RTX 3060"])


def task(*kinds: str) -> Task:
    return Task(SHAPE, 1024, 32, 16, kinds or (LORA,))


def test_layers_go_where_they_fit_and_are_done_soonest() -> None:
    plan = best_split(task(), [(LARGE, SMALL)], NETWORK, RATES)
    assert plan and sum(plan.counts) == 48 and plan.micro_batches == 32
    assert all(needed <= USABLE * has for needed, has in zip(plan.device, plan.memory, strict=True))
    large = plan.counts[[machine.name for machine in plan.machines].index("large")]
    assert large > 30  # by speed and memory
    for order in itertools.permutations((LARGE, SMALL)):
        other = split_over(task(), LORA, order, NETWORK, RATES, SplitBatch())
        assert other and plan.rates[1] >= other.rates[1]


def test_no_other_cut_that_fits_is_faster() -> None:
    load = inputs_of(SHAPE, SHAPE.adapter(16), sequence=1024, micro=1, accumulation=16, ranks=1, stage=None, number=2,
                     weight=2.0, checkpoints=True, chunk=256)
    room, speeds, head = [22e9, 11e9], [35.0, 13.0], head_layers(SHAPE)
    counts = choose_counts(load, room, speeds, head)
    assert counts

    def slowest(one: int) -> float:
        return max(one / speeds[0], (48 - one + head) / speeds[1])

    def fits(one: int) -> bool:
        return all(sum(stage_bytes(load, count, rank, 2).values()) <= room[rank]
                   for rank, count in enumerate((one, 48 - one)))

    assert slowest(counts[0]) == min(slowest(one) for one in range(1, 48) if fits(one))
    assert choose_counts(load, [9e9, 9e9], speeds, head) is None


def test_stages_together_hold_what_one_would() -> None:
    load = inputs_of(SHAPE, SHAPE.parameters, sequence=1024, micro=1, accumulation=1, ranks=1, stage=None, number=4)
    parts = [stage_bytes(load, count, rank, 3) for rank, count in enumerate((10, 30, 8))]
    assert sum(part["weights"] for part in parts) == pytest.approx(4 * SHAPE.parameters)
    assert [bool(part.get("logits")) for part in parts] == [False, False, True]


def test_a_step_without_a_network_has_the_bubble_alone() -> None:
    for overlaps in (True, False):
        found = step_time([1.0, 1.0, 1.0], 0.0, 10, overlaps)
        assert found.seconds == 12 and found.idle == pytest.approx([2 / 12] * 3)


@pytest.mark.parametrize(("hosts", "micro_batches", "overlaps", "measured"), [
    (2, 4, False, 2.25), (2, 16, False, 7.72), (3, 4, False, 2.80), (3, 16, False, 9.20), (2, 4, True, 2.02),
    (2, 16, True, 6.64), (3, 4, True, 2.45), (3, 16, True, 7.22)])
def test_a_step_takes_what_was_measured(hosts: int, micro_batches: int, overlaps: bool, measured: float) -> None:
    """Stages that slept for 0.36 s a micro batch, 0.5 MiB at a cut over 100 Mbit/s (benchmarks/split_layers.py)."""
    found = step_time([0.36] * hosts, (512 << 10) / 11.7e6, micro_batches, overlaps)
    assert found.seconds == pytest.approx(measured, rel=0.15)


def test_neighbours_have_the_fast_links() -> None:
    names = ("a", "b", "c")
    machines = tuple(replace(LARGE, name=name) for name in names)
    speed = {("a", "b"): 1e7, ("b", "c"): 1e9, ("a", "c"): 1e9}
    pairs = {**speed, **{(other, one): rate for (one, other), rate in speed.items()}}
    plan = best_split(task(), [machines], Network(pairs, {}), RATES)
    assert plan and plan.machines[1].name == "c"
    slots = [Slots(name, 1, (0,), "NVIDIA") for name in names]
    assert [host.host for host in in_order(slots, plan)] == [machine.name for machine in plan.machines]


@pytest.mark.parametrize(("gpus", "flags", "offered"), [
    ("1xRTX 3090:24GiB,1xRTX 3060:12GiB", [], True), ("1xA100-SXM4-80GB:80GiB,1xRTX 3060:12GiB", ["--lora"], False),
    ("1xRTX 3090:24GiB", [], False), ("1xRTX 3090:6GiB,1xRTX 3060:6GiB", [], False),
    ("1xunknown:24GiB,1xunknown:24GiB", ["--lora"], True)])
def test_it_is_offered_where_no_host_holds_the_model(gpus: str, flags: list[str], offered: bool,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["--parameters", "14.8e9", "--layers", "48", "--hidden", "5120", "--vocab", "152064", "--gpus", gpus]
    assert plan_ds_config.main([*numbers, *flags]) == 0
    output = capsys.readouterr().out
    assert ("with its layers split over the hosts" in output) is offered
    assert plan_ds_config.main([*numbers, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["split"]
    assert (found is not None) is offered
    if offered:
        assert sum(found["layers"]) == 48 and len(found["idle"]) == 2
        assert "beside it: QLoRA" in output and "idle" in output


def test_tied_weights_are_not_split_in_full_training() -> None:
    tied = replace(task(FULL), shape=replace(SHAPE, tied=True))
    big = tuple(replace(LARGE, name=name, memory=200 * GIB) for name in "ab")
    assert best_split(tied, [big], NETWORK, RATES) is None and best_split(task(FULL), [big], NETWORK, RATES)


def test_waiting_is_told_beside_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = Rate(Range(1e13, 1e13, 1e13), "measured")
    plan = best_split(task(), [(LARGE, SMALL)], NETWORK, {"RTX 3090": same, "RTX 3060": same})
    assert plan
    compare_idle(tmp_path, plan)  # a run that failed before its end
    (tmp_path / "run.json").write_text(json.dumps({"waiting": {"idle": [0.25, 0.5]}, "summary": {
        "computed_tokens_per_second": 123.4}}))
    compare_idle(tmp_path, plan)
    said = capsys.readouterr().err
    assert f"idle (as planned): 25% ({plan.idle[0]:.0%}), 50% ({plan.idle[1]:.0%}); tokens/s 123 (" in said
    assert json.loads((tmp_path / "plan.json").read_text())["split"]["layers"] == list(plan.counts)
