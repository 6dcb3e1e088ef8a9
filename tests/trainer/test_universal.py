"""Going on with another number of ranks: the same losses, at every ZeRO stage; batches; what lacks is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run, Train

from trainer.checkpoint import universal
from trainer.errors import UserError
from trainer.options import Options, parse_options

SHORT = ("--sequence_length", "64", "--per_device_train_batch_size", "2", "--lr_scheduler_type", "constant",
         "--save_steps", "2", "--eval_steps", "0")


def losses_after(run: Run, step: int) -> list[float]:
    return [loss for at, loss in run.losses().items() if at > step]


@pytest.mark.parametrize(("before", "after", "config", "more"), [
    (2, 1, "configs/zero1", ()),
    pytest.param(1, 2, "configs/zero1", (), marks=pytest.mark.slow),
    pytest.param(2, 1, "configs/zero2", (), marks=pytest.mark.slow),
    pytest.param(2, 1, "configs/zero3", (), marks=pytest.mark.slow),
    pytest.param(1, 2, "configs/zero3", (), marks=pytest.mark.slow),
    pytest.param(2, 1, "configs/zero1", ("--lora", "4"), marks=pytest.mark.slow),
    pytest.param(2, 1, "configs/zero3", ("--lora", "4"), marks=pytest.mark.slow),
    pytest.param(2, 1, None, (), marks=pytest.mark.slow),
    pytest.param(1, 2, None, (), marks=pytest.mark.slow)])
def test_a_training_goes_on_with_other_ranks(train: Train, before: int, after: int, config: str | None,
                                             more: tuple[str, ...]) -> None:
    words = (*SHORT, *more, *(("--gradient_accumulation_steps", "2") if before == 1 else ()))
    whole = train(*words, "--max_steps", "5", ranks=before, config=config, name="whole")
    train(*words, "--max_steps", "2", ranks=before, config=config, name="parts")
    parts = train(*words, "--max_steps", "5", "--resume_from_checkpoint", "auto", ranks=after, config=config,
                  name="parts")
    assert f"was written by {before} ranks, {after} resume it: global batch 4 as before" in parts.output
    assert losses_after(parts, 2) == pytest.approx(losses_after(whole, 2), abs=2e-4)
    assert not list(parts.path.glob("checkpoints/*/*universal*"))


def options(micro: int, accumulation: int) -> Options:
    return parse_options(["--model_name_or_path", "tiny", "--per_device_train_batch_size", str(micro),
                          "--gradient_accumulation_steps", str(accumulation)])


@pytest.mark.parametrize(("micro", "accumulation", "rows", "world", "expected"), [
    (8, 1, 16, 1, (8, 2)), (8, 2, 16, 1, (8, 2)), (8, 1, 16, 4, (4, 1)), (8, 1, 48, 4, (6, 2)), (4, 4, 16, 16, (1, 1)),
    (3, 1, 8, 1, (2, 4))])
def test_a_step_keeps_its_rows(micro: int, accumulation: int, rows: int, world: int, expected: tuple[int, int]) -> None:
    found = universal.keep_global_batch(options(micro, accumulation), rows, world)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == expected


def test_rows_that_cannot_be_shared_are_told() -> None:
    with pytest.raises(UserError, match=r"16 sequences in this run, which 3 ranks .* resume with 1, 2, 4, 8, 16 ranks"):
        universal.keep_global_batch(options(8, 1), 16, 3)


@pytest.mark.parametrize(("rows", "world", "batch"), [(8, 3, 9), (16, 3, 15), (2, 4, 4), (9, 4, 8), (16, 4, 16)])
def test_a_flexible_batch_is_the_nearest_that_the_ranks_can_share(rows: int, world: int, batch: int) -> None:
    found = universal.keep_global_batch(replace(options(8, 1), flexible_batch=True), rows, world)
    assert found.batch_per_rank * world == batch and found.per_device_train_batch_size <= 8


def test_parts_that_are_elsewhere_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    (folder / "global_step2").mkdir(parents=True)
    assert universal.missing_shards(folder, 2) is None  # states that every rank has whole
    for name in ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_2_mp_rank_00_optim_states.pt"):
        (folder / "global_step2" / name).touch()
    assert universal.optimizer_shards(folder) == {0, 2}
    assert "is missing the optimizer shards of rank 1, 3" in str(universal.missing_shards(folder, 4))


def test_a_part_that_cannot_be_read_ends_the_conversion(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    (folder / "global_step2").mkdir(parents=True)
    (folder / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="can't be converted for another number of ranks: "):
        universal.convert(folder)
