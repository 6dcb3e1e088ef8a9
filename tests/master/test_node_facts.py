"""`inventory/node_facts.py`: what stands against a start, from what nodes say of themselves."""

from __future__ import annotations

from typing import Any

import pytest

from master.inventory.preflight import runs_on, torch_problems

BUILT: dict[str, Any] = {
    "version": "2.13.0+cu130", "built_for": "CUDA 13.0", "archs": ["sm_75", "sm_80", "sm_90"], "error": None,
    "devices": [{"name": "RTX 3090", "arch": "sm_86"}, {"name": "P100", "arch": "sm_60"}]}


@pytest.mark.parametrize(("archs", "device", "runs"), [
    (["sm_80"], "sm_86", True), (["sm_86"], "sm_80", False), (["sm_80"], "sm_90", False), (["sm_75"], "sm_60", False),
    (["sm_80", "compute_80"], "sm_120", True), (["sm_90a"], "sm_90", True), (["compute_90"], "sm_86", False),
    (["gfx90a", "gfx1100"], "gfx1100", True), (["gfx90a"], "gfx1030", False), ([], "sm_60", True),
    (["sm_80"], None, True),
])
def test_what_was_built_for_one_gpu_runs_on_another(archs: list[str], device: str | None, runs: bool) -> None:
    assert runs_on(archs, device) is runs


def test_a_gpu_that_torch_was_not_built_for_is_named() -> None:
    assert torch_problems("gpu1", [0], BUILT) == []
    (fault,) = torch_problems("gpu1", [0, 1], BUILT)
    assert str(fault) == ("gpu1: slot 1 (P100, sm_60): not supported by torch 2.13.0+cu130 "
                          "(built for sm_75 sm_80 sm_90): --exclude gpu1:1")
    (fault,) = torch_problems("gpu1", [2], BUILT)
    assert "finds 2 devices, not slot 2" in str(fault)


@pytest.mark.parametrize(("answer", "words"), [
    ({**BUILT, "devices": [], "error": "The NVIDIA driver on your system is too old (found version 11040).\nUpdate"},
     "torch 2.13.0+cu130 (for CUDA 13.0) can't use the GPUs: The NVIDIA driver on your system is too old"),
    ({"version": "2.13.0+cpu", "built_for": None, "archs": [], "devices": [], "error": None},
     "torch 2.13.0+cpu there is built without GPUs: invoke sync"),
    ({"error": "ModuleNotFoundError: No module named 'torch'"}, "No module named 'torch': invoke sync"),
])
def test_a_torch_without_gpus_is_told_of(answer: dict[str, Any], words: str) -> None:
    (fault,) = torch_problems("gpu1", [0], answer)
    assert words in str(fault)
