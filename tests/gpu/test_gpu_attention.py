"""Each attention keeps packed documents apart, forward and backward, with one row and with eight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.model import document_attention
from trainer.model.head_loss import HeadLoss
from trainer.sequences.packing import varlen_bounds

pytestmark = pytest.mark.gpu
VOCABULARY, WIDTH = 512, 256
ROUNDING = 0.02  # of a tensor's norm: bf16 has 8 bits, and a gradient is a sum of many


def model_in(dtype: torch.dtype, attention: str, heads: int, keys: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64 * heads, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=keys))
    model.to("cuda", dtype).set_attn_implementation(attention)
    return model


def packed(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions of rows [rows, WIDTH], the documents of each as long as chance has it."""
    chance = torch.Generator().manual_seed(rows)
    positions = torch.empty(rows, WIDTH, dtype=torch.int64)
    for row in positions:
        at = 0
        while at < WIDTH:
            length = min(int(torch.randint(1, 120, (1,), generator=chance)), WIDTH - at)
            row[at : at + length] = torch.arange(length)
            at += length
    return torch.randint(0, VOCABULARY, (rows, WIDTH), generator=chance), positions


def one_by_one(ids: torch.Tensor, positions: torch.Tensor, model: Any) -> torch.Tensor:
    """Logits of each document alone, laid end to end [tokens, vocabulary]."""
    lengths = document_attention.lengths_of(positions)
    return torch.cat([model(input_ids=part[None].cuda(), use_cache=False).logits[0]
                      for part in ids.flatten().split(lengths)])


def gradients(logits: torch.Tensor, model: Any) -> list[torch.Tensor]:
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.device, logits.dtype)
    return [each.float() for each in torch.autograd.grad(logits.flatten(0, -2), list(model.parameters()),
                                                         direction.flatten(0, -2))]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("attention", "dtype", "keys"), [
    ("varlen", torch.bfloat16, 4), ("varlen", torch.bfloat16, 2), ("varlen", torch.float16, 4),
    ("flex_attention", torch.bfloat16, 2), ("sdpa", torch.bfloat16, 2), ("flash_attention_2", torch.bfloat16, 2)])
def test_packed_documents_are_as_alone(attention: str, dtype: torch.dtype, keys: int, rows: int) -> None:
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    ids, positions = packed(rows)
    truth = model_in(torch.float32, "sdpa", 4, keys)
    expected = one_by_one(ids, positions, truth)
    slopes = gradients(expected, truth)
    model = model_in(dtype, attention, 4, keys)
    told = any(name in attention for name in document_attention.TOLD_BOUNDS)
    bounds = {name: each.cuda() if isinstance(each, torch.Tensor) else each
              for name, each in varlen_bounds(positions).items()} if told else {}
    found = model(input_ids=ids.cuda(), position_ids=positions.cuda(), use_cache=False, **bounds).logits
    assert off(found.flatten(0, 1), expected) < ROUNDING
    for mine, theirs in zip(gradients(found, model), slopes, strict=True):
        assert off(mine, theirs) < 2 * ROUNDING


def test_the_varlen_kernel_is_found_to_run_here() -> None:
    config = model_in(torch.bfloat16, "sdpa", 4, 2).config
    modern = torch.cuda.get_device_capability()[0] >= 8
    assert document_attention.runs_here(config, torch.device("cuda:0"), torch.bfloat16) == modern


@pytest.mark.parametrize("with_liger", [False, True])
def test_the_loss_at_the_head_is_that_of_all_logits_in_a_fraction_of_the_memory(with_liger: bool) -> None:
    from trainer.model.head_loss import liger_kernel
    from trainer.training.loss_trainer import summed_loss

    if with_liger:
        pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    head = torch.nn.Linear(1024, 32000, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(8, 1024, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 32000, (8, 1024), device="cuda")
    trained = torch.arange(8 * 1024, device="cuda").view(8, 1024)[:, :-1].flatten()
    every = [hidden, head.weight]

    def measured(loss: Any) -> tuple[float, list[torch.Tensor], int]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = loss()
        slopes = torch.autograd.grad(made / len(trained), every)
        return made.item(), list(slopes), torch.cuda.max_memory_allocated() - before

    def at_head() -> torch.Tensor:
        taken = HeadLoss(head, liger_kernel() if with_liger else None)
        try:
            with taken.of(labels, trained):
                return head(hidden).sum()
        finally:
            taken.remove()

    expected, slopes, whole = measured(lambda: summed_loss(head(hidden), labels))
    found, others, peak = measured(at_head)
    assert found == pytest.approx(expected, rel=1e-3)
    for mine, theirs in zip(others, slopes, strict=True):
        assert off(mine, theirs) < ROUNDING
    assert peak < whole / 3
