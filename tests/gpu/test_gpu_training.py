"""Every way of training on a GPU gives the losses of 32 bits; stop, resume and merge; memory is what was estimated."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, Train

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
LEARN = ("--max_steps", "10", "--sequence_length", "128", "--eval_fraction", "0.3", "--learning_rate", "1e-3",
         "--lr_scheduler_type", "constant", "--seed", "1", "--eval_max_sequences", "100", "--num_samples", "0")
SHAPE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 688,
         "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048,
         "max_position_embeddings": 2048, "tie_word_embeddings": False}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A configuration whose heads the GPU's kernels take."""
    return shape(tmp_path / "shape")


def shape(folder: Path, **more: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE | more))
    return str(folder)


def learn(train: Train, model: str, *words: str, **more: Any) -> Run:
    run = train(*LEARN, "--from_config", *words, model=model, launcher="python", **more)
    assert "on cuda" in run.output, run.output
    return run


@pytest.mark.parametrize(("words", "config", "needs"), [
    ([], None, ""), (["--precision", "fp16"], None, ""), (["--no_liger"], None, ""),
    (["--no_liger", "--attn_implementation", "sdpa"], None, ""),
    (["--no_liger", "--attn_implementation", "flex_attention"], None, ""),
    (["--no_liger", "--attn_implementation", "eager"], None, ""), (["--liger"], None, "liger_kernel"),
    (["--torch_compile", "--no_liger"], None, ""), (["--torch_compile"], None, ""), (["--bf16_residual"], None, ""),
    (["--activation_checkpointing"], None, ""), (["--dataloader_workers", "0"], None, ""),
    ([], "configs/zero1", ""), ([], "configs/zero2", ""), ([], "configs/zero3", ""),
    ([], "configs/zero2_offload", ""), ([], "configs/zero3_offload", ""),
    (["--precision", "fp16"], "configs/zero1", "")])
def test_each_way_learns_what_32_bits_do(words: list[str], config: str | None, needs: str, model: str,
                                         train: Train) -> None:
    if needs and find_spec(needs) is None:
        pytest.skip(f"without {needs}")
    expected = learn(train, model, "--precision", "fp32", name="exact")
    found = learn(train, model, *words, config=config, name="found")
    for step, loss in expected.losses().items():
        assert found.losses()[step] == pytest.approx(loss, rel=5e-3), f"step {step}"
    for step, loss in expected.losses("eval_loss").items():
        assert found.losses("eval_loss")[step] == pytest.approx(loss, rel=5e-3), f"evaluation of step {step}"
    assert json.loads((found.path / "run.json").read_text())["summary"]["peak_bytes"] > 1 << 20


@pytest.mark.parametrize("config", [None, "configs/zero1", "configs/zero3"])
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adafactor", "muon"])
def test_an_optimizer_by_name_learns(name: str, config: str | None, model: str, train: Train) -> None:
    if name.endswith("8bit") and find_spec("bitsandbytes") is None:
        pytest.skip("without bitsandbytes")
    if name == "muon" and config is None:
        pytest.skip("muon is DeepSpeed's")
    run = learn(train, model, "--optim", name, config=config)
    assert run.losses("eval_loss")[10] < run.losses("eval_loss")[0] and "gradients checked" in run.output


@pytest.mark.parametrize("config", [None, "configs/zero1", "configs/zero3"])
def test_dpo_learns_which_answer_is_better(config: str | None, tmp_path: Path, train: Train) -> None:
    rows = [{"prompt": f"where is {number}?", "chosen": f" kindly look at {number}", "rejected": f" go away {number}"}
            for number in range(200)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = train("--max_steps", "10", "--eval_fraction", "0.2", "--num_samples", "0", "--global_batch_size", "16",
                data=tmp_path / "pairs.jsonl", launcher="python", config=config)
    assert "on cuda" in run.output and run.losses("eval_rewards/accuracies")[10] > 0.9


@pytest.mark.parametrize("flag", ["--lora", "--qlora"])
@pytest.mark.parametrize("config", [None, "configs/zero2"])
def test_an_adapter_is_trained_merged_and_resumed(flag: str, config: str | None, model: str, train: Train) -> None:
    if flag == "--qlora" and find_spec("bitsandbytes") is None:
        pytest.skip("without bitsandbytes")
    base = str(learn(train, model, name="base").path / "model")
    words = (*LEARN, flag, "8", "--merge_lora", "--save_steps", "5")
    run = train(*words, model=base, config=config, launcher="python", name="adapter")
    assert run.losses()[10] < run.losses()[1]
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (run.path / name).stat().st_size > 0
    again = train(*words, "--resume_from_checkpoint", str(run.path / "checkpoints" / "checkpoint-5"), model=base,
                  config=config, launcher="python", name="adapter")
    for step in range(6, 11):
        assert again.losses()[step] == pytest.approx(run.losses()[step], rel=2e-2)


def test_a_run_that_stops_resumes_with_the_same_losses(model: str, train: Train) -> None:
    whole = learn(train, model, name="whole")
    learn(train, model, "--save_steps", "5", name="part")
    again = learn(train, model, "--resume_from_checkpoint", str(whole.path.parent / "part/checkpoints/checkpoint-5"),
                  name="part")
    for step in range(6, 11):
        assert again.losses()[step] == pytest.approx(whole.losses()[step], rel=2e-2)


@pytest.mark.parametrize("words", [[], ["--no_liger"], ["--no_liger", "--attn_implementation", "sdpa"],
                                   ["--activation_checkpointing"]])
def test_the_estimate_of_memory_is_what_was_used(words: list[str], tmp_path: Path, train: Train) -> None:
    large = shape(tmp_path / "large", hidden_size=1536, intermediate_size=4096, num_hidden_layers=12,
                  num_attention_heads=12, num_key_value_heads=4, vocab_size=8192)
    run = train(*LEARN, "--from_config", "--sequence_length", "1024", "--per_device_train_batch_size", "8", *words,
                model=large, data=None, launcher="python")
    record = json.loads((run.path / "run.json").read_text())
    needs = sum(record["memory"]["needs"].values())
    assert record["summary"]["peak_bytes"] == pytest.approx(needs, rel=0.05)


def test_more_rows_than_the_card_holds_end_with_a_command_that_fits(tmp_path: Path, train: Train) -> None:
    large = shape(tmp_path / "large", hidden_size=2048, intermediate_size=5632, num_hidden_layers=16,
                  num_attention_heads=32, num_key_value_heads=4, vocab_size=8192)
    rows = 1 << math.ceil(math.log2(card_bytes() / 400e6))  # far more than fit: a row of 2,048 tokens takes 1 to 3 GB
    words = ("--from_config", "--sequence_length", "2048", "--max_steps", "4", "--eval_fraction", "0",
             "--num_samples", "0")
    run = train(*words, "--per_device_train_batch_size", str(rows), model=large, data=None, launcher="python",
                expect=1, name="too-large")
    advice = next(line for line in run.output.splitlines() if line.startswith("this fits: "))
    flags = advice.partition("command with ")[2].partition(" (about")[0].split()
    fits = train(*words, *flags, model=large, data=None, launcher="python", name="fits")
    assert json.loads((fits.path / "run.json").read_text())["summary"]["peak_bytes"] < card_bytes()


def card_bytes() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)
