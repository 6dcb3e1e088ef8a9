"""The plan with gradients in few bits between hosts: offered where it wins, and only there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from master.plan.launch_default import wanted_of
from master.plan.machines import of_words, speed_of
from master.plan.ways import FULL, Task, all_estimates
from trainer.estimate.shape import of_numbers
from trainer.estimate.traffic import compressed_bytes, residual_bytes

TOOL = ROOT / "master" / "plan_ds_config.py"
HALF_B = ["--parameters", "0.5e9", "--layers", "24", "--hidden", "896", "--full"]
PAIR = "1xRTX 4090:24GiB/64GiB,1xRTX 4090:24GiB/64GiB"


def plan(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *HALF_B, *words], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("gpus, network, offered", [
    (PAIR, "2.5Gbit", True), (PAIR, "100Gbit", False), ("2xRTX 4090:24GiB/64GiB", "1Gbit", False)])
def test_it_is_offered_where_it_wins(gpus: str, network: str, offered: bool) -> None:
    found: dict[str, Any] = json.loads(plan("--gpus", gpus, "--network", network, "--json").stdout)
    assert (found["compressed"] is not None) == offered
    assert any("--lan_compress" in sentence for sentence in found["sentences"]) == offered
    assert found["best"]["lan_compress"] is None  # it isn't taken unasked
    if offered:
        assert found["compressed"]["tokens_per_second"][1] > 1.1 * found["best"]["tokens_per_second"][1]


def test_asked_for_it_is_planned_and_written(tmp_path: Path) -> None:
    words = ["--gpus", PAIR, "--network", "2.5Gbit", "--lan-compress"]
    found = json.loads(plan(*words, "--json").stdout)
    assert found["compressed"] is None and found["best"]["lan_compress"] == 4
    assert all(way["zero_stage"] < 3 for way in found["ways"] if len(way["machines"]) > 1)
    assert all(way["lan_compress"] is None for way in found["ways"] if len(way["machines"]) == 1)
    assert found["best"]["sent_bytes_per_step"] == pytest.approx(compressed_bytes(found["parameters"], 4, 2), rel=1e-6)
    done = plan(*words, "--write", "ds_config.json", cwd=tmp_path)
    assert "4 bits between hosts" in done.stdout
    zero = json.loads((tmp_path / "ds_config.json").read_text())["zero_optimization"]
    assert zero["stage"] < 3
    done = plan("--gpus", PAIR, "--lan-compress", "5")
    assert done.returncode == 2 and "invalid choice: 5" in done.stderr


def test_the_trainers_flags_are_read() -> None:
    assert wanted_of(["--lora"]).bits == 0
    assert wanted_of(["--lan_compress"]).bits == 4 and wanted_of(["--lan-compress", "3"]).bits == 3
    found = wanted_of(["--lan_average", "5"])
    assert (found.bits, found.averages) == (4, True)


def test_each_host_has_all_states_and_what_was_left_out() -> None:
    machines, network = of_words("2xRTX 3090:24GiB/64GiB,2xRTX 3090:24GiB/64GiB", speed_of("1Gbit"))
    shape = of_numbers(1e9, 16, 2048, 32000)
    plain, few = (next(each for each in all_estimates(Task(shape, 512, 64, kinds=(FULL,), bits=bits),
                                                      [tuple(machines)], network, {})
                       if (each.way.stage, each.way.offload) == (1, "")) for bits in (0, 4))
    assert few.device["optimizer states"] == 2 * plain.device["optimizer states"]  # of 2 ranks, not of 4
    assert few.device["compression"] == pytest.approx(residual_bytes(2, 2, False) * shape.parameters)
    assert residual_bytes(2, 2, False) == 1.5 and residual_bytes(1, 4, True) == 6.5
