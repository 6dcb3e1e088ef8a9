"""DPO over machines that have no disk in common."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from lab.desk import Desk, assert_nothing_left
from lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]


@pytest.mark.parametrize("config", ["zero3"])
def test_two_machines_learn_which_answer_is_better(config: str, lab: Lab, tmp_path: Path, cache: Path) -> None:
    choose, data = random.Random(5), lab.folder / "pairs"
    data.mkdir()
    names = ["".join(choose.choices("aeioubdfklmnprst", k=5)) for _ in range(160)]
    (data / "pairs.jsonl").write_text("\n".join(json.dumps({
        "prompt": f"where is {name}?", "chosen": f" kindly look at {name}", "rejected": f" go away {name}"})
        for name in names))
    desk = Desk(lab, data, cache, {"gpu1": 1, "gpu2": 1})
    for host in desk.hosts.values():
        subprocess.run(host.words("mount", "-t", "tmpfs", "tmpfs", str(desk.folder)), check=True)
    flags = ["--config", str(ROOT / "trainer" / "configs" / f"{config}.json"), "--", "--logging_steps", "2",
             "--eval_steps", "5", "--eval_fraction", "0.2", "--num_samples", "0", "--global_batch_size", "16"]
    code, output = desk.run(*flags, "--max_steps", "10")
    assert code == 0, output
    assert "DPO" in output and "gradients checked against the sum of all ranks' own" in output
    rows = [json.loads(line) for line in (desk.run_folder / "metrics.jsonl").read_text().splitlines()]
    right = {row["step"]: row["eval_rewards/accuracies"] for row in rows if "eval_rewards/accuracies" in row}
    assert right[0] == 0 and right[10] > 0.9
    code, output = desk.run("--resume", str(desk.run_folder), *flags, "--max_steps", "12")
    assert code == 0 and "resuming after 10" in output, output
    assert_nothing_left(desk)
