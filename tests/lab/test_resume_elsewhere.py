"""A run that is resumed elsewhere: on other hosts, or more or fewer of them, whose disks have none of its
checkpoints."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Train

from lab.desk import Desk, assert_nothing_left
from lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]

FLAGS = ["--", "--sequence_length", "64", "--per_device_train_batch_size", "2", "--logging_steps", "1",
         "--save_steps", "2", "--num_samples", "0", "--eval_steps", "0", "--lr_scheduler_type", "constant"]


@pytest.fixture
def desk(lab: Lab, texts: Path, cache: Path) -> Iterator[Desk]:
    made = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1, "gpu3": 1})
    for host in made.hosts.values():  # each machine has a disk of its own in the place of the desk
        subprocess.run(host.words("mount", "-t", "tmpfs", "tmpfs", str(made.folder)), check=True)
    yield made
    assert_nothing_left(made)


def on(desk: Desk, *names: str) -> None:
    (desk.folder / "hostfile.txt").write_text("".join(f"{name} slots=1 type=CPU\n" for name in names))


def losses(run: Path) -> dict[int, float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def conversations(folder: Path) -> Path:
    """Write 60 short conversations and return the file."""
    rows = [{"messages": [{"role": "user", "content": f"What comes after {number}?"},
                          {"role": "assistant", "content": f"After {number} comes {number + 1}."}]}
            for number in range(60)]
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_adapter_on_conversations_goes_from_two_hosts_to_another_and_back_to_all(
        desk: Desk, train: Train, tmp_path: Path) -> None:
    data = conversations(tmp_path)
    lora = [*FLAGS, "--lora", "4", "--learning_rate", "1e-2"]
    on(desk, "gpu1", "gpu2")
    code, output = desk.run("--dataset", str(data), *lora, "--max_steps", "2")
    assert code == 0 and "60 documents, `messages`" in output and "What comes after" in output, output
    run = desk.run_folder
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    again = ["--dataset", str(data), "--resume", str(run), *lora]
    code, output = desk.run(*again, "--max_steps", "4")  # the same hosts
    assert code == 0 and "fetching its shards" not in output, output
    on(desk, "gpu3")
    code, output = desk.run(*again, "--max_steps", "6")
    assert code == 0, output
    assert "checkpoint-4: fetching its shards from gpu1, gpu2" in output and "sending missing files to gpu3" in output
    assert "checkpoint-4 was written by 2 ranks, 1 resume it: global batch 4 as before, 2 micro x 2 accum" in output
    on(desk, "gpu1", "gpu2")  # where an older one still lies
    code, output = desk.run(*again, "--max_steps", "8")
    assert code == 0 and "checkpoint-6 was written by 1 ranks, 2 resume it" in output, output
    alone = train(*FLAGS[1:], "--lora", "4", "--learning_rate", "1e-2", "--max_steps", "8",
                  "--per_device_train_batch_size", "4", data=data)
    assert losses(run) == pytest.approx(alone.losses(), abs=1e-3) and len(losses(run)) == 8
    assert not list(run.glob(".gathered"))


def test_a_part_that_is_nowhere_is_told_before_anything_starts(desk: Desk) -> None:
    on(desk, "gpu1", "gpu2")
    code, output = desk.run(*FLAGS, "--max_steps", "2")
    assert code == 0, output
    run = desk.run_folder
    desk.lab.switch.network("ip link set port12 down")  # gpu2 is gone, and with it rank 1's part
    on(desk, "gpu1")
    code, output = desk.run("--connect-timeout", "3", "--resume", str(run), *FLAGS, "--max_steps", "4")
    assert code == 1 and "the checkpoint's shards can't be copied to other hosts or slots: gpu2: TCP" in output, output
