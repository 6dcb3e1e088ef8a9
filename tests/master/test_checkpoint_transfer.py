"""Checkpoints whose parts lie on several hosts: which is whole, who has what, and what hosts say is not believed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from master.inventory.hostfile import Slots
from master.run.checkpoint_transfer import gather_and_send, tar_size
from master.run.merged_checkpoint import MANIFEST_MARK, given, missing_files, newest_complete, read_manifests
from master.run.run_folder import RunError, memory_advice
from master.ssh.route import SshOptions

PARTS = "global_step{step}/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def manifest(step: int, *ranks: int, more: dict[str, list[int]] | None = None) -> dict[str, Any]:
    files = {PARTS.format(step=step, rank=rank): [10 + rank, 7] for rank in ranks}
    return {"step": step, "layout": {"data": "d", "world_size": 2, "engine": "e", "batch": 4},
            "files": {"model.safetensors": [5, 5], **files, **(more or {})}}


def test_the_newest_of_which_all_parts_are_there_is_taken() -> None:
    manifests = {"gpu1": {2: manifest(2, 0), 4: manifest(4, 0)}, "gpu2": {2: manifest(2, 1)}}
    merged = newest_complete(manifests)
    assert merged and merged.step == 2
    assert {name: host for name, (host, _) in merged.files.items()} == {
        "model.safetensors": "gpu1", PARTS.format(step=2, rank=0): "gpu1", PARTS.format(step=2, rank=1): "gpu2"}
    manifests["gpu2"][4] = manifest(4, 1)
    newest = newest_complete(manifests)
    assert newest and newest.step == 4
    assert set(json.loads(newest.manifest())["files"]) == set(newest.files)
    assert newest_complete({"gpu1": {4: manifest(4, 0)}}) is None and newest_complete({}) is None
    manifests["gpu2"][4]["layout"]["engine"] = "another"  # of another training
    older = newest_complete(manifests)
    assert older and older.step == 2


def test_states_that_every_rank_has_need_one_host() -> None:
    merged = newest_complete({"gpu1": {3: manifest(3)}, "gpu2": {}})
    assert merged and merged.is_complete


def stages(*ranks: int) -> dict[str, Any]:
    made = manifest(2, more={f"{what}-0000{rank + 1}-of-00002.safetensors": [10 + rank, 7]
                             for what in ("model", "optimizer") for rank in ranks})
    del made["files"]["model.safetensors"]
    made["files"]["config.json"] = [3, 3]
    made["layout"]["engine"] = "split layers"
    return made


def test_what_stages_have_is_not_sent_to_others_who_get_it_from_their_ranks() -> None:
    manifests = {"gpu1": {2: stages(0)}, "gpu2": {2: stages(1)}, "gpu3": {}}
    merged = newest_complete(manifests)
    assert merged and newest_complete({"gpu1": {2: stages(0)}, "gpu3": {}}) is None
    there = given(manifests, ["gpu1", "gpu2", "gpu3"], merged)
    assert len(there) == 4
    assert missing_files(None, merged, there) == ["config.json"] and missing_files(stages(0), merged, there) == []
    assert set(json.loads(merged.manifest(without=there))["files"]) == {"config.json"}
    gone = given(manifests, ["gpu1", "gpu3"], merged)  # gpu2 trains no more
    assert sorted(missing_files(None, merged, gone)) == [
        "config.json", "model-00002-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]


def test_who_lacks_what() -> None:
    merged = newest_complete({"gpu1": {2: manifest(2, 0, 1)}})
    assert merged and missing_files(manifest(2, 0, 1), merged) == []
    assert missing_files(manifest(2, 0), merged) == [PARTS.format(step=2, rank=1)]
    assert missing_files(None, merged) == list(merged.files)
    assert missing_files(manifest(2, 0, 1, more={"model.safetensors": [6, 5]}), merged) == ["model.safetensors"]
    assert missing_files(manifest(2, 0, 1, more={"model.safetensors": [5, 6]}),
                         merged) == ["model.safetensors"]  # other content
    other = manifest(2, 0, 1)
    other["layout"]["world_size"] = 3
    assert missing_files(other, merged) == list(merged.files)


@pytest.mark.parametrize("name", ["../../.ssh/authorized_keys", "/etc/passwd", "a b", "$(reboot)", "-rf", ""])
def test_names_that_lead_elsewhere_are_not_believed(name: str) -> None:
    good, bad = (json.dumps(each) for each in (manifest(2, 0, 1), manifest(4, 0, 1, more={name: [1, 1]})))
    said = f"{MANIFEST_MARK}\n{good}\n{MANIFEST_MARK}\n{bad}\n"
    assert set(read_manifests(said)) == {2}


@pytest.mark.parametrize("text", ["", "motd\n", f"{MANIFEST_MARK}\nno JSON", f"{MANIFEST_MARK}\n[]",
                                  f'{MANIFEST_MARK}\n{{"step": 1}}'])
def test_what_makes_no_sense_is_left_out(text: str) -> None:
    assert read_manifests(text) == {}


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
    assert gather_and_send(run, [here], [here], {}, SshOptions()) is None
    with pytest.raises(RunError, match=r"can't be copied to other hosts or slots: no host has a complete one"):
        gather_and_send(run, [here], [Slots("localhost", 1, (0,), "CPU")], {}, SshOptions())
    folder = run / "checkpoints" / "checkpoint-4"
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text(json.dumps(manifest(4, 0, 1)))
    assert gather_and_send(run, [here], [Slots("localhost", 1, (0,), "CPU")], {}, SshOptions()) == folder


def test_a_newer_one_that_is_not_whole_is_told_and_passed_over(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs") / "20260101-000000-x"
    for step, ranks in ((4, (0, 1)), (8, (0,))):
        folder = run / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text(json.dumps(manifest(step, *ranks)))
    before = [Slots("localhost", 2, (0, 1), "CPU")]
    found = gather_and_send(run, before, [Slots("localhost", 1, (0,), "CPU")], {}, SshOptions())
    assert found == run / "checkpoints" / "checkpoint-4" and (found / "complete.json").exists()
    assert not (run / "checkpoints" / "checkpoint-8" / "complete.json").exists()
    assert "checkpoint-8 is incomplete: checkpoint-4 is the newest complete one" in capfd.readouterr().err


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs") / "20260101-000000-y"
    job = subprocess.Popen(["sleep", "60"], env={**os.environ, "LANSPEED_JOB": f"{run.name}-abcdef"})
    try:
        with pytest.raises(RunError, match="localhost: the run is still running there: invoke stop runs/2026"):
            gather_and_send(run, [], [Slots("localhost", 1, (0,), "CPU")], {}, SshOptions())
    finally:
        job.kill()
        job.wait()


def test_what_a_run_says_of_memory_is_read(tmp_path: Path) -> None:
    assert memory_advice(tmp_path) == []
    (tmp_path / "run.json").write_text(json.dumps({"memory": {"host": ["a rank needs", "  --lora"]}}))
    assert memory_advice(tmp_path) == ["a rank needs", "  --lora"]
    (tmp_path / "run.json").write_text(json.dumps({"memory": None}))
    assert memory_advice(tmp_path) == []
