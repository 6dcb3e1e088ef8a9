"""Memory: the estimate against what torch really keeps, what advice saves, and that it is reported when memory runs
out."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TRAINER, WARM, Train
from torch._subclasses.fake_tensor import FakeTensorMode
from warm_trainer import Job

from trainer.errors import is_out_of_memory
from trainer.estimate.advice import fitting, report_lines, savings
from trainer.estimate.memory import MemoryInputs, bytes_needed, moment_bytes, optimizer_bytes, total

SEVEN_B = MemoryInputs(weights=7e9, trained=7e9, layers=32, hidden=4096, intermediate=11008, keys=4096,
                       vocabulary=32000,
                       sequence=1024, micro=8, accumulation=2, ranks=4, stage=1, number=2)


def kept_for_gradients(layers: int, hidden: int, intermediate: int, keys: int, dtype: torch.dtype) -> int:
    """Return the bytes that torch keeps of a Llama's forward pass over 2 rows of 64 tokens."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=300, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=keys * 4 // hidden), dtype=dtype)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "intermediate", "keys"), [(64, 160, 64), (128, 256, 32), (4096, 14336, 1024)])
def test_activations_are_what_torch_keeps(dtype: torch.dtype, hidden: int, intermediate: int, keys: int) -> None:
    """The last is as wide as a model of 8 billion weights; no numbers are computed of it."""
    with FakeTensorMode(allow_non_fake_inputs=True) if hidden > 1000 else contextlib.nullcontext():
        a_layer = (kept_for_gradients(3, hidden, intermediate, keys, dtype)
                   - kept_for_gradients(1, hidden, intermediate, keys, dtype)) / 2
    load = replace(SEVEN_B, layers=1, hidden=hidden, intermediate=intermediate, keys=keys, sequence=64, micro=2,
                   number=dtype.itemsize)
    assert bytes_needed(load)["activations"] == pytest.approx(a_layer, rel=0.02)


def test_a_seven_billion_model_needs_what_the_papers_say() -> None:
    found = bytes_needed(replace(SEVEN_B, ranks=1, stage=0))
    assert (found["weights"], found["gradients"], found["optimizer states"]) == (14e9, 14e9, 84e9)
    assert found["gradient copies"] == 0
    assert bytes_needed(replace(SEVEN_B, stage=1))["gradient copies"] == (2 + 4) * 7e9 / 4
    plain = bytes_needed(replace(SEVEN_B, stage=None, number=4))
    assert (plain["gradients"], plain["gradient copies"]) == (28e9, 0)
    alone = bytes_needed(replace(SEVEN_B, stage=None, number=4, ranks=1, accumulation=1))
    assert alone["gradients"] == 0 < alone["activations"]  # they come as activations go
    assert bytes_needed(replace(SEVEN_B, stage=None, number=4, ranks=1, accumulation=1, micro=1, sequence=1))[
        "gradients"] > 27e9
    split = bytes_needed(replace(SEVEN_B, stage=3))
    assert (split["weights"], split["gradients"], split["optimizer states"]) == (3.5e9 + 2e9, 3.5e9, 21e9)
    assert bytes_needed(replace(SEVEN_B, stage=2, offloads=True))["optimizer states"] == 0


def test_advice_goes_from_gentle_to_hard_and_leaves_out_what_is_done() -> None:
    words = [words for words, _ in savings(SEVEN_B, True, 100e9)]
    assert words[0] == "--per_device_train_batch_size 4 --gradient_accumulation_steps 4"
    assert [word.split("/")[-1] for word in words[1:]] == [
        "--liger", "zero2.json", "--activation_checkpointing", "zero2_offload.json", "zero3.json",
        "zero3_offload.json", "--lora", "--qlora", "--sequence_length 512"]
    saved = dict(savings(SEVEN_B, True, 100e9))
    # The others' gradients, and a second copy of its own.
    assert saved["--deepspeed_config trainer/configs/zero2.json"] == pytest.approx(14e9 * 3 / 4 + 14e9 / 4)
    first, _ = savings(replace(SEVEN_B, micro=5), True, 100e9)[0]
    assert first.startswith("--per_device_train_batch_size 1 --gradient_accumulation_steps 10")
    done = replace(SEVEN_B, checkpoints=True, stage=3, trained=5e7, micro=1)
    left = [words for words, _ in savings(done, False, 1e9)]
    assert not any("zero" in words or "lora" in words or "checkpointing" in words for words in left)
    assert report_lines(SEVEN_B, True, 80e9)[0].startswith("a rank needs about ")


# The model of 1.1 billion weights whose 128 rows of 2,048 tokens a card of 141 GB couldn't hold.
ONE_B = MemoryInputs(weights=1.1e9, trained=1.1e9, layers=22, hidden=2048, intermediate=5632, keys=256,
                     vocabulary=32000, sequence=2048, micro=128, accumulation=1, ranks=1, stage=None, number=2)


