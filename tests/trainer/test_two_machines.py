"""Two machines without a shared disk, played by two launchers with folders and caches of their own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TRAINER, WARM
from ssh_server import free_port
from warm_trainer import Job

from trainer.checkpoint.universal import optimizer_shards
from trainer.checkpoint.verification import find_damage


def train_on_two(environment: dict[str, str], root: Path, *words: str, torchrun: bool = False) -> list[str]:
    """Run one training over both machines, each with a launcher or forked; return what each printed."""
    port = str(free_port())
    told = [str(TRAINER), "--model_name_or_path", "tiny", "--output_dir", "run", "--save_steps", "2",
            "--logging_steps", "1", *words]
    folders = [root / f"machine-{node}" for node in range(2)]
    codes, outputs = [], []
    with contextlib.ExitStack() as stack:
        jobs: list[Job | subprocess.Popen[bytes]] = []
        for node, folder in enumerate(folders):
            folder.mkdir(exist_ok=True)
            own = {**environment, "LANSPEED_CACHE": str(folder / "cache")}
            if torchrun:
                command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}",
                           "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}", *told]
                log = stack.enter_context((folder / "log").open("wb"))
                jobs.append(subprocess.Popen(command, env=own, cwd=folder, stdout=log, stderr=log))
            else:
                place = {"RANK": str(node), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
                         "GROUP_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                jobs.append(stack.enter_context(Job(os.environ[WARM], told, {**own, **place}, folder, folder / "log")))
        codes = [job.wait(200) for job in jobs]
        outputs = [(folder / "log").read_text() for folder in folders]
    assert codes == [0, 0], "\n".join(outputs)
    return outputs


def checkpoints(root: Path) -> list[list[str]]:
    return [sorted(path.name for path in (root / f"machine-{node}" / "run" / "checkpoints").iterdir())
            for node in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["zero1"])
def test_each_keeps_its_shards_and_both_resume_from_what_both_have(
    environment: dict[str, str], tmp_path: Path, preset: str
) -> None:
    config = ["--deepspeed_config", str(ROOT / "trainer" / "configs" / f"{preset}.json"), "--max_steps", "6"]
    # No dataset: Python's own text, which goes from rank 0 to the other machine.
    train_on_two(environment, tmp_path, *config, torchrun=preset == "zero1")
    assert checkpoints(tmp_path) == [["checkpoint-4", "checkpoint-6"]] * 2
    for node in range(2):
        folder = tmp_path / f"machine-{node}" / "run" / "checkpoints" / "checkpoint-6"
        shards = list(folder.glob("*/*zero_pp_rank_*optim_states.pt"))
        assert [f"zero_pp_rank_{node}_" in shard.name for shard in shards] == [True]
    assert (tmp_path / "machine-0" / "run" / "model").exists()
    assert not (tmp_path / "machine-1" / "run" / "model").exists()

    (tmp_path / "machine-1" / "run" / "checkpoints" / "checkpoint-6" / "complete.json").unlink()
    outputs = train_on_two(environment, tmp_path, *config, "--resume_from_checkpoint", "auto")
    assert "checkpoint-6 is half-written" in outputs[0]
    assert re.search(r"world size +2", outputs[0])
    assert "resuming after 4" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["zero3"])
def test_a_checkpoint_with_copies_is_whole_on_either_machine(
    environment: dict[str, str], tmp_path: Path, preset: str
) -> None:
    config = ["--deepspeed_config", str(ROOT / "trainer" / "configs" / f"{preset}.json"), "--checkpoint_copies", "1",
              "--max_steps"]
    train_on_two(environment, tmp_path, *config, "4")
    sums = []
    for node in range(2):
        folder = tmp_path / f"machine-{node}" / "run" / "checkpoints" / "checkpoint-4"
        assert find_damage(folder) is None and optimizer_shards(folder) == {0, 1}
        files = json.loads((folder / "complete.json").read_text())["files"]
        sums.append({name: files[name] for name in files if "zero_pp_rank_" in name})
    assert sums[0] == sums[1] and len(sums[0]) >= 2
    outputs = train_on_two(environment, tmp_path, *config, "6", "--resume_from_checkpoint", "auto")
    assert "resuming after 4" in outputs[0]


@pytest.mark.slow
def test_different_data_on_the_two_is_told(environment: dict[str, str], tmp_path: Path) -> None:
    for node in range(2):
        (tmp_path / f"machine-{node}").mkdir()
        (tmp_path / f"machine-{node}" / "data.txt").write_text(f"The text of machine {node}. " * 50)
    with pytest.raises(AssertionError, match="differs from that on"):
        train_on_two(environment, tmp_path, "--dataset_path", "data.txt", "--max_steps", "1", torchrun=True)
