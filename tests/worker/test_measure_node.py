"""`worker/measure_node.py`: what it says of GPUs, network and load, and that it ends with whoever listens."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

SCRIPT = ROOT / "worker" / "measure_node.py"
TABLE = "0, 97, 20111, 24576, 71, 343.21\n1, [N/A], 3, 24576, [GPU requires reset], [N/A]\nUnable to say more\n"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("measure_node", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(folder: Path, smi: str) -> subprocess.Popen[str]:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{smi}\n")
    tool.chmod(0o755)
    return subprocess.Popen([sys.executable, SCRIPT, "0.3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "PATH": f"{folder}:/usr/bin:/bin"})


def line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout
    text = process.stdout.readline()
    assert text.startswith("@@MEASURED ")
    found: dict[str, Any] = json.loads(text.removeprefix("@@MEASURED "))
    return found


def test_a_node_is_measured_until_nobody_listens(tmp_path: Path) -> None:
    (tmp_path / "table").write_text(TABLE)
    process = start(tmp_path, f"cat {tmp_path}/table")
    found = line(process)
    assert found["gpus"] == [
        {"slot": 0, "use_percent": 97, "memory_used_mib": 20111, "memory_total_mib": 24576, "temperature_c": 71,
         "power_w": 343.2},
        {"slot": 1, "use_percent": None, "memory_used_mib": 3, "memory_total_mib": 24576, "temperature_c": None,
         "power_w": None}]
    assert found["ram_mib"] > found["ram_available_mib"] > 0 and 0 <= found["cpu_percent"] <= 100
    assert process.stdin
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()  # type: ignore[union-attr]


def test_a_tool_that_fails_is_told_of(tmp_path: Path) -> None:
    process = start(tmp_path, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert line(process)["problem"] == "Failed to initialize NVML: Driver/library version mismatch"
    process.communicate(timeout=60)


def test_a_tool_that_hangs_holds_nothing_up(tmp_path: Path) -> None:
    process = start(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 300")
    began = time.monotonic()
    assert line(process)["gpus"] == line(process)["gpus"] == [] and time.monotonic() - began < 60
    process.communicate(timeout=60)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_amd_cards_are_read_from_their_driver(tmp_path: Path) -> None:
    device = tmp_path / "card1" / "device"
    sensor = device / "hwmon" / "hwmon3"
    sensor.mkdir(parents=True)
    (tmp_path / "card1-DP-1").mkdir()
    for name, text in (("vendor", "0x1002"), ("gpu_busy_percent", "42"), ("mem_info_vram_used", str(3 << 30)),
                       ("mem_info_vram_total", str(16 << 30)), ("hwmon/hwmon3/temp1_input", "55000")):
        (device / name).write_text(text + "\n")
    assert load().amd_gpus(str(tmp_path)) == [
        {"slot": 0, "use_percent": 42, "memory_used_mib": 3072, "memory_total_mib": 16384, "temperature_c": 55,
         "power_w": None}]


@pytest.mark.parametrize(("before", "after", "found"), [
    ({"eth0": (0, 0)}, {"eth0": (3_000_000, 1000)}, [("eth0", 1_500_000, 500)]),
    ({"eth0": (5, 5), "eth1": (0, 0)}, {"eth0": (5, 5), "eth1": (0, 8)}, [("eth1", 0, 4)]),
    ({}, {"new0": (9, 9)}, []),
])
def test_traffic_is_what_came_since(
    before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], found: list[tuple[str, int, int]]
) -> None:
    assert [(nic["name"], nic["in"], nic["out"]) for nic in load().rates(before, after, 2.0)] == found
