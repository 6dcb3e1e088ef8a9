"""Whatever a tool prints or a file of the kernel holds, both detectors give a valid report in time and exit 0."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import WAYS, Machine

GOOD = [
    "0, GPU-1, 00000000:01:00.0, 24576, 24000, 560.35, 8.6, [N/A], 0, 31, NVIDIA A, B\n",
    "GPU-1, 77, 1500, /usr/bin/python\n[Unknown Error], [GPU is lost], [GPU requires reset]\n",
    "Unable to determine the device handle for GPU0000:83:00.0: GPU is lost.\n",
    "<nvidia_smi_log><gpu id='1'><uuid>G</uuid><fb_memory_usage><total>9 MiB</total></fb_memory_usage></gpu>"
    "</nvidia_smi_log>",
    "GPU 0: NVIDIA T4 (UUID: GPU-1)\n",
    '[{"gpu": 0, "asic": {"market_name": "MI", "device_id": "0x74a1"}, "vram": {"size": {"value": 1}}}]',
    '{"gpu_data": [{"gpu": 1, "bdf": "0000:0a:00.0", "uuid": 7}]}',
    '{"card0": {"Card series": "MI", "VRAM Total Memory (B)": "68702699520"}, "system": {"Driver version": "6"}}',
    "device,Card Series,VRAM Total Memory (B)\ncard0,MI210,68702699520\n",
    "GPU[0]\t: Device Name: MI210\n",
    "Agent 1\n Name: gfx90a\n Device Type: GPU\n Segment: GLOBAL\n Size: 99(0x1) KB\n",
    '{"device_list": [{"device_id": 0, "device_name": "Max", "pci_bdf_address": "0000:29:00.0"}]}',
    "| 0 | Device Name: Flex |\n| | Memory Physical Size: 14248.00 MiB |\n",
    "01:00.0 VGA compatible controller [0300]: N [10de:2684]\n\tKernel driver in use: nvidia\n",
    "simd_count 416\nvendor_id 4098\ngfx_target_version 90010\nunique_id 99\nlocation_id 256\ndrm_render_minor 128\n",
    "Model: \t A10G\nGPU UUID: GPU-1\nDevice Minor: 3\nGPU Excluded: No\n",
]
ODD = st.sampled_from(["\0", "\r\n", "\n", ",", '"', "\\", "{", "]", "é", "\x1b[0m", "-1", "0", "9" * 30, "[N/A]",
                       "null", "true", "%s", "$(touch pwned)", "`id`", "*", "\u2028", "٣", "a" * 5000, "\n" * 600])
TOOLS = ["nvidia-smi", "amd-smi", "rocm-smi", "rocminfo", "xpu-smi", "lspci"]
FILES = ["/sys/class/kfd/kfd/topology/nodes/1/properties", "/sys/class/kfd/kfd/topology/nodes/1/mem_banks/0/properties",
         "/proc/driver/nvidia/gpus/0000:01:00.0/information", "/proc/driver/nvidia/version", "/dev/nvidia0",
         "/sys/class/drm/card0/device/uevent", "/sys/bus/pci/devices/0000:01:00.0/class", "/proc/device-tree/model",
         "/sys/class/drm/renderD128/device/mem_info_vram_total", "/sys/module/amdgpu/version"]


@st.composite
def garbled(draw: st.DrawFn) -> str:
    """Any text, or a good answer with pieces cut out, doubled or put in."""
    if draw(st.booleans()):
        return draw(st.text(st.characters(codec="utf-8"), max_size=300))
    text = draw(st.sampled_from(GOOD))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 20)))
        text = text[:start] + draw(st.one_of(st.just(""), ODD, st.just(text[start:end] * 2))) + text[end:]
    return text


ANSWER = st.tuples(garbled(), st.sampled_from([0, 0, 2, 9, 15, 255]))
OUTPUTS = st.dictionaries(st.sampled_from(TOOLS), ANSWER, min_size=1)
CONTENTS = st.dictionaries(st.sampled_from(FILES), garbled(), max_size=4)


@pytest.mark.parametrize("how", WAYS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(outputs=OUTPUTS, contents=CONTENTS)
def test_there_is_always_a_valid_report(
    how: str, outputs: dict[str, tuple[str, int]], contents: dict[str, str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder) / "machine")
        for name, (text, code) in outputs.items():
            machine.tool(name, ("*", text, code))
        for path, text in contents.items():
            machine.file(path, text)
        report = machine.report(how, limit="5")
        assert (report.status == "none") == (report.vendor == "NONE")
        assert machine.seconds < 5 + 30
        assert not list(Path(folder).rglob("pwned"))
