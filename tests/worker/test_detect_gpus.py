"""Both GPU detectors on made-up machines: hardware without a driver, several vendors, nothing at all, use by hand."""

from __future__ import annotations

import subprocess

import pytest
from machines import WAYS, Machine, codes, nvidia_gpu


@pytest.mark.parametrize(("functions", "vendor", "told", "count"), [
    ([(f"000{n}:00:00.0", 0x10DE, 0x20B2, 0x0302, "") for n in range(1, 9)]
     + [("000a:00:00.0", 0x10DE, 0x1AF1, 0x0680, "")], "NVIDIA", "HW_WITHOUT_DRIVER", 8),
    ([("0000:01:00.0", 0x10DE, 0x2684, 0x0300, "nouveau")], "NVIDIA", "HW_WITHOUT_DRIVER", 1),
    ([("0000:01:00.0", 0x10DE, 0x2684, 0x0300, "nvidia")], "NVIDIA", "NV_NO_SMI", 1),
    ([("0000:01:00.0", 0x10DE, 0x2684, 0x0300, "vfio-pci")], "NVIDIA", "GPU_BOUND_VFIO", 1),
    ([("0000:83:00.0", 0x1002, 0x74A1, 0x1200, "")], "AMD", "HW_WITHOUT_DRIVER", 1),
    ([("0000:83:00.0", 0x1002, 0x744C, 0x0300, "amdgpu")], "AMD", "AMD_NO_KFD", 1),
    ([("0000:29:00.0", 0x8086, 0x0BDA, 0x0380, "")], "INTEL", "HW_WITHOUT_DRIVER", 1),
    ([("0000:00:05.0", 0x8086, 0x56C0, 0x0380, "")], "INTEL", "HW_WITHOUT_DRIVER", 1),
])
def test_hardware_that_nothing_drives_is_an_error(machine: Machine, functions: list[tuple[str, int, int, int, str]],
                                                  vendor: str, told: str, count: int) -> None:
    for function in functions:
        machine.pci(*function)
    report = machine.report("sh")
    assert (report.vendor, report.status, report.slots_total, codes(report)) == (vendor, "error", 0, [told])
    assert len(report.gpus) == count and not report.usable
    assert machine.report("alone").status == "error"


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("vendor", "device", "kind", "expected"), [
    (0x1234, 0x1111, 0x0300, []), (0x1A03, 0x2000, 0x0300, []), (0x1AF4, 0x1050, 0x0380, []),
    (0x10DE, 0x1AF1, 0x0680, []), (0x10DE, 0x0E08, 0x0403, []), (0x1DD8, 0x100A, 0x0200, []),
    (0x8086, 0x4680, 0x0300, ["IGPU_ONLY"]), (0x8086, 0x4680, 0x0380, ["IGPU_ONLY"]),
    (0x1002, 0x164E, 0x0300, ["IGPU_ONLY"]),
])
def test_what_is_no_gpu_does_not_count(machine: Machine, how: str, vendor: int, device: int, kind: int,
                                       expected: list[str]) -> None:
    machine.pci("0000:00:02.0", vendor, device, kind)
    report = machine.report(how)
    assert (report.vendor, report.status, codes(report), report.hand_over) == ("NONE", "none", expected, None)


def test_lspci_is_asked_where_sysfs_has_no_bus(machine: Machine) -> None:
    machine.tool("lspci", ("*", "0000:c3:00.0 Display controller [0380]: Advanced Micro [AMD/ATI] X [1002:1586]\n"
                           "\tSubsystem: Someone [f111:000a]\n\tKernel driver in use: vfio-pci\n", 0))
    report = machine.report("sh")
    assert (report.vendor, report.status, codes(report)) == ("AMD", "error", ["GPU_BOUND_VFIO"])
    assert "virtual machines" in report.problems[0].message


@pytest.mark.parametrize("how", WAYS)
def test_nothing_is_told_at_once(machine: Machine, how: str) -> None:
    report = machine.report(how)
    assert (report.vendor, report.status, report.gpus, codes(report)) == ("NONE", "none", (), [])
    if how == "alone":
        assert machine.cpu_seconds < 0.5


@pytest.mark.parametrize("tool", ["nvidia-smi", "rocm-smi", "amd-smi"])
def test_tools_on_a_machine_without_their_hardware_are_no_fault(machine: Machine, tool: str) -> None:
    machine.tool(tool, ("*", "couldn't communicate with the NVIDIA driver; Driver not initialized\n", 9))
    machine.pci("0000:00:01.0", 0x1234, 0x1111, 0x0300)
    report = machine.report("sh")
    assert (report.vendor, report.status, codes(report)) == ("NONE", "none", [])


def test_a_broken_discrete_gpu_goes_before_idle_integrated_graphics(machine: Machine) -> None:
    machine.tool("nvidia-smi", ("*", "Failed to initialize NVML: Unknown Error\n", 255))
    machine.kfd(1, gfx_target_version=100306, device_id=0x164E)
    report = machine.report("sh")
    assert (report.vendor, report.status, codes(report)) == ("NVIDIA", "error", ["NV_UNKNOWN"])


@pytest.mark.parametrize("how", WAYS)
def test_a_left_over_nvidia_smi_does_not_hide_amd_gpus(machine: Machine, how: str) -> None:
    machine.tool("nvidia-smi", ("*", "couldn't communicate with the NVIDIA driver.", 9))
    machine.kfd(1)
    report = machine.report(how)
    assert (report.vendor, report.status, report.slots_use, codes(report)) == ("AMD", "ok", (0,), [])


