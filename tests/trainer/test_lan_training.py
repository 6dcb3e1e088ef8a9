"""--lan_compress and --lan_average in whole trainings, over machines that are played by folders of their own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, WARM
from safetensors.torch import load_file
from ssh_server import free_port
from warm_trainer import Job

from trainer.errors import UserError
from trainer.exchange import allowed
from trainer.options import parse_options

CONFIGS = ROOT / "trainer" / "configs"
SHORT = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--num_samples", "0", "--global_batch_size",
         "12", "--eval_max_sequences", "8"]
NEW = "--lan_compress_from_scratch"


def play(environment: dict[str, str], root: Path, nodes: str, *words: str, fails: bool = False) -> list[str]:
    """Train tiny with a rank on each of these machines ("0,0,1"); return what each rank printed."""
    places, port = nodes.split(","), str(free_port())
    told = [str(ROOT / "trainer" / "train.py"), "--model_name_or_path", "tiny", "--output_dir", "run", *SHORT, *words]
    with contextlib.ExitStack() as stack:
        jobs = []
        for rank, node in enumerate(places):
            folder = root / f"machine-{node}"
            folder.mkdir(exist_ok=True)
            own = {"RANK": str(rank), "LOCAL_RANK": str(places[:rank].count(node)), "WORLD_SIZE": str(len(places)),
                   "LOCAL_WORLD_SIZE": str(places.count(node)), "GROUP_RANK": node, "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port, "LANSPEED_CACHE": str(folder / "cache")}
            jobs.append(stack.enter_context(
                Job(os.environ[WARM], told, {**environment, **own}, folder, root / f"log-{rank}")))
        codes = [job.wait(200) for job in jobs]
    outputs = [(root / f"log-{rank}").read_text() for rank in range(len(places))]
    assert all(bool(code) == fails for code in codes), "\n".join(outputs)
    return outputs


def checkpoint(root: Path, node: int, step: int) -> Path:
    return root / f"machine-{node}" / "run" / "checkpoints" / f"checkpoint-{step}"


def engine_weights(root: Path, node: int, step: int) -> dict[str, torch.Tensor]:
    """The weights as a machine's engine has saved them."""
    path = checkpoint(root, node, step) / f"global_step{step}" / "mp_rank_00_model_states.pt"
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=False)["module"]
    return found


def go_back(root: Path, machines: int) -> None:
    """Remove what a training has saved after step 2."""
    for node in range(machines):
        shutil.rmtree(checkpoint(root, node, 4))
        shutil.rmtree(root / f"machine-{node}" / "run" / "model", ignore_errors=True)


@pytest.mark.parametrize("nodes, preset, how", [
    ("0,1", "zero1", ["--lan_compress"]),
    pytest.param("0,0,1", "zero2", ["--lan_compress", "3"], marks=pytest.mark.slow),
    pytest.param("0,1", "zero0", ["--lan_average", "3"], marks=pytest.mark.slow)])
def test_hosts_have_one_model_and_resume_exactly(
    environment: dict[str, str], tmp_path: Path, nodes: str, preset: str, how: list[str]
) -> None:
    words = ["--deepspeed_config", str(CONFIGS / f"{preset}.json"), *how, NEW]
    outputs = play(environment, tmp_path, nodes, *words)
    error = re.search(r"gradients checked against the sum of all ranks' own: (\S+)", outputs[0])
    assert error and float(error[1]) < 2**-8
    for step in (2, 4):
        first, second = (engine_weights(tmp_path, node, step) for node in range(2))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    model = load_file(tmp_path / "machine-0" / "run" / "model" / "model.safetensors")
    go_back(tmp_path, 2)
    outputs = play(environment, tmp_path, nodes, *words, "--resume_from_checkpoint", "auto")
    assert "resuming after 2" in outputs[0]
    again = load_file(tmp_path / "machine-0" / "run" / "model" / "model.safetensors")
    assert all(torch.equal(model[name], again[name]) for name in model)


@pytest.mark.slow
def test_three_hosts_go_on_with_what_two_had_left_out(environment: dict[str, str], tmp_path: Path) -> None:
    words = ["--deepspeed_config", str(CONFIGS / "zero1.json"), "--lan_compress", NEW]
    play(environment, tmp_path, "0,1", *words)
    go_back(tmp_path, 2)
    shutil.copytree(tmp_path / "machine-0", tmp_path / "machine-2")
    outputs = play(environment, tmp_path, "0,1,2", *words, "--resume_from_checkpoint", "auto")
    assert "what 2 ranks had left out is kept by 3 hosts now" in outputs[0]
    assert "was written by 2 ranks, 3 resume it: global batch 12 as before" in outputs[0]


