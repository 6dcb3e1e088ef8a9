"""Scripts that know nothing of lanspeed, over two hosts: those of docs/own_script.md, and TRL's from its wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from conftest import ROOT, Train
from patience import wait_until

from lab.desk import Desk, assert_nothing_left, launchers
from lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]
CONFIG = str(ROOT / "trainer" / "configs" / "cpu.json")
SCRIPTS = dict(zip(("transformers", "accelerate"), re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "own_script.md").read_text(), re.S), strict=True))
COMMON = ["--use_cpu", "--report_to", "none", "--per_device_train_batch_size", "2"]


@pytest.fixture
def desk(lab: Lab, texts: Path, cache: Path, train: Train) -> Desk:
    """Two hosts, a model and data in the folder that they share with the desk."""
    made = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    trained = train("--max_steps", "1", "--sequence_length", "64", "--num_samples", "0", "--eval_fraction", "0")
    shutil.copytree(trained.path / "model", made.folder / "model")
    (made.folder / "text.txt").write_text("\n".join(path.read_text() for path in sorted(texts.iterdir())))
    for name, row in (("data", {"text": "the quick brown fox"}), ("pairs", {
            "prompt": "the fox is ", "chosen": "quick and brown", "rejected": "a lazy dog"})):
        (made.folder / name).mkdir()
        (made.folder / name / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 32)
    return made


def test_a_script_with_transformers_is_watched_stopped_and_resumes(desk: Desk) -> None:
    script = desk.folder / "mine.py"
    script.write_text(SCRIPTS["transformers"])
    words = [*COMMON, "--model_name_or_path", "model", "--text", "text.txt", "--logging_steps", "2", "--deepspeed",
             CONFIG]
    job = desk.start_script(script, *words, "--max_steps", "5000")
    wait_until(lambda: any(path.stat().st_size for path in desk.folder.glob("runs/*/metrics.jsonl")), 300)
    os.kill(launchers(desk)[0], signal.SIGINT)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    (saved,) = desk.run_folder.glob("checkpoint-*")
    step = int(saved.name.partition("-")[2])
    assert json.loads((desk.run_folder / "run.json").read_text())["status"] == "stopped"
    again = desk.start_script(script, *words, "--max_steps", str(step + 2), before=("--resume", desk.run_folder.name))
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and (desk.run_folder / "model.safetensors").exists(), output
    assert json.loads((desk.run_folder / "run.json").read_text())["status"] == "finished"
    assert (desk.run_folder / f"checkpoint-{step + 2}").is_dir() and f"{step + 2}/{step + 2}" in output
    assert_nothing_left(desk)


def test_a_script_with_accelerate_and_a_config_of_ones_own(desk: Desk, tmp_path: Path) -> None:
    script, config = desk.folder / "line.py", tmp_path / "own.json"  # which no host sees
    script.write_text(SCRIPTS["accelerate"])
    shutil.copy(CONFIG, config)
    job = desk.start_script(script, "--deepspeed", str(config), before=("--no-local-rank",))
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and re.search(r"epoch 7: loss 0\.0\d+ on 2 ranks", output), output
    assert_nothing_left(desk)


@pytest.mark.parametrize(("module", "data"), [("trl.scripts.sft", "data"), ("trl.scripts.dpo", "pairs")])
def test_trls_scripts_run_from_their_wheel(module: str, data: str, desk: Desk) -> None:
    words = [*COMMON, "--model_name_or_path", "model", "--dataset_name", data, "--max_steps", "2", "--bf16", "false"]
    job = desk.start_script(module, *words, "--output_dir", "made", "--deepspeed", CONFIG, before=("--no-local-rank",))
    output, _ = job.communicate(timeout=400)
    assert job.returncode == 0 and (desk.folder / "made" / "model.safetensors").exists(), output
    assert_nothing_left(desk)
