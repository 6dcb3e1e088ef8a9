"""Checkpoints whose parts lie on several hosts: which is whole, who has what, and what hosts say is not believed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from master.inventory.hostfile import Slots
from master.ssh.route import Access
from master.training.checkpoint_transfer import SEALED, bring_together, lacks, newest_whole, read_seals, tar_size
from master.training.run_folder import RunError, memory_advice

PARTS = "global_step{step}/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def seal(step: int, *ranks: int, more: dict[str, list[int]] | None = None) -> dict[str, Any]:
    files = {PARTS.format(step=step, rank=rank): [10 + rank, 7] for rank in ranks}
    return {"step": step, "layout": {"data": "d", "world_size": 2, "engine": "e", "batch": 4},
            "files": {"model.safetensors": [5, 5], **files, **(more or {})}}


def test_the_newest_of_which_all_parts_are_there_is_taken() -> None:
    seals = {"gpu1": {2: seal(2, 0), 4: seal(4, 0)}, "gpu2": {2: seal(2, 1)}}
    whole = newest_whole(seals)
    assert whole and whole.step == 2
    assert {name: host for name, (host, _) in whole.files.items()} == {
        "model.safetensors": "gpu1", PARTS.format(step=2, rank=0): "gpu1", PARTS.format(step=2, rank=1): "gpu2"}
    seals["gpu2"][4] = seal(4, 1)
    newest = newest_whole(seals)
    assert newest and newest.step == 4
    assert set(json.loads(newest.seal)["files"]) == set(newest.files)
    assert newest_whole({"gpu1": {4: seal(4, 0)}}) is None and newest_whole({}) is None
    seals["gpu2"][4]["layout"]["engine"] = "another"  # of another training
    older = newest_whole(seals)
    assert older and older.step == 2


def test_states_that_every_rank_has_need_one_host() -> None:
    whole = newest_whole({"gpu1": {3: seal(3)}, "gpu2": {}})
    assert whole and whole.is_complete


def test_who_lacks_what() -> None:
    whole = newest_whole({"gpu1": {2: seal(2, 0, 1)}})
    assert whole and lacks(seal(2, 0, 1), whole) == []
    assert lacks(seal(2, 0), whole) == [PARTS.format(step=2, rank=1)] and lacks(None, whole) == list(whole.files)
    assert lacks(seal(2, 0, 1, more={"model.safetensors": [6, 5]}), whole) == ["model.safetensors"]
    assert lacks(seal(2, 0, 1, more={"model.safetensors": [5, 6]}), whole) == ["model.safetensors"]  # other content
    other = seal(2, 0, 1)
    other["layout"]["world_size"] = 3
    assert lacks(other, whole) == list(whole.files)


@pytest.mark.parametrize("name", ["../../.ssh/authorized_keys", "/etc/passwd", "a b", "$(reboot)", "-rf", ""])
def test_names_that_lead_elsewhere_are_not_believed(name: str) -> None:
    said = f"{SEALED}\n{json.dumps(seal(2, 0, 1))}\n{SEALED}\n{json.dumps(seal(4, 0, 1, more={name: [1, 1]}))}\n"
    assert set(read_seals(said)) == {2}


@pytest.mark.parametrize("text", ["", "motd\n", f"{SEALED}\nno JSON", f"{SEALED}\n[]", f'{SEALED}\n{{"step": 1}}'])
def test_what_makes_no_sense_is_left_out(text: str) -> None:
    assert read_seals(text) == {}


def test_a_tar_is_as_long_as_was_said(tmp_path: Path) -> None:
    import io
    import tarfile

    files = {"a": 0, "sub/b": 511, "sub/c": 512, "d": 20_000}
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        for name, size in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"x" * size)
            archive.add(tmp_path / name, name)
    assert len(made.getvalue()) == tar_size(list(files.values()))


def test_the_same_hosts_need_nothing_and_a_run_without_checkpoints_says_so(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Slots("localhost", 2, (0, 1), "CPU")
    run = Path("runs") / "20260101-000000-x"
    assert bring_together(run, [here], [here], {}, Access()) is None
    with pytest.raises(RunError, match=r"can't be brought to other hosts or slots: no host has a whole one"):
        bring_together(run, [here], [Slots("localhost", 1, (0,), "CPU")], {}, Access())
    folder = run / "checkpoints" / "checkpoint-4"
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text(json.dumps(seal(4, 0, 1)))
    assert bring_together(run, [here], [Slots("localhost", 1, (0,), "CPU")], {}, Access()) == folder


def test_a_newer_one_that_is_not_whole_is_told_and_passed_over(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs") / "20260101-000000-x"
    for step, ranks in ((4, (0, 1)), (8, (0,))):
        folder = run / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text(json.dumps(seal(step, *ranks)))
    before = [Slots("localhost", 2, (0, 1), "CPU")]
    found = bring_together(run, before, [Slots("localhost", 1, (0,), "CPU")], {}, Access())
    assert found == run / "checkpoints" / "checkpoint-4" and (found / "complete.json").exists()
    assert not (run / "checkpoints" / "checkpoint-8" / "complete.json").exists()
    assert "parts of checkpoint-8 are nowhere: checkpoint-4 is the newest whole one" in capfd.readouterr().err


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs") / "20260101-000000-y"
    job = subprocess.Popen(["sleep", "60"], env={**os.environ, "LANSPEED_JOB": f"{run.name}-abcdef"})
    try:
        with pytest.raises(RunError, match="localhost: the run goes on there: --stop runs/20260101-000000-y ends it"):
            bring_together(run, [], [Slots("localhost", 1, (0,), "CPU")], {}, Access())
    finally:
        job.kill()
        job.wait()


def test_what_a_run_says_of_memory_is_read(tmp_path: Path) -> None:
    assert memory_advice(tmp_path) == []
    (tmp_path / "run.json").write_text(json.dumps({"memory": {"host": ["a rank needs", "  --lora"]}}))
    assert memory_advice(tmp_path) == ["a rank needs", "  --lora"]
    (tmp_path / "run.json").write_text(json.dumps({"memory": None}))
    assert memory_advice(tmp_path) == []
