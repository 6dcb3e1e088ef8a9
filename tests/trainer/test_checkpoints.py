"""Verified checkpoints: what is complete is distinguished from what is half-written, damaged or in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.checkpoint.verification import (
    MANIFEST,
    Layout,
    find_damage,
    list_checkpoints,
    rotate,
    step_of,
    survey_checkpoints,
    write_manifest,
)

LAYOUT = Layout(data="abc", world_size=2, engine="DeepSpeed ZeRO-1")


def make(root: Path, step: int, complete: bool = True) -> Path:
    folder = root / f"checkpoint-{step}"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * step)
    (folder / "deep" / "state.pt").write_bytes(b"state")
    if complete:
        write_manifest(folder, LAYOUT)
    return folder


def test_a_sealed_checkpoint_is_good(tmp_path: Path) -> None:
    assert find_damage(make(tmp_path, 10)) is None


@pytest.mark.parametrize(("harm", "what"), [
    (lambda folder: (folder / MANIFEST).unlink(), "half-written"),
    (lambda folder: (folder / MANIFEST).write_text("{"), "complete.json is unreadable"),
    (lambda folder: (folder / "weights.bin").unlink(), "weights.bin is missing"),
    (lambda folder: (folder / "weights.bin").write_bytes(b"short"), "weights.bin has changed in size"),
    (lambda folder: (folder / "deep" / "state.pt").write_bytes(b"stats"), "state.pt has changed in content"),
])
def test_damage_is_named(harm: object, what: str, tmp_path: Path) -> None:
    folder = make(tmp_path, 10)
    harm(folder)  # type: ignore[operator]
    assert what in str(find_damage(folder))


def test_survey_finds_the_good_ones_newest_first_and_names_the_bad(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        make(tmp_path, step)
    make(tmp_path, 200, complete=False)
    assert survey_checkpoints(tmp_path) == ([100, 10], {200: "half-written (no complete.json)"})
    assert survey_checkpoints(tmp_path / "nothing") == ([], {})


def test_rotation_keeps_the_newest_good_ones(tmp_path: Path) -> None:
    make(tmp_path, 5, complete=False)
    for step in (10, 20, 100):
        make(tmp_path, step)
    make(tmp_path, 110, complete=False)
    rotate(tmp_path, keep=2)
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [20, 100, 110]


def test_rotation_never_deletes_the_only_good_one(tmp_path: Path) -> None:
    make(tmp_path, 10)
    make(tmp_path, 20, complete=False)
    rotate(tmp_path, keep=1)
    assert survey_checkpoints(tmp_path)[0] == [10]


@pytest.mark.parametrize(("other", "what"), [
    (Layout("abc", 4, "DeepSpeed ZeRO-1"), "was written by 2 ranks, and this training has 4"),
    (Layout("abc", 2, "DeepSpeed ZeRO-3"), "was written by DeepSpeed ZeRO-1"),
    (Layout("xyz", 2, "DeepSpeed ZeRO-1"), "other data"),
])
def test_a_checkpoint_of_another_training_is_told(other: Layout, what: str) -> None:
    assert LAYOUT.difference(LAYOUT) is None
    assert what in str(LAYOUT.difference(other))


def test_equal_settings_with_other_data_are_not_enough() -> None:
    first, other = (Layout(data, 2, "PyTorch", 4, {"--seed": 1}) for data in ("abc", "xyz"))
    assert "other data" in str(first.difference(other))
    assert "with --seed 1, and this training runs with --seed 2" in str(
        first.difference(Layout("abc", 2, "PyTorch", 4, {"--seed": 2})))
