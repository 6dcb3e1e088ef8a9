"""The first step's gradients are those of all ranks and micro batches, and where an engine's aren't it is said.

The faults are planted in DeepSpeed's own functions and in torch's DistributedDataParallel; one pair of ranks tries them
all.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunRanks, Train

from trainer.steps.gradient_check import LEAST, GradientCheck, chosen

SHORT = ("--sequence_length", "64", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
         "--max_steps", "2", "--logging_steps", "1", "--save_steps", "0", "--num_samples", "0", "--eval_fraction", "0")

CASES = """
import contextlib, torch, transformers
import torch.distributed as dist
import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from trainer.sequences.packing import IGNORED
from trainer.distributed import deepspeed_config
from trainer.errors import UserError
from trainer.steps.gradient_check import GradientCheck
from trainer.training.loss_trainer import summed_loss

deepspeed_config.skip_shared_memory_operator()
deepspeed_config.adopt_process_group()
MICRO_STEPS = 3
micro_step = [0]

def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4))

def engine_of(stage, precision):
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": MICRO_STEPS,
              "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
              "zero_force_ds_cpu_optimizer": False}
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    made = model()
    return deepspeed.initialize(model=made, config=config,
                                optimizer=torch.optim.AdamW(made.parameters(), lr=1e-4))[0]

def batches():
    torch.manual_seed(ranks.rank + 1)
    for number in range(MICRO_STEPS):
        ids = torch.randint(0, 64, (2, 16))
        labels = ids.clone()
        labels[:, : 2 + 4 * number] = IGNORED  # micro batches of different weight
        yield ids, labels

def step(engine, precision):
    check = GradientCheck(engine.module, 2, precision, engine)
    check.begin()
    made = list(batches())
    count = torch.tensor(sum(int((labels != IGNORED).sum()) for _, labels in made))
    dist.all_reduce(count)
    try:
        for number, (ids, labels) in enumerate(made):
            micro_step[0] = number
            summed = summed_loss(engine(input_ids=ids, use_cache=False).logits, labels)
            check.note_loss(summed, labels)
            engine.set_gradient_accumulation_boundary(is_boundary=number == MICRO_STEPS - 1)
            engine.backward(summed * 2 / count, scale_wrt_gas=False)
        engine.step()
        return check.error
    except UserError:
        return check.error
    finally:
        dist.barrier()

@contextlib.contextmanager
def replaced(owner, name, other):
    before = getattr(owner, name)
    setattr(owner, name, other(before))
    try:
        yield
    finally:
        setattr(owner, name, before)

def no_fault(stage):
    return contextlib.nullcontext()

def wrong_divisor(stage):
    def wrong(before):
        def backward(self, loss, **more):
            return before(self, loss / MICRO_STEPS, **more)  # once more, as for a loss that is a mean
        return backward
    return replaced(DeepSpeedEngine, "backward", wrong)

def lost_micro_batch(stage):
    if stage >= 2:  # which reduce each micro batch
        return zeroed(stage, lambda: micro_step[0] == 0)
    def lossy(before):
        def backward(self, loss, **more):
            made = before(self, loss, **more)
            if micro_step[0] == 0:
                self.optimizer.zero_grad(set_to_none=True)
            return made
        return backward
    return replaced(DeepSpeedEngine, "backward", lossy)

REDUCTIONS = {0: (DeepSpeedEngine, "allreduce_bucket"), 1: (DeepSpeedZeroOptimizer, "average_tensor"),
              2: (DeepSpeedZeroOptimizer, "average_tensor"),
              3: (DeepSpeedZeroOptimizer_Stage3, "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads")}

def zeroed(stage, when):
    def without(before):
        def reduce(self, first, *more, **named):
            if when():
                for tensor in first if isinstance(first, (list, tuple)) else [first]:
                    (tensor.grad if stage == 3 else tensor).zero_()
            return before(self, first, *more, **named)
        return reduce
    owner, name = REDUCTIONS[stage]
    return replaced(owner, name, without)

