"""The loss at the head: the same loss and gradients as of all logits, in less memory, and given up where it differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from trainer.model import head_loss
from trainer.model.head_loss import HeadLoss
from trainer.sequences.packing import IGNORED
from trainer.training.loss_trainer import summed_loss

ROWS, WIDTH, SIZE, VOCABULARY = 3, 40, 16, 500


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(head_loss, "CPU_TOKENS", 25)
    yield


def case(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A head, hidden states, and labels of which some carry no loss."""
    torch.manual_seed(0)
    head = torch.nn.Linear(SIZE, VOCABULARY, bias=bias, dtype=dtype)
    hidden = torch.randn(ROWS, WIDTH, SIZE, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (ROWS, WIDTH))
    labels[:, ::7] = IGNORED
    labels[1, :30] = IGNORED
    return head, hidden, labels


def trained_tokens(labels: torch.Tensor) -> torch.Tensor:
    return functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero().flatten()


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [each.double() for each in torch.autograd.grad(loss * 0.01, tensors)]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_all_logits(bias: bool) -> None:
    head, hidden, labels = case(bias)
    every = [hidden, *head.parameters()]
    expected = summed_loss(head(hidden), labels)
    slopes = gradients(expected, *every)
    with HeadLoss(head).of(labels, trained_tokens(labels)):
        found = head(hidden)
        assert found.shape == (1, 1, 1)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        for mine, theirs in zip(gradients(found.sum(), *every), slopes, strict=True):
            assert off(mine, theirs) < 1e-6
    assert head(hidden).shape == (ROWS, WIDTH, VOCABULARY)  # outside of it as before


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True),
                                                 (torch.float16, False)])
def test_16_bits_are_no_worse_than_with_all_logits(dtype: torch.dtype, autocast: bool) -> None:
    head, hidden, labels = case(False, dtype)
    exact = torch.nn.Linear(SIZE, VOCABULARY, bias=False).double()
    exact.weight.data = head.weight.detach().double()
    truth = gradients(summed_loss_64(exact(hidden.double()), labels), hidden, exact.weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        usual = gradients(summed_loss(head(hidden), labels), hidden, head.weight)
        with HeadLoss(head).of(labels, trained_tokens(labels)):
            found = head(hidden)
    mine = gradients(found.sum(), hidden, head.weight)
    assert found.dtype == torch.float32
    for ours, theirs, right in zip(mine, usual, truth, strict=True):
        assert off(ours, right) < 1.2 * off(theirs, right) + 1e-3


def summed_loss_64(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same as `summed_loss` in 64 bits."""
    following = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].flatten()
    return functional.cross_entropy(logits.flatten(0, -2), following, ignore_index=IGNORED, reduction="sum")


def test_tiny_slopes_survive_fp16() -> None:
    """A share of 1e-7 of the probability is less than two of fp16's smallest numbers; times the factor 30."""
    head = torch.nn.Linear(2, 3, bias=False, dtype=torch.float16)
    head.weight.data = torch.tensor([[8.0, 8.0], [0.0, 0.0], [-0.0, 0.0]], dtype=torch.float16)
    hidden = torch.ones(1, 2, 2, dtype=torch.float16, requires_grad=True)
    labels = torch.tensor([[0, 0]])
    with HeadLoss(head).of(labels, torch.tensor([0])):
        loss = head(hidden).sum()
    (slope,) = torch.autograd.grad(loss * 1000, head.weight)
    assert slope[1, 0].item() == pytest.approx(1000 * float(torch.tensor(-16.0).exp()), rel=0.03)


def test_sums_that_overflow_fp16_stay_finite() -> None:
    head = torch.nn.Linear(2, 3, bias=False, dtype=torch.float16)
    head.weight.data = torch.tensor([[-4.0, -4.0], [4.0, 4.0], [0.0, 0.0]], dtype=torch.float16)
    hidden = torch.full((1, 21, 2), 300.0, dtype=torch.float16, requires_grad=True)
    with HeadLoss(head).of(torch.zeros(1, 21, dtype=torch.int64), torch.arange(20)):
        loss = head(hidden).sum()
    (slope,) = torch.autograd.grad(loss * 0.01, head.weight)
    assert slope.isfinite().all() and slope[0, 0] < 0 < slope[1, 0]


def test_frozen_heads_and_evaluations_keep_no_gradients() -> None:
    head, hidden, labels = case(True)
    head.requires_grad_(False)
    expected = summed_loss(head(hidden), labels)
    (slope,) = gradients(expected, hidden)
    with HeadLoss(head).of(labels, trained_tokens(labels)):
        assert off(gradients(head(hidden).sum(), hidden)[0], slope) < 1e-6
        with torch.no_grad():
            silent = head(hidden)
    assert not silent.requires_grad and silent.item() == pytest.approx(expected.item(), rel=1e-6)


def test_nothing_to_train_is_a_loss_of_0_with_gradients_of_0() -> None:
    head, hidden, labels = case(False)
    labels[:] = IGNORED
    with HeadLoss(head).of(labels, trained_tokens(labels)):
        loss = head(hidden).sum()
    assert loss.item() == 0 and not any(slope.any() for slope in gradients(loss, hidden, head.weight))


def largest_allocation(run: Callable[[], None]) -> int:
    """The largest tensor that torch makes on the CPU while something runs, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    found: Any = profile.profiler
    return max(event.nbytes() for event in found.kineto_results.events() if event.name() == "[memory]")


def test_all_logits_are_never_held() -> None:
    head, hidden, labels = case(False)
    everything = ROWS * WIDTH * VOCABULARY * 4
    at_head = HeadLoss(head)

    def chunked() -> None:
        with at_head.of(labels, trained_tokens(labels)):
            head(hidden).sum().backward()

    assert largest_allocation(lambda: summed_loss(head(hidden), labels).backward()) >= everything
    assert largest_allocation(chunked) <= max(25 * VOCABULARY, SIZE * VOCABULARY) * 4 * 1.1


def test_it_can_be_taken_back() -> None:
    head, hidden, _ = case(False)
    before = head(hidden)
    HeadLoss(head).remove()
    assert torch.equal(head(hidden), before)
