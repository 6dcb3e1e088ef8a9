"""What is said of a DeepSpeed config: each rule by an example, and the verdicts by DeepSpeed's own engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from master.ds_config.checker import Problem, Target, check
from master.ds_config.json_text import Document

ADAM = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
TRAINER = Target(trainer=True)
PLAIN = Target(trainer=False)
AUTO = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}


def said(config: Any, target: Target | None = None) -> list[Problem]:
    return check(Document(json.dumps(config, indent=1)), target or Target())


def found(config: Any, target: Target | None = None) -> set[str]:
    """The findings as "level code $.path"."""
    return {f"{problem.level} {problem.code} {problem.json_path}" for problem in said(config, target)}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"train_batch_size": 1, "zero_optimization": {"stage": stage, **more}}


def root(**more: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1, **more}


@pytest.mark.parametrize(("config", "finding"), [
    (root(zero_optimisation={"stage": 2}), "warning unknown-key $.zero_optimisation"),
    (root(aio={"thread_count": 2}), "warning unknown-key $.aio.thread_count"),
    (root(fp16={"opt_level": "O1"}), "error unknown-key $.fp16.opt_level"),
    (root(bf16={"loss_scale": 0}), "error unknown-key $.bf16.loss_scale"),
    (root(zero_optimization={"_note": 1}), "error comment-key $.zero_optimization._note"),
    (root(amp={"enabled": False}), "error removed $.amp"),
    (root(compile={"backend": "inductor"}), "error unknown-key $.compile.backend"),
    (root(compile={"passes": ["z9"]}), "error bad-value $.compile.passes[0]"),
    (zero(4), "error bad-value $.zero_optimization.stage"),
    (zero(3, reduce_bucket_size="5e8"), "error bad-value $.zero_optimization.reduce_bucket_size"),
    (zero(3, reduce_bucket_size="500"), "info loose-type $.zero_optimization.reduce_bucket_size"),
    (zero(3, offload_param={"device": "CPU"}), "error bad-value $.zero_optimization.offload_param.device"),
    (root(steps_per_print="x"), "error bad-value $.steps_per_print"),
    (root(prescale_gradients="yes"), "warning bad-value $.prescale_gradients"),
    (root(optimizer=None), "error not-a-section $.optimizer"),
    (root(checkpoint={"tag_validation": "off"}), "error bad-value $.checkpoint.tag_validation"),
    (root(wall_clock_breakdown="true"), "error bad-value $.wall_clock_breakdown"),
    (root(fp16={"enabled": True}, bf16={"enabled": "yes"}), "error fp16-and-bf16 $.bf16.enabled"),
    (root(fp16={"enabled": 1, "min_loss_scale": 0}), "error bad-value $.fp16.min_loss_scale"),
    (zero(3) | {"gradient_allreduce_op": "SUM"}, "error sum-unsupported $.gradient_allreduce_op"),
    (zero(2, cpu_offload=False, offload_optimizer={}), "error two-names $.zero_optimization.cpu_offload"),
    (zero(3, stage3_prefetch_bucket_size=1, prefetch_bucket_size=2),
     "error two-names $.zero_optimization.prefetch_bucket_size"),
    (zero(2, offload_optimizer={"device": "cpu", "ratio": 0.5}),
     "error wrong-stage $.zero_optimization.offload_optimizer.ratio"),
    (zero(2, offload_param={"device": "cpu"}), "warning wrong-stage $.zero_optimization.offload_param"),
    (zero(0, offload_optimizer={"device": "cpu"}), "warning wrong-stage $.zero_optimization.offload_optimizer"),
    (zero(1, offload_optimizer={"device": "nvme", "nvme_path": "/x"}),
     "warning wrong-stage $.zero_optimization.offload_optimizer.device"),
    (zero(3, offload_param={"device": "nvme"}), "error missing $.zero_optimization.offload_param.nvme_path"),
    (zero(3, offload_param={"device": "nvme", "nvme_path": "~/x"}),
     "warning bad-value $.zero_optimization.offload_param.nvme_path"),
    (zero(3, offload_param={"device": "cpu", "buffer_count": 4}),
     "info no-effect $.zero_optimization.offload_param.buffer_count"),
    (zero(2, stage3_max_live_parameters=1), "info wrong-stage $.zero_optimization.stage3_max_live_parameters"),
    (zero(3, allgather_bucket_size=2), "info wrong-stage $.zero_optimization.allgather_bucket_size"),
    (zero(2, allgather_partitions=True), "info no-effect $.zero_optimization.allgather_partitions"),
    (root(zero_optimization=True), "warning old-form $.zero_optimization"),
    (root(bfloat16={"enabled": True}), "info renamed $.bfloat16"),
    (AUTO | {"bfloat16": {"enabled": True}}, "warning renamed $.bfloat16"),
    (root(aio={}), "info no-effect $.aio"),
    (root(activation_checkpointing={"contiguous_memory_optimization": True}),
     "warning missing $.activation_checkpointing.number_checkpoints"),
    (root(optimizer={"type": "OneBitAdam"}), "error removed $.optimizer.type"),
    (root(optimizer={"type": "adamw_torch"}), "error bad-value $.optimizer.type"),
    (root(optimizer={"Type": "AdamW"}), "warning missing $.optimizer"),
    (zero(1) | {"optimizer": {"type": "SGD"}}, "error untested-optimizer $.optimizer.type"),
    (root(optimizer={"type": "AdamW", "params": {"max_grad_norm": 1}}),
     "error removed $.optimizer.params.max_grad_norm"),
    (root(optimizer={"type": "SGD", "params": {"betas": [0.9, 0.9]}}),
     "error unknown-argument $.optimizer.params.betas"),
    (root(optimizer={"type": "Adam", "params": {"amsgrad": True}}), "error bad-value $.optimizer.params.amsgrad"),
    (root(scheduler={"type": "WarmupLR"}), "error missing $.scheduler.params"),
    (root(scheduler={"type": "warmuplr", "params": {}}), "error bad-value $.scheduler.type"),
    (root(scheduler={"type": "WarmupDecayLR", "params": {}}), "error missing $.scheduler.params.total_num_steps"),
    (root(scheduler={"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_min_lr": 0}}),
     "error unknown-argument $.scheduler.params.warmup_min_lr"),
    (root(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 0}}),
     "error bad-value $.scheduler.params.warmup_num_steps"),
    (root(scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_num_steps": 10}}),
     "warning bad-combination $.scheduler.params.total_num_steps"),
    (root(optimizer=ADAM, scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4}}),
     "warning lr-overridden $.optimizer.params.lr"),
    (root(optimizer=ADAM, scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 9e-4}}),
     "info lr-overridden $.optimizer.params.lr"),
    ({"gradient_accumulation_steps": 2}, "error batch-missing $.train_micro_batch_size_per_gpu"),
    ({"train_batch_size": "8"}, "error bad-value $.train_batch_size"),
    ({"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}, "error batch-arithmetic $.train_batch_size"),
    ({"train_batch_size": 8}, "info fixed-world-size $.train_batch_size"),
    (AUTO | {"steps_per_print": 5, "zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}},
     "error auto-unfilled $.zero_optimization.stage3_max_live_parameters"),
    ({"train_micro_batch_size_per_gpu": "auto"}, "error trainer-needs-zero $.zero_optimization"),
    (zero(2) | {"optimizer": ADAM, "scheduler": {"type": "StepLR", "params": {"step_size": 1}}},
     "error bad-combination $.scheduler.type"),
    (zero(3) | {"optimizer": {"type": "Muon"}}, "error bad-combination $.optimizer.type"),
    (root(optimizer={"type": "Muon", "params": {"momentm": 1}}), "warning unknown-argument $.optimizer.params.momentm"),
    (AUTO | {"zero_optimization": {"stage": 3, "prefetch_bucket_size": "auto"}},
     "error auto-unfilled $.zero_optimization.prefetch_bucket_size"),
    (AUTO | {"bf16": None}, "error bad-value $.bf16"),
    (root(optimizer={"type": "SGD", "params": {"lr": -1}}), "error bad-value $.optimizer.params.lr"),
    (root(optimizer={"type": "AdamW", "params": {"betas": [0, 0.9], "torch_adam": True}}),
     "error bad-value $.optimizer.params.betas"),
    (root(scheduler={"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1, "decay_lr_rate": None}}),
     "error bad-value $.scheduler.params.decay_lr_rate"),
    (root(data_types={"keep_in_fp32_modules": "norm"}), "error bad-value $.data_types.keep_in_fp32_modules"),
    (root(tensor_parallel={"dtype": "bf16"}), "error not-in-json $.tensor_parallel.dtype"),
])
def test_each_rule_finds_its_fault(config: Any, finding: str) -> None:
    assert finding in found(config)


@pytest.mark.parametrize("config", [
    AUTO, zero(0), root(bf16={"enabled": True}), root(optimizer=ADAM, **{"$schema": "x", "_note": "y"}),
    zero(3, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"}, reduce_bucket_size=5e8,
         stage3_gather_16bit_weights_on_model_save=True),
    AUTO | {"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": "auto"}, "steps_per_print": "auto"},
    root(optimizer={"type": "SGD", "params": {"momentum": 0.9}}, zero_optimization={"stage": 0}),
    root(scheduler={"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}, optimizer=ADAM),
    root(log_level="WARNING", comment={"a": "auto"}),
    zero(2, gather_16bit_weights_on_model_save=True) | {"tensor_parallel": {"autotp_size": 2}},
])
def test_nothing_loud_is_said_of_good_configs(config: Any) -> None:
    assert not [problem for problem in said(config) if problem.level != "info"]


def test_ranks_decide_about_batches() -> None:
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
    assert not [each for each in found(config, Target(world_size=4)) if "batch" in each]
    assert "error batch-arithmetic $.train_batch_size" in found(config, Target(world_size=3))
    assert "error batch-arithmetic $.train_batch_size" in found({"train_batch_size": 8}, Target(world_size=3))
    shared = config | {"sequence_parallel_size": 2}
    assert not [each for each in found(shared, Target(world_size=8)) if "batch" in each]


def test_plain_deepspeed_reads_whole_numbers_as_integers() -> None:
    config = root(optimizer=ADAM, wall_clock_breakdown=0.0, scheduler={"type": "WarmupLR", "params": {
        "warmup_num_steps": 1e3}})
    assert not [each for each in found(config, PLAIN) if each.startswith("error")]
    assert "error bad-value $.scheduler.params.warmup_num_steps" in found(config, TRAINER)


def test_auto_is_for_the_trainer() -> None:
    config = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
              "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}
    assert not found(config, TRAINER)
    phase = {problem.json_path: problem.phase for problem in said(config, PLAIN) if problem.level == "error"}
    assert phase == {"$.train_micro_batch_size_per_gpu": "parse", "$.gradient_clipping": "step",
                     "$.bf16.enabled": "init", "$.zero_optimization.reduce_bucket_size": "init"}
    assert "error trainer-needs-zero $.zero_optimization" in found(root(), TRAINER)
    assert not [each for each in found(root(), Target(trainer=True, completed=True)) if "needs-zero" in each]


def test_names_are_found_again() -> None:
    fixes = {problem.json_path: problem.how_to_fix for problem in said(root(
        gradient_acumulation_steps=1, bf16={"min_loss_scale": 1}, zero_optimization={"persistence_threshold": 1},
        aio={"fast_init": True}, grad_accum_dtype="fp32"))}
    assert fixes["$.gradient_acumulation_steps"] == "did you mean gradient_accumulation_steps?"
    assert fixes["$.bf16.min_loss_scale"] == "it belongs in fp16"
    assert fixes["$.zero_optimization.persistence_threshold"] == "did you mean param_persistence_threshold?"
    assert fixes["$.aio.fast_init"] == "it belongs in zero_optimization.offload_optimizer"
    assert fixes["$.grad_accum_dtype"] == "write data_types.grad_accum_dtype"


def host(name: str, capability: str | None, gpus: int = 2, **facts: Any) -> dict[str, Any]:
    gpu = {"name": "A card", "usable": True, "compute_capability": capability}
    return {"name": name, "facts": facts, "report": {"gpus": [gpu] * gpus, "slots_use": list(range(gpus))}}


def test_the_nodes_are_looked_at() -> None:
    lab = Target(hosts=(host("old", "7.5"), host("new", "8.6"), host("none", None, gpus=0, ram_bytes=2_000_000_000)))
    assert "warning bf16-on-old-gpu $.bf16.enabled" in found(root(bf16={"enabled": True}), lab)
    assert "error fp16-on-cpu $.fp16.enabled" in found(root(fp16={"enabled": True}), lab)
    assert "warning hpz-across-machines $.zero_optimization.zero_hpz_partition_size" in found(
        zero(3, zero_hpz_partition_size=4), lab)
    big = zero(3, offload_param={"device": "nvme", "nvme_path": "/fast", "buffer_size": 1e9})
    assert "error ram $.zero_optimization.offload_param" in found(big, lab)
    fast = [{"mount": "/fast", "rotational": False}]
    drives = Target(hosts=(host("a", "8.0", disks=fast), host("b", "8.0", disks=[{"mount": "/", "rotational": True}])))
    assert [problem.message for problem in said(big, drives) if problem.code == "nvme"] == [
        "no fast drive holds /fast on b"]


# -- DeepSpeed's engine ------------------------------------------------------------------------------------------------

ENGINE = {"train_batch_size": 4, "optimizer": ADAM, "zero_optimization": {"stage": 0}}
SMALL = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
CASES: list[dict[str, Any]] = [
    *({"zero_optimization": {"stage": stage}} for stage in range(4)),
    *({"gradient_clipping": value} for value in (None, "1.0", "auto", 0)),
    *({"steps_per_print": value} for value in ("abc", None, 0, 1.5)),
    *({"optimizer": {"type": "Adam", "params": {"torch_adam": True, **params}}} for params in (
        {"lr": "1e-3"}, {"lr": "auto"}, {"betas": [0.9, 1.0]}, {"weight_decay": "0.1"}, {"nope": 1}, {"foreach": False},
        {"bias_correction": True}, {"amsgrad": True}, {"adam_w_mode": False}, {"max_grad_norm": 1})),
    *({"optimizer": {"type": name, "params": {"lr": 0.1}}} for name in ("SGD", "sgd", "Adagrad", "OneBitAdam", "Nope")),
    {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_optimization": {"stage": 1}},
    *({"scheduler": {"type": "WarmupLR", "params": params}} for params in (
        {}, None, {"warmup_num_steps": 0}, {"warmup_num_steps": 10.0}, {"warmup_max_lr": "1e-3"}, {"nope": 1},
        {"warmup_num_steps": "auto"}, {"warmup_type": "cosine"})),
    *({"scheduler": {"type": name, "params": params}} for name, params in (
        ("warmuplr", {}), ("WarmupDecayLR", {}), ("WarmupDecayLR", {"total_num_steps": 9}), ("StepLR", {}), (3, {}),
        ("WarmupCosineLR", {"total_num_steps": 9, "warmup_min_lr": 0}), ("OneCycle", {"cycle_max_lr": 1}),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_first_step_size": 0}), ("CosineAnnealingLR", {}),
        ("LRRangeTest", {"lr_range_test_step_size": 0}), ("LambdaLR", {}), ("CosineAnnealingLR", {"T_max": 9}))),
    *({"zero_optimization": {"stage": stage, "offload_param": {"device": "nvme"}}} for stage in (2, 3)),
    *({"zero_optimization": {"stage": stage}, "prescale_gradients": True} for stage in (1, 2, 3)),
    {"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 2.0}, {"gradient_predivide_factor": "2"},
    {"zero_optimization": {"stage": 2, "reduce_scatter": False}, "prescale_gradients": True},
    *({"zero_optimization": {"stage": 1, "allgather_bucket_size": size}} for size in (1001, 1002)),
    *({"zero_optimization": {"stage": 2, "compute_grad_norm": False}, "gradient_clipping": clip} for clip in (0, 1)),
    *({"zero_optimization": {"stage": stage, "zenflow": {}}} for stage in (0, 1)),
    {"zero_optimization": {"stage": 1, "legacy_stage1": True}},
    *({"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "fp32"}}
      for stage in (0, 1)),
    {"data_types": {"grad_accum_dtype": "nope"}}, {"data_types": {"param_dtype": "bf16"}},
    {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, "zero_optimization": {"stage": 3}},
    {"log_level": "loud"}, {"flops_profiler": {"enabled": True, "profile_step": "x"}},
    {"managed_gradient_accumulation": False, "zero_optimization": {"stage": 1, "overlap_comm": True}},
]


def test_errors_strike_when_we_say(tmp_path: Path) -> None:
    """deepspeed.initialize and some steps for every case, on one CPU rank."""
    configs = [{**ENGINE, **case, "zero_optimization": {**SMALL, **case.get("zero_optimization", {"stage": 0})}}
               for case in CASES]
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "ds_configs.py")], cwd=tmp_path, text=True,
                          input="\n".join(map(json.dumps, configs)), capture_output=True, timeout=550)
    answers = [json.loads(line[3:]) for line in done.stdout.splitlines() if line.startswith("=> ")]
    assert len(answers) == len(CASES), done.stderr[-2000:]
    order = ["parse", "init", "step", "ok"]
    for case, config, (stage, why) in zip(CASES, configs, answers, strict=True):
        errors = [problem for problem in said(config, Target(trainer=False, world_size=1)) if problem.level == "error"]
        ours = min((problem.phase for problem in errors), key=order.index, default="ok")
        assert ours == stage, f"{json.dumps(case)}: DeepSpeed: {stage} {why}; we: {ours} {errors}"
