"""Both GPU detectors on made-up machines with AMD and Intel hardware, in the shapes that each release of a tool has."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from machines import WAYS, Machine, codes
from programs import let_others_in

GIB = 1 << 30


@pytest.mark.parametrize("how", WAYS)
def test_the_kernels_topology_counts_amd_gpus(machine: Machine, how: str) -> None:
    machine.kfd(0, simd_count=0, vendor_id=0)  # the CPU
    machine.kfd(2, banks=(64 * GIB,))
    machine.kfd(10, drm={"mem_info_vram_total": str(64 * GIB), "product_name": "Instinct MI210 (ours)",
                         "mem_info_vram_vendor": "samsung"})
    report = machine.report(how)
    assert (report.vendor, report.status, report.slots_use, report.hand_over) == ("AMD", "ok", (0, 1), None)
    assert [gpu.name for gpu in report.gpus] == ["AMD Instinct MI210", "Instinct MI210 (ours)"]
    assert [(gpu.memory_total_mib, gpu.arch) for gpu in report.gpus] == [(65536, "gfx90a")] * 2
    assert report.gpus[0].uuid == "GPU-8000000000000002"


@pytest.mark.parametrize("how", WAYS)
def test_each_partition_is_a_slot(machine: Machine, how: str) -> None:
    for node in range(4):
        machine.kfd(node, banks=(48 * GIB,), unique_id=7, location_id=2560 + node, device_id=0x74A2,
                    gfx_target_version=90402)
    report = machine.report(how)
    assert (report.status, report.slots_total, codes(report)) == ("ok", 4, ["PARTITIONED"])
    assert {gpu.arch for gpu in report.gpus} == {"gfx942"}


@pytest.mark.parametrize("how", WAYS)
def test_integrated_graphics_keep_their_number_and_are_left_out(machine: Machine, how: str) -> None:
    machine.kfd(1, gfx_target_version=100306, device_id=0x164E, banks=(512 << 20,), drm={"product_name": "Raphael"})
    machine.kfd(2, drm={"product_name": "Radeon RX 7900 XTX", "board_info": "type : oam"}, gfx_target_version=110000)
    report = machine.report(how)
    assert (report.status, report.slots_total, report.slots_use) == ("ok", 2, (1,))
    assert codes(report) == ["IGPU_PRESENT"]


@pytest.mark.parametrize("how", WAYS)
def test_a_missing_kfd_device_is_told(machine: Machine, how: str) -> None:
    machine.kfd(1)
    machine.file("/dev/null")
    report = machine.report(how)
    assert (report.status, report.slots_total, codes(report)) == ("error", 0, ["AMD_NO_KFD"])


@pytest.mark.root
@pytest.mark.needs("setpriv")
@pytest.mark.parametrize("how", WAYS)
def test_a_user_outside_the_group_is_told_which(machine: Machine, how: str, tmp_path: Path) -> None:
    machine.kfd(1)
    machine.file("/dev/kfd").chmod(0o600)
    let_others_in(tmp_path)
    os.chown(machine.scratch, 65534, 65534)
    report = machine.report(how, user="65534")
    assert (report.status, codes(report)) == ("error", ["AMD_KFD_PERMISSION"])
    assert "sudo usermod -aG render,video" in report.problems[0].message


SMI_ENTRY = {"gpu": 0, "asic": {"market_name": "AMD Instinct MI300X", "device_id": "0x74a1",
                                "target_graphics_version": "gfx942"},
             "bus": {"bdf": "0000:0A:00.0"}, "vram": {"size": {"value": 196592, "unit": "MB"}}}


@pytest.mark.parametrize(("text", "driver", "expected"), [
    (json.dumps([{**SMI_ENTRY, "driver": {"name": "amdgpu", "version": "6.8"}}]), "6.8", []),
    (json.dumps({"gpu_data": [{**SMI_ENTRY, "driver": {"NAME": "amdgpu", "VERSION": "6.14"}}]}) + "\n[]\n", "6.14", []),
    ("\x1b[33mWARNING: User is missing the following required groups: render, video. [sic]\x1b[0m\n"
     + json.dumps([SMI_ENTRY]), None, ["AMD_GROUPS"]),
])
def test_amd_smi_in_all_its_shapes(machine: Machine, text: str, driver: str | None, expected: list[str]) -> None:
    machine.tool("amd-smi", ("static*", text, 0), ("list*", '[{"gpu": 0, "bdf": "0000:0a:00.0", "uuid": "a-b"}]', 0))
    report = machine.report("sh")
    assert (report.status, report.slots_use, report.driver_version, codes(report)) == ("ok", (0,), driver, expected)
    gpu = report.gpus[0]
    assert (gpu.name, gpu.memory_total_mib, gpu.arch, gpu.uuid) == ("AMD Instinct MI300X", 196592, "gfx942", "a-b")


ROCM_JSON = json.dumps({
    "card1": {"Card Series": "AMD Radeon RX 7900 XTX", "GFX Version": "gfx1100", "VRAM Total Memory (B)": "25753026560",
              "VIS_VRAM Total Memory (B)": "268435456", "VRAM Total Used Memory (B)": "1048576"},
    "card0": {"Card series": "0x1002", "GPU ID": "0x738c", "Unique ID": "0xab", "VRAM Total Memory (B)": "34342961152"},
    "system": {"Driver version": "6.3.6"}})
ROCM_CSV = "WARNING: low-power state\n\ndevice,Card Series,VRAM Total Memory (B)\ncard0,Instinct MI210,68702699520\n"
ROCM_TEXT = "=== ID ===\nGPU[0]\t\t: Device Name: \t\tInstinct MI210\nGPU[0]\t\t: Device ID: \t\t0x740f\n=== End ===\n"


@pytest.mark.parametrize(("answers", "names", "memory"), [
    ([("*--json*", ROCM_JSON, 0)], ["AMD Instinct MI100", "AMD Radeon RX 7900 XTX"], [32752, 24560]),
    ([("*--json*", "", 0), ("*--csv*", ROCM_CSV, 0)], ["Instinct MI210"], [65520]),
    ([("*", ROCM_TEXT, 0)], ["Instinct MI210"], [None]),
])
def test_rocm_smi_in_all_its_shapes(machine: Machine, answers: list[tuple[str, str, int]], names: list[str],
                                    memory: list[int | None]) -> None:
    machine.tool("rocm-smi", *answers)
    machine.variables = {"LC_ALL": "de_DE.UTF-8"}
    report = machine.report("sh")
    assert (report.vendor, report.status) == ("AMD", "ok")
    assert [gpu.name for gpu in report.gpus] == names
    assert [gpu.memory_total_mib for gpu in report.gpus] == memory


@pytest.mark.parametrize(("err", "told"), [
    ("ERROR: Driver not initialized (amdgpu not found in modules)", "AMD_DRIVER_NOT_LOADED"),
    ("WARNING: No JSON data to report", "AMD_NO_DEVICES"),
    ("ERROR: Unable to open /dev/kfd read-write", "AMD_KFD_PERMISSION"),
])
def test_rocm_smi_fails_with_exit_code_0(machine: Machine, err: str, told: str) -> None:
    machine.tool("rocm-smi", ("*", "", 0), err=err)
    machine.pci("0000:03:00.0", 0x1002, 0x740F, 0x1200)
    report = machine.report("sh")
    assert (report.vendor, report.status, codes(report)) == ("AMD", "error", [told])
    assert [gpu.usable for gpu in report.gpus] == [False]


def test_rocminfo_is_asked_last(machine: Machine) -> None:
    machine.tool("rocminfo", ("*", """
