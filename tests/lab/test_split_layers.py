"""`invoke train --split-layers` over whole machines: what one process learns, what is sent, a host that dies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from patience import wait_until
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lab.desk import (
    Desk,
    assert_nothing_left,
    job_processes,
    launchers,
    output_after_a_kill,
    wait_for_steps,
)
from lab.hosts import Lab
from lab.memory_limit import limited
from trainer.data.tokenizer import own_tokenizer

pytestmark = [pytest.mark.lab, pytest.mark.slow]
HIDDEN, TOKENS, MICRO_BATCHES = 256, 128, 8
STEPS = ("--max_steps", "6", "--learning_rate", "1e-3", "--max_grad_norm", "0.2", "--sequence_length", str(TOKENS),
         "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", str(MICRO_BATCHES), "--logging_steps",
         "1", "--precision", "fp32", "--save_steps", "3", "--eval_max_sequences", "8")


@pytest.fixture
def model(tmp_path: Path, texts: Path) -> Path:
    """A Llama with six layers, and in style/ an adapter to begin with."""
    folder = tmp_path / "model"
    tokenizer = own_tokenizer([path.read_text() for path in sorted(texts.iterdir())], vocabulary=400)
    torch.manual_seed(3)
    shape: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": 6,
                             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1,
                                  **shape)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    adapter: Any = get_peft_model(made, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapter.peft_config["default"].base_model_name_or_path = str(folder)
    adapter.save_pretrained(str(folder / "style"))
    return folder


def figures(run: Path, key: str) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in rows if key in row]


def trained_alone(model: Path, texts: Path, cache: Path, folder: Path, *more: str) -> Path:
    """Train the same in one process; return the run."""
    done = subprocess.run(
        [sys.executable, ROOT / "trainer" / "train.py", "--model_name_or_path", str(model), "--dataset_path",
         str(texts), *STEPS, "--num_samples", "0", "--output_dir", str(folder / "alone"), *more],
        capture_output=True, text=True, env={**os.environ, "LANSPEED_CACHE": str(cache / "gpu1")}, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder / "alone"


def test_hosts_learn_together_what_one_process_learns(model: Path, lab: Lab, texts: Path, cache: Path, tmp_path: Path
                                                      ) -> None:
    adapter = ("--adapter", str(model / "style"))
    alone = trained_alone(model, texts, cache, tmp_path, *adapter)
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1, "gpu3": 1})
    (desk.folder / "two.txt").write_text("gpu1 slots=1 type=CPU\ngpu2 slots=1 type=CPU\n")
    code, output = desk.run("--model", str(model), "--hostfile", "two.txt", "--split-layers", "4,2", "--", *STEPS,
                            *adapter)
    assert code == 0 and "layers        4 + 2" in output and "DeepSpeed does nothing" in output, output
    for key in ("loss", "eval_loss", "grad_norm"):
        assert figures(desk.run_folder, key) == pytest.approx(figures(alone, key), abs=1e-5), key
    sent, least = figures(desk.run_folder, "sent_per_step")[-1], MICRO_BATCHES * TOKENS * HIDDEN * 4
    assert least < sent < 1.08 * least, sent / least
    (desk.run_folder / "checkpoints" / "checkpoint-6").rename(tmp_path / "away")
    code, output = desk.run("--model", str(model), "--resume", str(desk.run_folder), "--split-layers", "1,2,3", "--",
                            *STEPS, *adapter)
    assert code == 0 and "resuming after 3" in output and "layers        1 + 2 + 3" in output, output
    assert figures(desk.run_folder, "loss") == pytest.approx(figures(alone, "loss"), abs=1e-5)
    assert_nothing_left(desk)


def large_model(folder: Path, texts: Path) -> int:
    """Write a Llama of 1.5 billion weights in float32; return their bytes."""
    tokenizer = own_tokenizer([path.read_text() for path in sorted(texts.iterdir())], vocabulary=400)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1,
                                  hidden_size=1024, intermediate_size=19_000, num_hidden_layers=24,
                                  num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()}
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    numbers = 0.02 * torch.randn(max(shape.numel() for shape in shapes.values()))
    places = {}
    for name, shape in shapes.items():
        save_file({name: numbers[: shape.numel()].reshape(shape).clone()}, folder / f"{name}.safetensors",
                  {"format": "pt"})
        places[name] = f"{name}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return 4 * sum(shape.numel() for shape in shapes.values())


def test_hosts_hold_together_what_none_holds_alone(lab: Lab, texts: Path, cache: Path, tmp_path: Path) -> None:
    limit, folder = 4_000_000_000, tmp_path / "large"
    assert large_model(folder, texts) > 1.5 * limit
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    few = ("--", "--sequence_length", "8", "--max_steps", "2", "--lora", "4", "--precision", "fp32",
           "--logging_steps", "1", "--eval_max_sequences", "1", "--gradient_accumulation_steps", "2",
           "--per_device_train_batch_size", "1", "--save_steps", "0")
    with limited(desk.hosts["gpu1"], limit), limited(desk.hosts["gpu2"], limit):
        code, output = desk.run("--model", str(folder), "--include", "gpu1", *few)
        told = "a rank's weights are 6.0 GB, and it has 4.0 GB of memory: more hosts hold it together: --lora --split-"
        assert code == 1 and told in output, output
        code, output = desk.run("--model", str(folder), "--split-layers", *few)
        assert code == 0, output
        assert re.search(r"layers        12 \+ 12, about 3\.\d of 4\.0 \+ 3\.\d of 4\.0 GB", output)
    assert len(figures(next(run for run in (desk.folder / "runs").iterdir() if (run / "model").exists()), "loss")) == 2
    shutil.rmtree(folder)  # six gigabytes


def test_each_host_keeps_its_layers_on_a_disk_of_its_own(model: Path, lab: Lab, texts: Path, cache: Path, tmp_path: Path
                                                         ) -> None:
    same = ("--lr_scheduler_type", "constant", "--save_steps", "2", "--eval_steps", "2")  # however many steps there are
    alone = trained_alone(model, texts, cache, tmp_path, *same)
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1, "gpu3": 1})
    for host in desk.hosts.values():
        subprocess.run(host.words("mount", "-t", "tmpfs", "tmpfs", str(desk.folder)), check=True)
    (desk.folder / "hostfile.txt").write_text("gpu1 slots=1 type=CPU\ngpu2 slots=1 type=CPU\n")
    code, output = desk.run("--model", str(model), "--split-layers", "4,2", "--", *STEPS, *same,
                            "--max_steps", "4")
    assert code == 0, output
    (desk.folder / "hostfile.txt").write_text("gpu1 slots=1 type=CPU\ngpu3 slots=1 type=CPU\n")  # and gpu2's part
    code, output = desk.run("--model", str(model), "--resume", str(desk.run_folder), "--split-layers", "3,3", "--",
                            *STEPS, *same)
    assert code == 0 and "resuming after 4" in output and "layers        3 + 3" in output, output
    assert "checkpoint-4: fetching its shards from gpu1, gpu2" in output  # of gpu1 what everybody needs
    for key in ("loss", "eval_loss", "grad_norm"):
        assert figures(desk.run_folder, key) == pytest.approx(figures(alone, key), abs=1e-5), key
    whole, split = (AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
                    for run in (alone, desk.run_folder))
    assert all(torch.allclose(whole[name], split[name], atol=1e-5) for name in whole)
    assert_nothing_left(desk)


def test_a_stage_that_dies_ends_the_job_by_its_name(model: Path, lab: Lab, texts: Path, cache: Path) -> None:
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    job = desk.start("--model", str(model), "--split-layers", "--", *STEPS, "--lora", "--max_steps", "100000")
    output_after_a_kill(desk, job, "gpu2")
    assert_nothing_left(desk)


def test_a_cable_may_be_out_for_five_seconds_and_longer_ends_the_job_by_its_host(model: Path, lab: Lab, texts: Path,
                                                                                cache: Path) -> None:
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    job = desk.start("--model", str(model), "--patience", "10", "--grace", "5", "--split-layers", "--", *STEPS,
                     "--lora", "--max_steps", "100000", "--save_steps", "0", "--eval_steps", "0")
    wait_for_steps(desk, job)
    lab.switch.network("ip link set port12 down")
    time.sleep(5)  # less than its patience
    lab.switch.network("ip link set port12 up")
    before = len(figures(desk.run_folder, "loss"))
    wait_until(lambda: len(figures(desk.run_folder, "loss")) > before + 20)
    lab.switch.network("ip link set port12 down")
    started = time.monotonic()
    output, _ = job.communicate(timeout=60)
    assert time.monotonic() - started < 15
    assert job.returncode == 1 and "gpu2: connection: no contact for 10 s" in output, output
    wait_until(lambda: not job_processes(desk))


def test_a_full_disk_at_one_stage_leaves_no_half_checkpoint(model: Path, lab: Lab, texts: Path, cache: Path) -> None:
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    for host in desk.hosts.values():
        subprocess.run(host.words("mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(desk.folder)), check=True)
    job = desk.start("--model", str(model), "--split-layers", "--", *STEPS, "--max_steps", "100000", "--save_steps",
                     "10", "--eval_steps", "0")
    wait_for_steps(desk, job)
    run, filler = desk.run_folder, f"{desk.folder}/filler"
    subprocess.run(desk.hosts["gpu2"].words("sh", "-c", f"cat /dev/zero > {filler}"), stderr=subprocess.PIPE)
    wait_until(lambda: "could not be saved (gpu2: " in desk.logged("gpu1"))
    assert sealed(desk, run, "gpu1") == sealed(desk, run, "gpu2") == []
    subprocess.run(desk.hosts["gpu2"].words("rm", filler), check=True)
    wait_until(lambda: bool(sealed(desk, run, "gpu1")))
    os.kill(launchers(desk)[0], signal.SIGINT)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and re.search(r"could not be saved \(gpu2: .*: No space left", output), output
    kept = sealed(desk, run, "gpu1")
    assert kept and kept == sealed(desk, run, "gpu2")
    code, output = desk.run("--model", str(model), "--resume", str(run), "--split-layers", "5,1", "--", *STEPS,
                            "--max_steps", str(kept[-1] + 1), "--eval_steps", "0")
    assert code == 0 and f"resuming after {kept[-1]:,}" in output, output


def sealed(desk: Desk, run: Path, host: str) -> list[int]:
    """The steps of the checkpoints that are complete on a machine's own disk."""
    words = desk.hosts[host].words("sh", "-c", f"ls {run}/checkpoints/checkpoint-*/complete.json")
    found = subprocess.run(words, capture_output=True, text=True).stdout
    return sorted(int(step) for step in re.findall(r"checkpoint-(\d+)/", found))
