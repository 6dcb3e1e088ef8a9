"""`--min-hosts`: a host that is lost for good takes no step with it, though every host has a disk of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import wait_until

from lab.desk import Desk, assert_nothing_left, launchers, ranks_on
from lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]

FLAGS = ["--", "--sequence_length", "64", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--save_steps",
         "50", "--num_samples", "0", "--eval_steps", "0", "--lr_scheduler_type", "constant", "--max_steps", "100000"]


@pytest.fixture
def desk(lab: Lab, texts: Path, cache: Path) -> Iterator[Desk]:
    made = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1, "gpu3": 1})
    for host in made.hosts.values():
        subprocess.run(host.words("mount", "-t", "tmpfs", "tmpfs", str(made.folder)), check=True)
    yield made
    assert_nothing_left(made)


def steps(desk: Desk) -> list[int]:
    (path,) = desk.folder.glob("runs/*/metrics.jsonl")
    return [row["step"] for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]


def test_a_lost_host_is_left_out_and_used_again(desk: Desk) -> None:
    job = desk.start("--min-hosts", "2", "--patience", "8", "--grace", "5", "--connect-timeout", "3", *FLAGS)
    wait_until(lambda: job.poll() is not None or "checkpoint" in str(list(desk.folder.glob("runs/*/metrics.jsonl")))
               or (list(desk.folder.glob("runs/*/metrics.jsonl")) and max(steps(desk), default=0) > 110))
    assert job.poll() is None, job.communicate()[0]
    desk.lab.switch.network("ip link set port11 down")  # gpu1, with rank 0 and a third of every checkpoint
    wait_until(lambda: ranks_on(desk, "gpu2") == [])
    wait_until(lambda: ranks_on(desk, "gpu2") and ranks_on(desk, "gpu3"))
    before = len(steps(desk))
    wait_until(lambda: len(steps(desk)) > before + 60)
    found = steps(desk)
    assert found == list(range(1, len(found) + 1))  # nothing lost, nothing twice
    assert ranks_on(desk, "gpu1") == []
    desk.lab.switch.network("ip link set port11 up")
    os.kill(ranks_on(desk, "gpu3")[0], signal.SIGKILL)
    wait_until(lambda: ranks_on(desk, "gpu1"))
    before = len(steps(desk))
    wait_until(lambda: len(steps(desk)) > before + 20)
    for pid in launchers(desk):
        os.kill(pid, signal.SIGINT)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert "continuing without gpu1, which the next restart uses again" in output, output
    assert "was written by 3 ranks, 2 resume it: global batch 6 as before, 1 micro x 3 accumulation" in output, output
    assert "was written by 2 ranks, 3 resume it: global batch 6 as before" in output, output
    found = steps(desk)
    assert found == list(range(1, len(found) + 1))