*******
Agent 1
*******
  Name:                    AMD EPYC 7763
  Device Type:             CPU
*******
Agent 2
*******
  Name:                    gfx90a
  Uuid:                    GPU-00000000000000ab
  Marketing Name:          AMD Instinct MI210
  Device Type:             GPU
  Pool Info:
    Pool 1
      Segment:                 GLOBAL; FLAGS: COARSE GRAINED
      Size:                    67092480(0x3ffc000) KB
""", 0))
    gpu = machine.report().gpus[0]
    assert (gpu.name, gpu.arch, gpu.uuid, gpu.memory_total_mib) == (
        "AMD Instinct MI210", "gfx90a", "GPU-00000000000000ab", 65520)


# -- Intel ------------------------------------------------------------------------------------------------------------

XPU_TABLE = """
+-----------+---------------------------------------+
| Device ID | Device Information                    |
+-----------+---------------------------------------+
| 0         | Device Name: Intel(R) Flex 170        |
|           | PCI BDF Address: 0000:4d:00.0         |
|           | Memory Physical Size: 14248.00 MiB    |
+-----------+---------------------------------------+
"""


@pytest.mark.parametrize("size", ["51522830336", '"51522830336"'])
def test_xpu_smi_tells_memory_device_by_device(machine: Machine, size: str) -> None:
    listing = {"device_list": [
        {"device_id": number, "device_name": name, "pci_bdf_address": f"0000:{bus}", "device_function_type": kind}
        for number, (name, bus, kind) in enumerate([
            ("UHD", "00:02.0", "physical"), ("Max 1100", "29:00.0", "physical"), ("Max 1100", "29:00.1", "virtual")])]}
    machine.tool("xpu-smi", ("*-d\\ 1*", f'{{"memory_physical_size_byte": {size}, "driver_version": "I915"}}', 0),
                 ("*-j", json.dumps(listing), 0))
    report = machine.report("sh")
    assert (report.vendor, report.status, report.slots_use, report.driver_version) == ("INTEL", "ok", (0,), "I915")
    assert (report.gpus[0].name, report.gpus[0].memory_total_mib) == ("Max 1100", 49136)


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "without xpu-smi"])
def test_a_card_that_waits_for_firmware_is_no_slot(listed: bool, machine: Machine) -> None:
    machine.pci("0000:03:00.0", 0x8086, 0xE20B, 0x0300, "xe")
    machine.file("/sys/bus/pci/devices/0000:03:00.0/survivability_mode", "Boot\n")
    listing = {"device_list": [{"device_id": 0, "device_name": "Arc B580", "pci_bdf_address": "0000:03:00.0",
                                "device_function_type": "physical"}]}
    if listed:
        machine.tool("xpu-smi", ("*-j", json.dumps(listing), 0))
    report = machine.report()
    assert (report.vendor, report.status, report.slots_total) == ("INTEL", "error", 0)
    assert codes(report) == ["HW_WITHOUT_DRIVER"] and "survivability mode" in report.problems[0].message


def test_xpu_smis_table_serves_too(machine: Machine) -> None:
    machine.tool("xpu-smi", ("*", XPU_TABLE, 0))
    gpu = machine.report().gpus[0]
    assert (gpu.name, gpu.memory_total_mib) == ("Intel(R) Flex 170", 14248)


def test_partitions_are_seen_by_rocms_tools_too(machine: Machine) -> None:
    entries = [{"gpu": n, "asic": {"market_name": "AMD Instinct MI300X" if n == 0 else "N/A", "device_id": "0x74a1"},
                "bus": {"bdf": f"0000:05:00.{n}"}, "vram": {"vram_size_mb": 24574}} for n in range(4)]
    machine.tool("amd-smi", ("static*", json.dumps({"gpu_data": entries}), 0))
    report = machine.report("sh")
    assert (report.status, report.slots_total, codes(report)) == ("ok", 4, ["PARTITIONED"])
    assert {(gpu.name, gpu.memory_total_mib) for gpu in report.gpus} == {("AMD Instinct MI300X", 24574)}


def test_amd_smi_without_a_driver_says_so(machine: Machine) -> None:
    machine.tool("amd-smi", ("*", "Driver not loaded (amdgpu not found in modules)", 255))
    machine.pci("0000:03:00.0", 0x1002, 0x740F, 0x1200)
    assert codes(machine.report("sh")) == ["AMD_DRIVER_NOT_LOADED"]