def rank_left_out(stage):
    return zeroed(stage, lambda: ranks.rank == 1)

def unreduced(stage):
    def alone(before):
        def reduce(self, *arguments, **named):
            import deepspeed.comm as comm
            with contextlib.ExitStack() as stack:
                for name in ("all_reduce", "reduce"):
                    stack.enter_context(replaced(comm, name, lambda old: lambda *a, **b: None))
                return before(self, *arguments, **named)
        return reduce
    owner, name = REDUCTIONS[stage]
    return replaced(owner, name, alone)

told["found"] = {}
for stage in (0, 1, 2, 3):
    for precision in ("fp32", "bf16"):
        faults = [no_fault, wrong_divisor, lost_micro_batch, rank_left_out] + ([unreduced] if stage < 3 else [])
        for fault in faults:
            if stage == 0 and precision == "bf16" and fault in (lost_micro_batch, unreduced):
                continue
            engine = engine_of(stage, precision)
            with fault(stage):
                told["found"][f"{stage} {precision} {fault.__name__}"] = step(engine, precision)
            engine.destroy()
"""


@pytest.mark.slow
def test_a_fault_of_any_engine_is_seen(run_ranks: RunRanks) -> None:
    one, other = run_ranks(CASES)
    for told in (one, other):
        for case, error in told["found"].items():
            limit = LEAST if "fp32" in case else 0.04
            assert error is not None, case
            assert (error < limit) == case.endswith("no_fault"), (case, error)


@pytest.mark.parametrize(("ranks", "config", "words"), [
    (1, None, ()), (2, None, ()), (2, "configs/zero1", ()), (1, "configs/zero3", ("--lora", "4"))])
def test_a_training_is_the_same_with_the_check(ranks: int, config: str | None, words: tuple[str, ...],
                                               train: Train) -> None:
    checked = train(*SHORT, *words, ranks=ranks, config=config)
    plain = train(*SHORT, *words, "--no_gradient_check", ranks=ranks, config=config, name="plain")
    assert checked.losses() == plain.losses() and checked.losses("grad_norm") == plain.losses("grad_norm")
    error = json.loads((checked.path / "run.json").read_text())["gradient_error"]
    assert 0 <= error < LEAST and "gradients checked against the sum of all ranks' own" in checked.output
    assert "gradients checked" not in plain.output


def micro_step(check: GradientCheck, model: Any, factor: float) -> None:
    ids = torch.arange(12).reshape(2, 6)
    summed = model(ids).square().sum()
    check.note_loss(summed, ids)
    (summed * factor).backward()


def test_a_gradient_that_overflows_in_fp16_is_looked_at_in_the_next_step() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(12, 4), torch.nn.Linear(4, 4))
    check = GradientCheck(model, 1, "fp32")
    check.begin()
    micro_step(check, model, math.inf)
    check.compare()
    assert check.error is None and check.pending
    model.zero_grad()
    micro_step(check, model, 1 / 12)
    check.compare()
    assert check.error is not None and check.error < 1e-6 and not check.pending


def test_weights_are_looked_at_from_the_first_to_the_last() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(40)))
    names = [name for name, _ in chosen(model)]
    assert len(names) == 10 and names[0] == "0.weight" and names[-1] == "39.weight"
    model[5].weight.requires_grad = False
    assert len(chosen(torch.nn.Linear(2, 2))) == 2 and "5.weight" not in [name for name, _ in chosen(model)]


def test_one_line_says_what_differs(tmp_path: Path) -> None:
    from trainer.errors import UserError

    model = torch.nn.Sequential(torch.nn.Embedding(12, 4), torch.nn.Linear(4, 4))
    check = GradientCheck(model, 1, "fp32")
    check.begin()
    micro_step(check, model, 1 / 13)  # not the number of trained tokens
    with pytest.raises(UserError, match=r"^the gradient of .* isn't that of all ranks .*differs by 7\.\d%"):
        check.compare()
