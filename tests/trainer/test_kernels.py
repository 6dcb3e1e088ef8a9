"""Which kernels a training gets on which device, and that each is given up, or told, where it doesn't serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Train

from trainer.errors import UserError
from trainer.model import document_attention, liger
from trainer.options import parse_options
from trainer.training import kernels
from trainer.training.arguments import dataloader_workers


@dataclass
class TwoHosts:
    """Two ranks, of which this is the first; what the second one answers is given."""

    theirs: dict[str, Any]
    hosts: tuple[str, ...] = ("gpu1", "gpu2")
    local_rank: int = 0

    def all_gather_json(self, name: str, value: Any) -> list[Any]:
        return [value, self.theirs.get(name, value)]


@dataclass
class Said:
    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.lines.append(text)


def chosen(monkeypatch: pytest.MonkeyPatch, *words: str, device: str = "cuda", precision: str = "bf16",
           modern: bool = True, problem: str | None = None, theirs: dict[str, Any] | None = None
           ) -> tuple[str, bool, list[str]]:
    """The attention, whether Liger's kernels are used, and what was said."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(document_attention, "runs_here", lambda *_: True)
    monkeypatch.setattr(liger, "problem", lambda *_: problem)
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32,
                                              num_hidden_layers=1, num_attention_heads=2))
    said = Said()
    setup: Any = SimpleNamespace(options=parse_options(["--model_name_or_path", "x", *words]), console=said,
                                 ranks=TwoHosts(theirs or {}), device=device, precision=precision, flash=modern,
                                 sequence_length=64)
    with_liger = kernels.choose(model, setup)
    return model.config._attn_implementation, with_liger, said.lines


def test_a_modern_gpu_gets_both(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch) == ("varlen", True, [])
    assert chosen(monkeypatch, precision="fp16") == ("varlen", True, [])
    assert chosen(monkeypatch, "--no_liger") == ("varlen", False, [])
    assert chosen(monkeypatch, "--attn_implementation", "sdpa") == ("sdpa", True, [])


def test_others_get_what_was_measured_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, device="cpu", precision="fp32", modern=False) == ("documents", False, [])
    assert chosen(monkeypatch, precision="fp16", modern=False) == ("sdpa", False, [])  # a 2080 Ti
    assert chosen(monkeypatch, "--liger", precision="fp16", modern=False) == ("sdpa", True, [])
    assert chosen(monkeypatch, precision="fp32") == ("sdpa", False, [])
    assert chosen(monkeypatch, device="xpu", modern=False) == ("sdpa", False, [])


def test_all_ranks_use_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, theirs={"attention": None})[0] == "sdpa"  # the other card can't
    missing = "liger-kernel isn't installed (pip install liger-kernel)"
    attention, with_liger, said = chosen(monkeypatch, theirs={"liger": missing})
    assert (attention, with_liger) == ("varlen", False)
    assert said == [f"not the fastest way: gpu2: {missing}; --torch_compile fuses what it can"]


def test_what_was_asked_for_and_cannot_be_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--liger: gpu1: Liger has no kernels for gpt2"):
        chosen(monkeypatch, "--liger", problem="Liger has no kernels for gpt2")


def test_liger_says_why_it_cannot_be() -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type="llama"))
    assert liger.problem(model, torch.device("cpu")) == "Liger's kernels need a GPU"


@pytest.mark.parametrize(("words", "device", "expected"), [
    ([], "cuda", 2), ([], "cpu", 0), (["--dataloader_workers", "5"], "cpu", 5),
    (["--dataloader_workers", "0"], "cuda", 0),
    (["--streaming", "--dataset_path", "d", "--max_steps", "3"], "cuda", 0)])
def test_who_makes_batches(words: list[str], device: str, expected: int) -> None:
    assert dataloader_workers(parse_options(["--model_name_or_path", "x", *words]), device) == expected


def test_workers_beside_a_stream_are_a_wrong_use() -> None:
    with pytest.raises(UserError, match="leave out --dataloader_workers"):
        parse_options(["--model_name_or_path", "x", "--streaming", "--dataset_path", "d", "--max_steps", "3",
                       "--dataloader_workers", "2"])


def test_only_the_layers_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ModuleList(
        [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])) for _ in range(3)])
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 2), "layers": layers, "head": torch.nn.Linear(2, 4)})
    kernels.compile_layers(model)
    assert compiled == list(layers)


def test_a_model_that_changes_its_logits_after_the_head_makes_all_of_them(train: Train, tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "granite", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, '
        '"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400, "logits_scaling": 8.0}')
    words = ("--from_config", "--max_steps", "2", "--sequence_length", "64")
    run = train(*words, model=str(tmp_path), name="granite")
    assert "attention document by document, loss of all logits\n" in run.output
    assert "loss in chunks" in train("--max_steps", "1", "--sequence_length", "64", name="tiny").output


def test_a_residual_in_bf16_learns_the_same(train: Train) -> None:
    words = ("--max_steps", "6", "--sequence_length", "64", "--precision", "bf16", "--lr_scheduler_type", "constant")
    usual, ours = (train(*words, *more, name=name) for name, more in (("usual", ()), ("ours", ("--bf16_residual",))))
    for step, loss in usual.losses().items():
        assert ours.losses()[step] == pytest.approx(loss, rel=2e-3)
    assert ours.losses() != usual.losses()  # it is another way to compute
    refused = train("--max_steps", "1", "--bf16_residual", expect=2, name="refused")
    assert "--bf16_residual: this training computes in fp32: --precision bf16" in refused.output
