"""Both GPU detectors on made-up machines with NVIDIA hardware, healthy and half-broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from machines import WAYS, Machine, codes, nvidia_gpu
from patience import wait_until


@pytest.mark.parametrize("how", WAYS)
def test_healthy_gpus_are_told_in_full(machine: Machine, how: str) -> None:
    rows = [nvidia_gpu(0), nvidia_gpu(1, name="NVIDIA RTX A6000, 48 GB", mib="49140", compute_cap="8.6")]
    machine.nvidia(*rows, apps=[f"{rows[0]['uuid']}, 77, 1500, /usr/bin/python, =, x", "not, a, row"])
    report = machine.report(how)
    assert (report.vendor, report.status, report.slots_total, report.slots_use) == ("NVIDIA", "ok", 2, (0, 1))
    assert report.driver_version == "560.35.03" and report.hand_over is None
    first, second = report.gpus
    assert (first.name, first.memory_total_mib, first.memory_free_mib) == ("NVIDIA GeForce RTX 3090", 24576, 24000)
    assert (first.compute_capability, first.mig, first.busy_mib) == ("8.6", False, 1500)
    assert (second.name, second.busy_mib) == ("NVIDIA RTX A6000, 48 GB", 0)
    assert codes(report) == ["MIXED_MODELS", "GPU_BUSY"]
    assert report.detector == ("detect_gpus.py" if how == "py" else "detect_gpus.sh")


@pytest.mark.parametrize("how", WAYS)
def test_what_the_driver_does_not_know_is_null_and_the_gpu_stays(machine: Machine, how: str) -> None:
    machine.nvidia(nvidia_gpu(0, name="NVIDIA GB10", mib="[N/A]", memory_free="[N/A]", utilization_gpu="ERR!"))
    report = machine.report(how)
    assert (report.status, report.slots_use, codes(report)) == ("ok", (0,), [])
    assert (report.gpus[0].memory_total_mib, report.gpus[0].memory_free_mib) == (None, None)


@pytest.mark.parametrize("how", ["py", "sh"])
def test_fields_that_an_old_driver_refuses_are_left_out(machine: Machine, how: str) -> None:
    machine.nvidia(nvidia_gpu(0), unknown=["compute_cap", "mig.mode.current"])
    report = machine.report(how)
    assert (report.status, report.slots_use, codes(report)) == ("ok", (0,), [])
    assert (report.gpus[0].compute_capability, report.gpus[0].memory_total_mib) == (None, 24576)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("broken", [
    {"memory.total": "[GPU is lost]", "utilization.gpu": "[GPU is lost]"},
    {"uuid": "[Unknown Error]", "memory.total": "[Unknown Error]"},
])
def test_a_lost_gpu_takes_no_slot(machine: Machine, how: str, broken: dict[str, str]) -> None:
    machine.nvidia(nvidia_gpu(0), {**nvidia_gpu(1), **broken}, nvidia_gpu(2))
    report = machine.report(how)
    assert (report.status, report.slots_total, report.slots_use) == ("degraded", 2, (0, 1))
    assert codes(report) == ["NV_GPU_LOST"]
    assert [(gpu.index, gpu.usable) for gpu in report.gpus] == [(0, True), (1, True), (None, False)]
    assert "reboot" in report.problems[0].message


def test_error_sentences_between_rows_count_a_lost_gpu_once(machine: Machine) -> None:
    machine.nvidia(nvidia_gpu(0), "Unable to determine the device handle for GPU0000:83:00.0: GPU is lost.  Reboot the "
                   "system to recover this GPU", ", ".join(["[Unknown Error]"] * 11), nvidia_gpu(2))
    report = machine.report()
    assert (report.slots_total, len(report.gpus), codes(report)) == (2, 3, ["NV_GPU_LOST"])


@pytest.mark.parametrize("how", WAYS)
def test_a_gpu_that_needs_a_reset_keeps_its_slot(machine: Machine, how: str) -> None:
    machine.nvidia(nvidia_gpu(0, utilization_gpu="[GPU requires reset]"), nvidia_gpu(1))
    report = machine.report(how)
    assert (report.status, report.slots_total, report.slots_use) == ("degraded", 2, (1,))
    assert codes(report) == ["NV_RESET_REQUIRED"]
    assert "--gpu-reset" in report.problems[0].message


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("code", "text", "told"), [
    (9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "NV_DRIVER_NOT_LOADED"),
    (12, "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system.", "NV_NVML_MISSING"),
    (4, "Failed to initialize NVML: Insufficient Permissions", "NV_PERMISSION"),
    (6, "No devices were found", "NV_NO_DEVICES"),
    (18, "Failed to initialize NVML: Driver/library version mismatch", "NV_LIB_MISMATCH"),
    (15, "Unable to determine the device handle for GPU0000:C3:00.0: GPU is lost.", "NV_GPU_LOST"),
    (255, "Failed to initialize NVML: Unknown Error", "NV_UNKNOWN"),
    (9, "", "NV_DRIVER_NOT_LOADED"),
    (0, "Segmentation fault", "TOOL_BAD_OUTPUT"),
    (139, "", "TOOL_BAD_OUTPUT"),
])
def test_a_failing_nvidia_smi_is_explained(machine: Machine, how: str, code: int, text: str, told: str) -> None:
    machine.tool("nvidia-smi", ("*", text + "\n", code))
    report = machine.report(how)
    assert (report.vendor, report.status, report.slots_total, codes(report)) == ("NVIDIA", "error", 0, [told])


def test_differing_driver_and_library_are_named(machine: Machine) -> None:
    machine.file("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sat\n")
    machine.tool("nvidia-smi", ("*", "Failed to initialize NVML: Driver/library version mismatch\n"
                                "NVML library version: 580.82\n", 18))
    assert machine.report().problems[0].message == (
        "NVIDIA driver and library differ (580.65.06 loaded, 580.82 installed): reboot the node, or reload the module")


@pytest.mark.parametrize("how", WAYS)
def test_a_hanging_tool_costs_its_time_and_is_ended(machine: Machine, how: str) -> None:
    mark = machine.scratch.parent / "alive"
    machine.script("nvidia-smi", f"#!/bin/bash\ntrap '' TERM\necho $$ > {mark}\nwhile :; do /bin/sleep 0.1; done\n")
    machine.file("/proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t NVIDIA A10G\nDevice Minor: 0\n")
    report = machine.report(how, limit="1")
    assert (report.vendor, report.status, codes(report)) == ("NVIDIA", "error", ["NV_TIMEOUT"])
    assert machine.seconds < 1 + 30  # it hangs for ever
    assert [gpu.name for gpu in report.gpus] == ([] if how == "alone" else ["NVIDIA A10G"])
    wait_until(lambda: not Path(f"/proc/{mark.read_text().strip()}").exists())


@pytest.mark.parametrize("how", WAYS)
def test_a_tool_that_never_stops_printing_is_ended(machine: Machine, how: str) -> None:
    machine.script("nvidia-smi", "#!/bin/bash\nwhile :; do printf '%65536d' 0 || exit; done\n")
    assert machine.report(how, limit="2").status == "error"
    assert machine.seconds < 2 + 30


def test_xml_is_read_where_csv_is_refused(machine: Machine) -> None:
    machine.tool("nvidia-smi", ("-q\\ -x", """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log><driver_version>470.82</driver_version><attached_gpus>4</attached_gpus>
