"""DeepSpeed's config and the flags agree, or one line says where they don't; nothing compiles without need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.distributed import compilation, deepspeed_config
from trainer.errors import UserError
from trainer.options import Options, parse_options


def options(*words: str) -> Options:
    return parse_options(["--model_name_or_path", "tiny", "--deepspeed", "c.json", *words])


def test_values_of_the_config_become_the_flags() -> None:
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5, "bf16": {"enabled": True},
              "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1, "eps": "auto"}}}
    found = deepspeed_config.adopt_values(options(), config, 2)
    assert (found.per_device_train_batch_size, found.max_grad_norm, found.precision) == (4, 0.5, "bf16")
    assert (found.learning_rate, found.weight_decay, found.gradient_accumulation_steps) == (1e-4, 0.1, None)


@pytest.mark.parametrize(("words", "config", "message"), [
    (["--per_device_train_batch_size", "8"], {"train_micro_batch_size_per_gpu": 4},
     "$.train_micro_batch_size_per_gpu is 4, but --per_device_train_batch_size 8 was given"),
    (["--learning_rate", "1e-3"], {"optimizer": {"params": {"lr": 1e-4}}}, "$.optimizer.params.lr is 0.0001"),
    (["--precision", "fp32"], {"bf16": {"enabled": True}}, "$.bf16.enabled is true, but --precision fp32"),
    ([], {"optimizer": {"params": {"lr": 1e-4}}, "scheduler": {"params": {"warmup_max_lr": 1e-3}}},
     "$.scheduler.params.warmup_max_lr is 0.001, but $.optimizer.params.lr is 0.0001: give one value"),
    (["--lr_scheduler_type", "cosine"], {"scheduler": {"type": "WarmupDecayLR"}},
     "$.scheduler.type is WarmupDecayLR, but --lr_scheduler_type cosine was given"),
    (["--max_steps", "5"], {"scheduler": {"params": {"total_num_steps": 9}}},
     "$.scheduler.params.total_num_steps is 9, but --max_steps 5 was given"),
    (["--num_epochs", "2"], {"scheduler": {"params": {"total_num_steps": 9}}}, "but --num_epochs 2 was given"),
    (["--adam_epsilon", "1e-8"], {"optimizer": {"params": {"eps": 1e-6}}}, "$.optimizer.params.eps is 1e-06"),
    ([], {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16 and bf16 are both enabled"),
    ([], {"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}, "$.train_batch_size is 7, which is not"),
])
def test_a_contradiction_is_told(words: list[str], config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        deepspeed_config.adopt_values(options(*words), config, 2)
    assert message in str(caught.value)


def test_the_schedule_of_a_config_is_taken_over() -> None:
    config = {"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.99], "eps": 1e-6}},
              "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_num_steps": 3}}}
    found = deepspeed_config.adopt_values(options("--lr_scheduler_type", "cosine"), config, 2)
    assert (found.adam_beta1, found.adam_beta2, found.adam_epsilon) == (0.8, 0.99, 1e-6)
    assert (found.max_steps, found.warmup_steps, found.lr_scheduler_type) == (9, 3, deepspeed_config.OF_CONFIG)
    off = {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
    assert deepspeed_config.adopt_values(options(), off, 2).precision == "fp32"


@pytest.mark.parametrize(("words", "total", "expected"), [
    ([], 32, (8, 2)), ([], 4, (2, 1)), (["--per_device_train_batch_size", "4"], 32, (4, 4)),
    (["--gradient_accumulation_steps", "8"], 32, (2, 8))])
def test_a_global_batch_is_split(words: list[str], total: int, expected: tuple[int, int]) -> None:
    found = deepspeed_config.adopt_values(options(*words), {"train_batch_size": total}, 2)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == expected


def test_adam_of_a_config_becomes_torch_s_unless_told_otherwise() -> None:
    config: dict[str, Any] = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}
    assert deepspeed_config.complete_config(config, on_cpu=True) == []
    assert config["optimizer"]["params"] == {"torch_adam": True, "fused": True}
    own = {"optimizer": {"type": "Adam", "params": {"torch_adam": False}},
           "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert deepspeed_config.complete_config(own, on_cpu=False) == ["cpu_adam"]
    assert deepspeed_config.complete_config({"optimizer": {"type": "Lion"}}, on_cpu=True) == ["lion"]


def test_stage_3_always_gathers_the_weights() -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}}
    deepspeed_config.complete_config(config, on_cpu=True)
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


@pytest.mark.parametrize(("content", "message"), [
    ('{\n  "a": 1, // no\n}', "c.json:2: not JSON"), ("[]", "is an object {...}, not a list"),
    (None, "No such file or directory. Presets: trainer/configs/cpu.json")])
def test_an_unreadable_config_is_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError) as caught:
        deepspeed_config.read_config(tmp_path / "c.json")
    assert message in str(caught.value)


def age(path: Path) -> None:
    path.write_text("")
    os.utime(path, (time.time() - 3600,) * 2)


def test_a_lock_left_by_a_killed_compilation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("cpu_adam", "lion", "young"):
        (tmp_path / name).mkdir()
        age(tmp_path / name / "lock")
    (tmp_path / "young" / "lock").touch()
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=tmp_path / "lion", stdin=subprocess.PIPE) as builder:
        assert compilation.stale_locks() == [tmp_path / "cpu_adam" / "lock"]
        assert f"clear it: rm {tmp_path}/cpu_adam/lock" in compilation.check_compilation([])[0]
        with pytest.raises(UserError, match="would wait for it forever: rm "):
            compilation.check_compilation(["cpu_adam"])
        assert builder.stdin
        builder.stdin.close()


def test_a_young_lock_is_waited_for_until_it_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(compilation, "YOUNG_S", 2)
    for name in ("cpu_adam", "lion"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    threading.Timer(0.5, (tmp_path / "lion" / "lock").unlink).start()
    compilation.wait_for_young(["lion"])  # another build is done
    with pytest.raises(UserError, match="would wait for it forever: rm "):  # this one was killed
        compilation.check_compilation(["cpu_adam"])


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compilation.check_compilation([]) == []
    with pytest.raises(UserError, match="there is no C\\+\\+ compiler"):
        compilation.check_compilation(["lion"])


def test_presets_leave_to_the_trainer_what_it_can_fill() -> None:
    for path in [*Path("trainer/configs").glob("*.json"), Path("trainer/ds_config.json")]:
        config = json.loads(path.read_text())
        assert config["train_micro_batch_size_per_gpu"] == config["fp16"]["enabled"] == "auto", path
        deepspeed_config.adopt_values(options(), config, 1)


@pytest.mark.parametrize(("on_cpu", "offload", "expected"), [
    (True, None, "2"), (False, "cpu", "2"), (False, "nvme", "2"), (False, "none", None), (False, None, None)])
def test_ranks_share_the_cores_where_the_cpu_computes(on_cpu: bool, offload: str | None, expected: str | None,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    zero: dict[str, Any] = {} if offload is None else {"offload_optimizer": {"device": offload}}
    offloads = deepspeed_config.offloads_optimizer({"zero_optimization": {"stage": 2, **zero}})
    deepspeed_config.set_environment(on_cpu, offloads, 4)
    assert os.environ.get("OMP_NUM_THREADS") == expected
    assert threads == ([2] if expected else [])
