"""A training whose loss stops being a number ends, says when and where, and leaves the good checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, Train

from trainer.checkpoint import verification
from trainer.errors import UserError
from trainer.results.run_folder import RunFolder, as_json
from trainer.steps.finite import FiniteCheck

SHORT = ("--sequence_length", "64", "--per_device_train_batch_size", "2", "--warmup_steps", "0", "--lr_scheduler_type",
         "constant", "--logging_steps", "3", "--max_steps", "9", "--save_steps", "1", "--save_total_limit", "1")


class OneRank:
    """What FiniteCheck asks of ranks."""

    hosts = ("box",)

    def all_reduce_sum(self, *values: float) -> list[float]:
        return [float(value) for value in values]

    def all_gather_json(self, _: str, value: Any) -> list[Any]:
        return [value]


def check(precision: str = "fp32") -> FiniteCheck:
    return FiniteCheck(OneRank(), precision, 3e-4)  # type: ignore[arg-type]


def test_the_first_step_that_was_not_finite_is_told(tmp_path: Path) -> None:
    found = check()
    for step in range(1, 9):
        found.note_loss(torch.tensor(1.0 if step < 5 else math.nan), step)
    with pytest.raises(UserError, match=r"^the training loss of rank 0 \(box\) stopped being finite at step 5; no "
                                        r"checkpoint was saved before. Likely: .* Try: --learning_rate 0.0001$"):
        found.check(tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    verification.write_manifest(tmp_path / "checkpoint-4", verification.Layout("", 1, ""))
    with pytest.raises(UserError, match=r"the last good checkpoint is .*/checkpoint-4\. .* --resume_from_.* auto$"):
        found.check(tmp_path)


def test_gradients_may_overflow_in_fp16_only(tmp_path: Path) -> None:
    half, full = check("fp16"), check("bf16")
    for each in (half, full):
        each.note_gradients(math.inf, skipped=False, step=2)
        each.note_gradients(1.0, skipped=True, step=3)
    half.check(tmp_path)
    with pytest.raises(UserError, match=r"gradients' norm of rank 0 .* at step 2"):
        full.check(tmp_path)


def test_damaged_weights_are_seen(tmp_path: Path) -> None:
    check().check(tmp_path, [torch.ones(3)])
    with pytest.raises(UserError, match="the weights of rank 0"):
        check().check(tmp_path, [torch.ones(3), torch.tensor([1.0, math.inf])])


def test_what_is_not_finite_is_null_in_files(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.add_metrics({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    assert json.loads(run.metrics.read_text(), parse_constant=pytest.fail)["loss"] is None
    assert as_json({"a": [1.0, -math.inf], "b": {"c": math.nan}}) == {"a": [1.0, None], "b": {"c": None}}


def ended(run: Run) -> dict[str, Any]:
    assert "Traceback" not in run.output and "nan" not in (run.path / "metrics.jsonl").read_text().lower()
    record: dict[str, Any] = json.loads((run.path / "run.json").read_text(), parse_constant=pytest.fail)
    return record


@pytest.mark.parametrize("config", [None, "configs/zero1"])
def test_a_training_that_explodes_stops_and_saves_nothing_more(config: str | None, train: Train) -> None:
    run = train(*SHORT, "--learning_rate", "1e30", config=config, expect=1)
    assert "stopped being finite at step 2" in run.output and "Try: --learning_rate 3e+29" in run.output
    assert ended(run)["status"] == "failed"
    for folder in verification.list_checkpoints(run.path / "checkpoints"):
        from safetensors.torch import load_file

        assert all(weight.isfinite().all() for weight in load_file(folder / "model.safetensors").values())
