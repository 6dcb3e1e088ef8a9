"""The plan against the truth of the lab: bytes on the wire by the network cards, and a plan that is trained by."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from lab.desk import Desk, assert_nothing_left
from lab.hosts import Lab
from trainer.estimate.traffic import Exchange, step_bytes

pytestmark = [pytest.mark.lab, pytest.mark.slow]
TOOL = ROOT / "master" / "plan_ds_config.py"


@pytest.mark.parametrize(("slots", "micro_steps"), [
    ({"gpu1": 1, "gpu2": 1}, 3), ({f"gpu{number}": 1 for number in range(1, 5)}, 2)],
    ids=["2 hosts, 3 micro steps", "4 hosts, 2 micro steps"])
def test_a_step_sends_what_the_formula_says(slots: dict[str, int], micro_steps: int, lab: Lab, texts: Path,
                                            cache: Path) -> None:
    desk = Desk(lab, texts, cache, slots)
    words = desk.script_words(ROOT / "tests" / "lab" / "wire_bytes.py", str(micro_steps))
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line.partition("@@ ")[2]) for line in done.stdout.splitlines() if "@@ " in line]
    assert len(found) == (15 if len(slots) > 2 else 13)
    ranks = sum(slots.values())
    for way, weights, sent, most in found:
        expected = step_bytes(Exchange(ranks=ranks, trained=weights, weights=weights, accumulation=micro_steps, **way))
        assert sent == pytest.approx(expected, rel=0.05), (way, sent / weights, expected / weights)
        assert most == pytest.approx(expected, rel=0.06), way
    assert_nothing_left(desk)


@pytest.fixture
def desk(lab: Lab, texts: Path, cache: Path) -> Iterator[Desk]:
    made = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    yield made
    assert_nothing_left(made)


def test_measured_planned_written_and_trained_without_an_edit(desk: Desk) -> None:
    """`invoke hostfile`, `invoke plan --measure --write`, `invoke train`: what the plan says is what the run makes."""
    def tool(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = desk.words()
        at = command.index(str(ROOT / "master" / "launch_training.py"))
        return subprocess.run([*command[:at], str(ROOT / "master" / name), *words], capture_output=True, text=True,
                              timeout=240, stdin=subprocess.DEVNULL)

    found = tool("generate_hostfile.py", "--nodes", "gpu1,gpu2", "--cpu-slots", "1", "--host-keys", "accept-new")
    assert found.returncode == 0, found.stderr
    checked = tool("check_cluster.py", "--network", "--hostfile", "hostfile.txt", "--host-keys", "accept-new")
    assert checked.returncode == 0, checked.stdout
    made = tool("plan_ds_config.py", "--model", "tiny", "--dataset", str(desk.texts), "--measure", "--write",
                "ds_config.json", "--full", "--sequence-length", "64", "--global-batch", "16", "--host-keys",
                "accept-new")
    assert made.returncode == 0, made.stderr
    assert re.search(r"gpu2: [0-9,]+ tokens/s with micro batch 8", made.stderr), made.stderr
    known = json.loads((desk.folder / "cluster.json").read_text())["measured"]
    assert [each["host"] for each in known] == ["gpu1", "gpu2"]
    assert "(measured)" in made.stdout and "wrote ds_config.json; train so:" in made.stdout
    command = made.stdout.splitlines()[-1].split()
    assert command[:4] == ["invoke", "train", "--model", "tiny"]
    words = [*command[4:], "--max_steps", "20", "--logging_steps", "1", "--num_samples", "0"]
    at = words.index("--")
    done = tool("launch_training.py", "--model", "tiny", *words[:at], "--dataset", str(desk.texts), "--host-keys",
                "accept-new", *words[at:])
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(r"the plan said ([0-9,]+) tokens/s, the run made ([0-9,]+)", done.stderr)
    assert told, done.stderr
    again = tool("plan_ds_config.py", "--model", "tiny", "--sequence-length", "64", "--json")
    assert json.loads(again.stdout)["best"]["speed_source"] == "measured", again.stderr
    said, got = (float(word.replace(",", "")) for word in told.groups())
    assert said / 3 < got < 3 * said, told[0]  # all hosts share this machine's cores