<gpu id="00000000:05:00.0"><product_name>Tesla V100</product_name><uuid>GPU-5</uuid>
<mig_mode><current_mig>N/A</current_mig></mig_mode>
<fb_memory_usage><total>16160 MiB</total><free>15000 MiB</free></fb_memory_usage></gpu></nvidia_smi_log>""", 0))
    report = machine.report()
    assert (report.status, report.slots_use, report.driver_version, codes(report)) == ("ok", (0,), "470.82", [])
    assert (report.gpus[0].name, report.gpus[0].memory_total_mib) == ("Tesla V100", 16160)


def test_a_bare_list_is_better_than_nothing(machine: Machine) -> None:
    machine.tool("nvidia-smi", ("-L", "GPU 0: NVIDIA T4 (UUID: GPU-1)\n  MIG 1g.5gb  Device 0: (UUID: MIG-1)\n", 0))
    report = machine.report()
    assert (report.status, report.slots_use, codes(report)) == ("degraded", (0,), ["TOOL_BAD_OUTPUT"])


@pytest.mark.parametrize("how", ["py", "sh"])
def test_without_nvidia_smi_the_driver_lists_its_gpus(machine: Machine, how: str) -> None:
    for minor, excluded in enumerate(["No", "Yes", "No"]):
        machine.file(f"/proc/driver/nvidia/gpus/0000:0{minor + 1}:00.0/information",
                     f"Model: \t\t Tesla P100\nGPU UUID: \t GPU-{minor}?\nDevice Minor: \t {minor}\n"
                     f"GPU Excluded:\t {excluded}\n")
    machine.file("/dev/nvidia0")  # a container that was given one of the three
    report = machine.report(how)
    assert (report.status, report.slots_use, codes(report)) == ("degraded", (0,), ["NV_NO_SMI"])
    assert [(gpu.name, gpu.uuid, gpu.usable) for gpu in report.gpus] == [("Tesla P100", None, True),
                                                                         ("Tesla P100", None, False)]


@pytest.mark.parametrize("how", WAYS)
def test_a_gpu_in_mig_mode_is_one_slot(machine: Machine, how: str) -> None:
    machine.nvidia(nvidia_gpu(0, name="NVIDIA H100", mib="81559", mig_mode_current="Enabled", utilization_gpu="[N/A]"))
    report = machine.report(how)
    assert (report.status, report.slots_total, report.gpus[0].mig, codes(report)) == ("ok", 1, True, ["MIG_ENABLED"])


@pytest.mark.parametrize("how", WAYS)
def test_wsl_keeps_its_tool_off_the_path(machine: Machine, how: str) -> None:
    machine.nvidia(nvidia_gpu(0), at="/usr/lib/wsl/lib")
    assert machine.report(how).slots_use == (0,)


@pytest.mark.parametrize("how", ["py", "sh"])
def test_a_device_file_without_a_gpu_behind_it_is_a_lost_gpu(machine: Machine, how: str) -> None:
    machine.nvidia(nvidia_gpu(0))
    for minor in range(2):
        machine.file(f"/dev/nvidia{minor}")
        machine.file(f"/proc/driver/nvidia/gpus/0000:0{minor + 1}:00.0/information",
                     f"Model: NVIDIA GeForce RTX 3090\nDevice Minor: {minor}\nBus Location: 0000:0{minor + 1}:00.0\n")
    report = machine.report(how)
    assert (report.status, report.slots_total, codes(report)) == ("degraded", 1, ["NV_GPU_LOST"])


def test_an_old_jetson_has_no_nvidia_smi(machine: Machine) -> None:
    machine.file("/proc/device-tree/model", "NVIDIA Jetson AGX Xavier\0")
    report = machine.report("sh")
    assert (report.vendor, report.slots_use, codes(report)) == ("NVIDIA", (0,), ["IGPU_ONLY"])


@pytest.mark.parametrize("how", WAYS)
def test_a_warning_beside_good_rows_costs_no_gpu(machine: Machine, how: str) -> None:
    machine.nvidia(nvidia_gpu(0), "Some notice of a later driver")
    report = machine.report(how)
    assert (report.status, report.slots_use, codes(report)) == ("ok", (0,), [])


def test_a_corrupted_inforom_is_a_warning(machine: Machine) -> None:
    machine.nvidia(nvidia_gpu(0), "WARNING: infoROM is corrupted at gpu 0000:01:00.0")
    report = machine.report("sh")
    assert (report.status, report.slots_use, codes(report)) == ("degraded", (0,), ["TOOL_BAD_OUTPUT"])
    assert "infoROM" in report.problems[0].message


def test_a_gpu_that_is_gone_from_the_bus_is_lost(machine: Machine) -> None:
    machine.nvidia(nvidia_gpu(0))
    machine.pci("0000:01:00.0", 0x10DE, 0x2684, 0x0300, "nvidia")
    machine.pci("0000:02:00.0", 0x10DE, 0x2684, 0x0300, "nvidia")
    machine.file("/sys/bus/pci/devices/0000:02:00.0/revision", "0xff\n")
    report = machine.report("sh")
    assert (report.status, report.slots_total, codes(report)) == ("degraded", 1, ["NV_GPU_LOST"])


@pytest.mark.parametrize("how", WAYS)
def test_a_tool_that_hangs_at_its_second_question_keeps_its_first_answer(machine: Machine, how: str) -> None:
    machine.nvidia(nvidia_gpu(0))
    (machine.bin / "nvidia-smi").rename(machine.bin / "real-smi")
    machine.script("nvidia-smi", f"#!/bin/bash\ncase \"$*\" in *compute-apps*) sleep 60;; esac\n"
                   f"exec {machine.bin}/real-smi \"$@\"\n")
    report = machine.report(how, limit="1.5")
    assert (report.status, report.slots_use, codes(report)) == ("degraded", (0,), ["NV_TIMEOUT"])
    assert machine.seconds < 1.5 + 30
