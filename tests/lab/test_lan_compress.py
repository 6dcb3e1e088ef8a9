"""`invoke train --hostfile` with --lan_compress over whole machines: bytes on the wire, and hosts that die."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from lab.desk import Desk, assert_nothing_left, output_after_a_kill
from lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]
FLAGS = ["--config", str(ROOT / "trainer" / "configs" / "zero1.json"), "--", "--sequence_length", "64",
         "--per_device_train_batch_size", "2", "--logging_steps", "1", "--lan_compress", "--lan_compress_from_scratch"]


@pytest.mark.parametrize("slots", [{"gpu1": 1, "gpu2": 1}, {"gpu1": 2, "gpu2": 1, "gpu3": 1, "gpu4": 1}],
                         ids=["2 hosts", "4 hosts, 5 ranks"])
def test_hosts_send_what_the_formula_says_and_save_one_model(
    slots: dict[str, int], lab: Lab, texts: Path, cache: Path
) -> None:
    desk = Desk(lab, texts, cache, slots)
    code, output = desk.run(*FLAGS, "--max_steps", "6", "--save_steps", "3")
    assert code == 0, output
    record = json.loads((desk.run_folder / "run.json").read_text())
    traffic = record["traffic"]
    assert traffic["exchange_seconds"] > 0
    assert traffic["counted"] == pytest.approx(traffic["formula"], rel=0.1)
    assert traffic["counted"] < 0.2 * traffic["uncompressed"]
    assert re.search(r"network +\S+ GB a step from gpu1 \(\S+ by the formula\), \S+ uncompressed; an exchange takes",
                     output), output
    assert "sent a step" in output and "gradients checked against the sum of all ranks' own" in output
    code, output = desk.run("--resume", str(desk.run_folder), *FLAGS, "--max_steps", "8")
    assert code == 0 and "resuming after 6" in output, output
    assert_nothing_left(desk)


@pytest.mark.parametrize("victim", ["gpu1", "gpu2"])
def test_a_host_that_dies_in_an_exchange_ends_the_job(victim: str, lab: Lab, texts: Path, cache: Path) -> None:
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    output_after_a_kill(desk, desk.start(*FLAGS, "--max_steps", "100000"), victim)
    assert_nothing_left(desk)