@pytest.mark.slow
def test_a_run_changes_over_and_back(environment: dict[str, str], tmp_path: Path) -> None:
    """ZeRO-1 over both machines, then an engine on each, then over both again; max_grad_norm stays what it is."""
    words = ["--deepspeed_config", str(CONFIGS / "zero1.json"), "--checkpoint_copies", "1", "--max_grad_norm", "0.01"]
    play(environment, tmp_path, "0,1", *words)
    go_back(tmp_path, 2)
    resume = ["--resume_from_checkpoint", "auto"]
    play(environment, tmp_path, "0,1", *words, "--lan_compress", *resume)
    layout = json.loads((checkpoint(tmp_path, 1, 4) / "complete.json").read_text())["layout"]
    assert (layout["world_size"], layout["shards"]) == (2, 1)
    before = engine_weights(tmp_path, 0, 4)
    play(environment, tmp_path, "0,1", *words, *resume, "--max_steps", "6", "--learning_rate", "1e-3")
    moved = [(before[name].float() - weight.float()).abs().max().item()
             for name, weight in engine_weights(tmp_path, 1, 6).items()]
    assert 0 < max(moved) < 0.01
    for step, clip in ((4, 0.0), (6, 0.01)):  # an engine of one host doesn't clip itself
        path = next(checkpoint(tmp_path, 1, step).glob("global_step*/*optim_states.pt"))
        assert torch.load(path, weights_only=False)["optimizer_state_dict"]["clip_grad"] == clip
    rows = [json.loads(line) for line in (tmp_path / "machine-0" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row][-4:] == [3, 4, 5, 6]


@pytest.mark.slow
def test_zero_2_waits_with_its_gradients_until_the_end_of_a_step(environment: dict[str, str], tmp_path: Path) -> None:
    losses = []
    for preset in ("zero1", "zero2"):
        (root := tmp_path / preset).mkdir()
        outputs = play(environment, root, "0,1", "--deepspeed_config", str(CONFIGS / f"{preset}.json"),
                       "--per_device_train_batch_size", "2")
        assert ("ZeRO-2's gradients cross once a step" in outputs[0]) == (preset == "zero2")
        assert "gradients checked against the sum of all ranks' own" in outputs[0]
        rows = [json.loads(line) for line in (root / "machine-0" / "run" / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4


@pytest.mark.slow
def test_what_is_no_number_stops_all_hosts(environment: dict[str, str], tmp_path: Path) -> None:
    outputs = play(environment, tmp_path, "0,1", "--deepspeed_config", str(CONFIGS / "zero1.json"), "--lan_compress",
                   NEW, "--learning_rate", "1e30", fails=True)
    assert "stopped being finite" in outputs[0]


@pytest.mark.parametrize("words, says", [
    (["--lan_compress"], "add --deepspeed_config"),
    (["--deepspeed", "--lan_compress"], "--lan_compress harms new weights: in 4 bits the loss was 5.6 % higher"),
    (["--deepspeed", "--lan_average", "5"], "--lan_average harms new weights"),
    (["--deepspeed", "--lan_compress", NEW, "--precision", "fp16"], "--precision bf16 or fp32"),
    (["--deepspeed", "--lan_compress", "5"], "invalid choice: 5")])
def test_what_cannot_be_compressed_is_refused_at_once(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as fault:
        parse_options(["--model_name_or_path", "tiny", *words])
    assert fault.value.exit_code == 2


def test_zero_3_splits_the_model_among_hosts_and_is_refused() -> None:
    options = parse_options(["--model_name_or_path", "tiny", "--deepspeed", "--lan_compress", NEW])
    with pytest.raises(UserError, match=re.escape("take trainer/configs/zero2.json")):
        allowed.check(options, {"zero_optimization": {"stage": 3}}, "bf16")
    assert parse_options(["--model_name_or_path", "gpt2", "--deepspeed", "--lan_average", "5"]).lan_compress == 4


@pytest.mark.slow
def test_zero_0_in_32_bits_sends_gradients_in_16(environment: dict[str, str], tmp_path: Path) -> None:
    outputs = play(environment, tmp_path, "0,1", "--deepspeed_config", str(CONFIGS / "zero0.json"))
    found = re.search(r"gradients checked against the sum of all ranks' own: (\S+)", outputs[0])
    assert found and 1e-5 < float(found[1]) < 0.02  # they were rounded on their way
    config = json.loads((tmp_path / "machine-0" / "run" / "ds_config.json").read_text())
    assert config["communication_data_type"] == "bf16"
    record = json.loads((tmp_path / "machine-0" / "run" / "run.json").read_text())
    assert record["traffic"]["formula"] == pytest.approx(2 * record["parameters"], rel=0.01)  # 2 hosts: 2 x 2 x 1/2