# As measured there with 4 rows, with and without Liger: sdpa repeated the keys, and the gradients were copied (4.4 GB).
@pytest.mark.parametrize(("liger", "chunk", "measured"), [(False, None, 40.1e9), (True, 512, 32.4e9)])
def test_the_estimate_is_what_a_gpu_took(liger: bool, chunk: int | None, measured: float) -> None:
    load = replace(ONE_B, micro=4, keys=2048, liger=liger, chunk=chunk)
    assert total(load) + 4 * ONE_B.trained == pytest.approx(measured, rel=0.05)


def test_one_command_is_named_that_fits() -> None:
    advice = report_lines(ONE_B, True, 141e9)[1]
    assert "the same command with --per_device_train_batch_size 16 --gradient_accumulation_steps 8 (about" in advice
    for memory in (24e9, 48e9, 80e9, 141e9):
        found = fitting(ONE_B, True, memory)
        assert found and total(found[1]) <= memory
        assert found[1].micro * found[1].accumulation == 128
    tight = fitting(replace(SEVEN_B, ranks=1, stage=0), True, 48e9)
    assert tight and tight[0].startswith(("--lora", "--deepspeed_config")), tight
    assert fitting(replace(SEVEN_B, ranks=1), True, 1e9) is None
    assert "no single change" in report_lines(replace(SEVEN_B, ranks=1), True, 1e9)[1]


def test_what_seemed_to_fit_and_did_not_gets_less() -> None:
    """Another process may hold a card's memory: the advice is smaller than what failed."""
    small = replace(ONE_B, micro=8)
    found = report_lines(small, True, 141e9)[1]
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 2" in found


def test_chunks_of_logits_and_liger_need_less() -> None:
    whole, chunked = bytes_needed(ONE_B), bytes_needed(replace(ONE_B, chunk=2048))
    assert chunked["logits"] == 2048 * 32000 * 12 + 4 * 32000 * 2048 < whole["logits"] / 50
    adapter = replace(ONE_B, chunk=2048, trained=1e7)
    assert bytes_needed(adapter)["logits"] == 2048 * 32000 * 12
    saved = whole["activations"] - bytes_needed(replace(ONE_B, liger=True))["activations"]
    assert saved == 22 * (2 * 5632 + 2 * 2048) * 128 * 2048 * 2


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "adagrad", "rmsprop", "sgd"])
def test_moments_are_what_the_optimizers_keep(name: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    weight = torch.nn.Parameter(torch.randn(4096))  # flat, as ZeRO hands it on
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True)
    kind, words = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind([weight], **words)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    kept = sum(value.numel() * value.element_size() for value in optimizer.state[weight].values()
               if isinstance(value, torch.Tensor) and value.numel() > 1)
    assert kept / weight.numel() == pytest.approx(moment_bytes(name))


def test_optimizers_are_told_apart_by_their_names() -> None:
    assert [moment_bytes(name) for name in (None, "paged_adamw_8bit", "paged_adamw_32bit", "lion_32bit", "lion_8bit",
                                            "muon")] == [8, 2.03, 8, 4, 1.02, 4]
    small, usual = (optimizer_bytes(replace(SEVEN_B, moments=moments)) for moments in (2, 8))
    assert small < usual


def test_which_errors_say_so() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    text = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(OSError("out of memory"))


# A rank that may have so many bytes more than it has with its libraries loaded: its logits alone want more.
LIMITED = """
import os, resource, runpy, sys
if os.environ.get("RANK", "0") == sys.argv[1]:
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 500_000_000,) * 2)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("ranks", "limited"), [(1, 0), (2, 1)])
def test_a_rank_that_runs_out_ends_the_training_and_says_what_saves_memory(
        ranks: int, limited: int, tmp_path: Path, texts: Path, environment: dict[str, Any], train: Train) -> None:
    run = train("--max_steps", "1", "--sequence_length", "64")  # with data that is tokenized
    assert json.loads((run.path / "run.json").read_text())["memory"]["host"] == []  # so small a model fills none
    (tmp_path / "limited.py").write_text(LIMITED)
    words = [str(tmp_path / "limited.py"), str(limited), str(TRAINER), "--model_name_or_path", "tiny",
             "--dataset_path", str(texts), "--sequence_length", "64", "--per_device_train_batch_size", "1500",
             "--eval_steps", "0", "--eval_fraction", "0", "--max_steps", "2", "--output_dir", str(tmp_path / "large")]
    with Job(os.environ[WARM], words, environment, tmp_path, tmp_path / "log", ranks) as job:
        code, said = job.wait(200), (tmp_path / "log").read_text()
    assert code == 1 and said.count("ran out of memory") == 1, said
    assert f"rank {limited} ran out of memory after step 0 of 2\n" in said, said
    assert "what would save memory, least intrusive first:\n  --per_device_train_batch_size " in said
    assert "this fits: the same command with --per_device_train_batch_size " in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "large" / "run.json").read_text())["status"] == "failed"
