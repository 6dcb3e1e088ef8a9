"""`devices.py`: which device and precision the ranks share, and how fast it could be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.distributed.devices import choose_precision, common_device, device_facts, peak_flops
from trainer.errors import UserError
from trainer.estimate.peaks import device_peak

CPU: dict[str, Any] = {"type": "cpu", "backend": "cpu", "name": "CPU", "count": 0, "memory": 8 << 30, "bf16": False,
                       "fp16": False, "flash": False}
CARD: dict[str, Any] = {"type": "cuda", "backend": "cuda", "flash": False}
V100: dict[str, Any] = CARD | {"name": "Tesla V100-SXM2-32GB", "count": 1, "bf16": False, "fp16": True}
H100: dict[str, Any] = CARD | {"name": "NVIDIA H100 80GB HBM3", "count": 8, "bf16": True, "fp16": True}


def test_this_machine_s_device_is_what_torch_finds() -> None:
    import torch

    found = device_facts(0)
    assert found.keys() == CPU.keys()
    accelerator = torch.accelerator.current_accelerator()
    assert found["type"] == (accelerator.type if accelerator else "cpu")
    if found["type"] == "cpu":
        assert found == CPU | {"memory": found["memory"]} and found["memory"] > 1 << 28


def test_ranks_share_one_kind_of_device() -> None:
    assert common_device([H100, V100], ["gpu1", "gpu2"]) == "cuda"
    assert common_device([CPU], ["gpu1"]) == "cpu"
    with pytest.raises(UserError, match=r"different devices: cpu on gpu2; cuda on gpu1, gpu3. Is a GPU driver broken"):
        common_device([H100, CPU, CPU, V100], ["gpu1", "gpu2", "gpu2", "gpu3"])


def test_each_rank_asks_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cards = {0: ("NVIDIA GeForce RTX 3090", (8, 6)), 1: ("NVIDIA GeForce RTX 2080 Ti", (7, 5))}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: cards[number][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: cards[number][1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=24 << 30))
    ampere, turing, none = (device_facts(number) for number in range(3))
    assert (ampere["name"], ampere["bf16"], ampere["flash"]) == ("NVIDIA GeForce RTX 3090", True, True)
    assert (ampere["memory"], none["memory"]) == (24 << 30, 0)
    assert (turing["name"], turing["bf16"], turing["fp16"], turing["flash"]) == (
        "NVIDIA GeForce RTX 2080 Ti", False, True, False)
    assert choose_precision("auto", [ampere, turing]) == "fp16"
    with pytest.raises(UserError, match="box: more ranks than its 2 GPUs"):
        common_device([ampere, turing, none], ["box"] * 3)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    rocm = device_facts(1)
    assert (rocm["type"], rocm["backend"], rocm["bf16"]) == ("cuda", "rocm", True)
    with pytest.raises(UserError, match="different devices: cuda on a; rocm on b"):
        common_device([ampere, rocm], ["a", "b"])
    assert common_device([rocm, rocm], ["a", "b"]) == "cuda"


@pytest.mark.parametrize(("wanted", "facts", "expected"), [
    ("auto", [H100, H100], "bf16"), ("auto", [H100, V100], "fp16"), ("auto", [CPU], "fp32"),
    ("auto", [H100, CPU], "fp32"), ("bf16", [CPU], "bf16"), ("fp32", [H100], "fp32"), ("fp16", [V100], "fp16")])
def test_auto_takes_what_is_fast_on_every_rank(wanted: str, facts: list[dict[str, Any]], expected: str) -> None:
    assert choose_precision(wanted, facts) == expected


def test_fp16_is_refused_where_one_rank_has_no_gpu() -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU on every rank"):
        choose_precision("fp16", [H100, CPU])


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.0),
    ("Tesla V100-SXM2-32GB", 125.0), ("NVIDIA A100-SXM4-80GB", 312.0),
    ("NVIDIA A10G", 70.0), ("NVIDIA A10", 125.0), ("NVIDIA L40S", 362.0),
    ("NVIDIA L4", 121.0), ("NVIDIA GeForce RTX 3090", 71.2), ("NVIDIA GeForce RTX 3090 Ti", 80.0),
    ("NVIDIA GeForce RTX 4070 Ti", 80.2), ("NVIDIA RTX A6000", 154.8), ("AMD Instinct MI300X", 1307.4),
    # Other chips than those of nearly the same name.
    ("NVIDIA GeForce RTX 4080", 97.5), ("NVIDIA GeForce RTX 4080 SUPER", 104.4), ("NVIDIA GeForce RTX 5090", 209.5),
    ("NVIDIA RTX 6000 Ada Generation", 364.2), ("NVIDIA GeForce RTX 2080 Ti", 53.8), ("AMD Instinct MI250X", 191.5),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA GeForce RTX 2080 SUPER", None), ("NVIDIA T400", None), ("Intel(R) Arc(TM) A770 Graphics", None),
    ("NVIDIA A1000", None), ("CPU", None), ("Some GPU", None)])
def test_a_device_s_peak_is_that_of_its_data_sheet_or_unknown(name: str, peak: float | None) -> None:
    assert device_peak(name) == peak


def test_the_peak_of_all_ranks_is_their_sum_where_each_is_known() -> None:
    assert peak_flops([H100, V100], "fp16") == (989.0 + 125.0) * 1e12
    assert peak_flops([H100, CPU], "bf16") is None
    assert peak_flops([H100], "fp32") is None