def test_of_two_vendors_the_one_with_more_gpus_is_chosen(machine: Machine) -> None:
    machine.nvidia(nvidia_gpu(0))
    for node in (1, 2):
        machine.kfd(node)
    report = machine.report("sh")
    assert (report.vendor, report.slots_use, codes(report)) == ("AMD", (0, 1), ["MIXED_VENDORS"])


@pytest.mark.parametrize("how", WAYS)
def test_variables_that_hide_gpus_are_told_and_not_obeyed(machine: Machine, how: str) -> None:
    machine.nvidia(nvidia_gpu(0), nvidia_gpu(1))
    machine.variables = {"CUDA_VISIBLE_DEVICES": "1", "NVIDIA_VISIBLE_DEVICES": "all"}
    report = machine.report(how)
    assert (report.status, report.slots_use, codes(report)) == ("ok", (0, 1), ["CUDA_VISIBLE_DEVICES_SET"])
    assert "CUDA_VISIBLE_DEVICES=1" in report.problems[0].message


def test_the_shell_script_says_when_it_is_not_sure(machine: Machine) -> None:
    machine.tool("rocm-smi", ("*", '{"card0": {"Card series": "MI210"}}', 0))
    report = machine.report("alone")
    assert (report.vendor, report.status, codes(report)) == ("AMD", "error", ["TOOL_BAD_OUTPUT"])
    assert report.hand_over and "rocm-smi" in report.hand_over


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_both_detectors_say_the_same(machine: Machine) -> None:
    rows = [nvidia_gpu(0), nvidia_gpu(1, mib="49140"), nvidia_gpu(2, memory_total="[GPU is lost]"),
            nvidia_gpu(3, utilization_gpu="[GPU requires reset]"),
            nvidia_gpu(4, mig_mode_current="Enabled", mib="[N/A]")]
    machine.nvidia(*rows, apps=[f"{rows[1]['uuid']}, 7, 3000, python", f"{rows[4]['uuid']}, 7, [N/A], python"])
    by_python, by_shell = machine.report("py").to_json(), machine.report("alone").to_json()
    assert {**by_python, "detector": None, "problems": None} == {**by_shell, "detector": None, "problems": None}
    assert codes(machine.report("py")) == codes(machine.report("alone"))
    tables = {how: machine.ask(how, words=("--table",)).splitlines()[:7] for how in WAYS}
    assert tables["py"] == tables["sh"] == tables["alone"]


@pytest.mark.parametrize("how", WAYS)
def test_the_table_is_for_people(machine: Machine, how: str) -> None:
    machine.nvidia(nvidia_gpu(0), nvidia_gpu(1, utilization_gpu="[GPU requires reset]"))
    text = machine.ask(how, words=("--table",))
    assert "NVIDIA, degraded, 2 slots, driver 560.35.03" in text
    assert "UNUSABLE" in text and "NV_RESET_REQUIRED: " in text and "@@" not in text
    assert machine.ask(how, words=("--json",)).startswith("\n@@GPU_REPORT - {")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("words", [("--nonce", "a b"), ("--nonce", '"; rm'), ("--nonce",), ("--what",)])
def test_wrong_usage_is_exit_code_2(machine: Machine, how: str, words: tuple[str, ...]) -> None:
    command, sent = machine.command(how)
    done = subprocess.run([*command, *words], input=sent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage:" in done.stderr


def test_integrated_graphics_do_not_stand_in_for_a_discrete_gpu_without_driver(machine: Machine) -> None:
    machine.kfd(1, gfx_target_version=100306, device_id=0x164E, location_id=0x1200)
    machine.pci("0000:12:00.0", 0x1002, 0x164E, 0x0300, "amdgpu")
    machine.pci("0000:03:00.0", 0x1002, 0x744C, 0x0300)
    report = machine.report("sh")
    assert (report.vendor, report.status, report.slots_use) == ("AMD", "error", ())
    assert codes(report) == ["HW_WITHOUT_DRIVER"]


def test_wsls_bus_says_nothing_of_its_gpu(machine: Machine) -> None:
    machine.file("/dev/dxg")
    machine.pci("1414:00:00.0", 0x1414, 0x008E, 0x0302)
    machine.tool("nvidia-smi", ("*", "couldn't communicate with the NVIDIA driver", 9))
    assert codes(machine.report("sh")) == ["NV_DRIVER_NOT_LOADED"]


@pytest.mark.parametrize("how", WAYS)
def test_the_shells_own_options_do_no_harm(machine: Machine, how: str) -> None:
    machine.nvidia(nvidia_gpu(0))
    machine.variables = {"SHELLOPTS": "braceexpand:errexit:nounset", "BASHOPTS": "failglob:nullglob:nocasematch"}
    assert machine.report(how).slots_use == (0,)


def test_colours_and_words_around_a_tools_answer_do_no_harm(machine: Machine) -> None:
    machine.tool("rocm-smi", ("*--json*", '\x1b[0m{"card0": {"Card series": "Instinct MI210"}}\x1b[0m\n', 0))
    assert machine.report("sh").gpus[0].name == "Instinct MI210"


def test_a_servers_own_display_is_no_gpu(machine: Machine) -> None:
    machine.pci("0000:01:00.0", 0x1002, 0x515E, 0x0300, "radeon")
    assert [machine.report(how).vendor for how in WAYS] == ["NONE"] * 3
