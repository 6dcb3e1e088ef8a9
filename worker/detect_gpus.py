#!/usr/bin/env python3
"""Tell which GPUs this machine can train on, what is wrong with the others, and how to fix it.

    python3 worker/detect_gpus.py            a table on a terminal, else the report as one line
    python3 worker/detect_gpus.py --nonce N  the line '@@GPU_REPORT N {...}' (schemas/gpu_report.schema.json)

One file for Python 3.8+ without packages, so that it runs wherever it is copied or streamed to. It asks the kernel's
own tables first and vendors' tools for names and memory; a tool that hangs, lies or prints its error into its
output becomes a problem with a code, never a wrong count. Exit 0 whenever a report was printed, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

Gpu = Dict[str, Any]  # one row of the report's "gpus", and "_bus" while the report is being made

ROOT = os.environ.get("GPU_DETECT_SYSROOT", "").rstrip("/")
STARTED = time.monotonic()
OUTPUT_LIMIT = 16 << 20  # bytes that a tool may print
TERM_TO_KILL_S, KILL_TO_ABANDON_S = 1.5, 0.3
# Where tools are that a session without a login shell doesn't find.
PLACES = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
PLACES_BELOW_ROOT = ["/usr/lib/wsl/lib", "/opt/rocm/bin", "/usr/local/nvidia/bin", "/usr/local/cuda/bin", "/opt/bin",
                     "/var/lib/nvidia/bin", "/run/current-system/sw/bin", "/opt/nvidia/bin"]
UNKNOWN = re.compile(r"\[?(n/a|none|err!|unknown|unknown error|not supported|not available|insufficient permissions|"
                     r"gpu is lost|gpu requires reset|requested functionality has been deprecated)\]?|\s*", re.I)
NOTICES = {"MIG_ENABLED", "PARTITIONED", "IGPU_PRESENT", "IGPU_ONLY", "MIXED_MODELS", "MIXED_VENDORS", "GPU_BUSY",
           "AMD_GROUPS"}
BUSY_MIB = 1024


def time_limit() -> float:
    """Return the seconds that each vendor's tools may take."""
    try:
        return min(max(float(os.environ.get("GPU_DETECT_TIMEOUT", "30")), 0.5), 3600)
    except ValueError:
        return 30.0


LIMIT_S = time_limit()


class Problem(Exception):
    """Something wrong, or (codes in NOTICES and *_SET) worth knowing: a code, and a message that says how to fix it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message

    @property
    def is_fault(self) -> bool:
        return self.code not in NOTICES and not self.code.endswith("_SET")


class Findings:
    """What was found of one vendor: rows in the runtime's order, problems, the driver's version."""

    def __init__(self, vendor: str) -> None:
        self.vendor = vendor
        self.gpus: list[Gpu] = []
        self.problems: list[Problem] = []
        self.driver: str | None = None

    def add(self, code: str, message: str) -> None:
        """Add a problem, once a code."""
        if code not in [problem.code for problem in self.problems]:
            self.problems.append(Problem(code, message))

    @property
    def faults(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.is_fault]


def gpu(name: str | None, **facts: Any) -> Gpu:
    """Return a row of the report; what isn't given is unknown."""
    row: Gpu = {"index": None, "name": name, "uuid": None, "memory_total_mib": None, "memory_free_mib": None,
                "compute_capability": None, "arch": None, "mig": False, "integrated": False, "usable": True,
                "busy_mib": None, "_bus": None}
    row.update(facts)
    row["memory_total_mib"] = row["memory_total_mib"] or None  # a total of 0 is no knowledge
    return row


# -- values ------------------------------------------------------------------------------------------------------------


def known(text: Any) -> str | None:
    """Return a value as printable text, or None for what stands for 'unknown'."""
    if not isinstance(text, (str, int, float)) or isinstance(text, bool):
        return None
    clean = "".join(c if c.isprintable() else " " for c in str(text)).strip()[:200]
    return None if UNKNOWN.fullmatch(clean) else clean


def whole(text: Any) -> int | None:
    """Return a number of at most 18 digits, with or without a unit behind it, or None."""
    found = re.fullmatch(r"\s*([0-9]{1,18})(?:\.[0-9]*)?\s*(?:[KMG]i?B|B|%)?\s*", str(text))
    return int(found.group(1)) if found else None


def mib_of_bytes(text: Any) -> int | None:
    """Return bytes as whole MiB, or None."""
    value = whole(text)
    return None if value is None else value >> 20


def total_of(values: list[int | None]) -> int | None:
    """Return the sum of all values, or None if one of them is unknown."""
    return None if None in values else sum(value or 0 for value in values)


def bus_of(text: Any) -> str | None:
    """Return a PCI address as domain:bus:device.function; nvidia-smi's domain has 8 digits, lspci may leave it out."""
    found = re.search(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])\b", str(text).lower())
    return f"{int(found.group(1) or '0', 16):04x}:{found.group(2)}:{found.group(3)}.{found.group(4)}" if found else None


def count_of(number: int, what: str) -> str:
    """Return '1 GPU', '2 GPUs'."""
    return f"{number} {what}{'s' * (number != 1)}"


# -- files -------------------------------------------------------------------------------------------------------------


def rooted(path: str) -> Path:
    """Return a path below the root that is looked at."""
    return Path(ROOT + path)


def read(path: Path) -> str:
    """Return a file's text, stripped; '' if it can't be read."""
    try:
        with path.open("rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace").strip("\0 \t\r\n")
    except OSError:
        return ""


def listed(path: str, pattern: str) -> list[Path]:
    """Return the entries of a folder whose whole names match, by the numbers in them."""
    try:
        names = [name for name in os.listdir(ROOT + path) if re.fullmatch(pattern, name)]
    except OSError:
        return []
    return [rooted(path) / name for name in sorted(names, key=lambda n: ([int(d) for d in re.findall("[0-9]+", n)], n))]


def pairs(text: str, mark: str = ":") -> dict[str, str]:
    """Return 'key: value' lines as a dictionary."""
    split = (line.partition(mark) for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in split if key.strip()}


# -- tools -------------------------------------------------------------------------------------------------------------


class Answer:
    """How a tool ended: exit code (None if it hung), output; `there` is False if it isn't installed."""

    def __init__(self, code: int | None, out: str = "", err: str = "", there: bool = True) -> None:
        self.code, self.out, self.err, self.there = code, out, err, there

    @property
    def hung(self) -> bool:
        return self.there and self.code is None

    @property
    def text(self) -> str:
        return self.out + "\n" + self.err


def find_tool(name: str) -> str | None:
    """Return a tool's path: from PATH, else from the places that ssh sessions don't look in."""
    below = [ROOT + place for place in PLACES_BELOW_ROOT] + [str(path / "bin") for path in listed("/opt", "rocm-.*")]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *([] if ROOT else PLACES), *below]))


def scratch_file() -> Any:
    """Return a nameless file: in memory where the system can, so that a full disk doesn't matter."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("gpus"), "w+b")
    return tempfile.TemporaryFile()


class Tools:
    """Runs one vendor's tools: all of them together within the time limit, none again after one has hung."""

    def __init__(self) -> None:
        self.hung: str | None = None
        self.short = False  # it was cut off with less than half of the time limit left for it

    def run(self, name: str, *argv: str) -> Answer:
        """Run a tool with its output in a file, since a pipe or a wait may outlive the tool; never raises."""
        path = find_tool(name)
        if path is None:
            return Answer(None, there=False)
        left = STARTED + LIMIT_S - time.monotonic()
        if self.hung or left <= 0 or name in os.environ.get("GPU_DETECT_HUNG", "").split():
            self.hung = self.hung or name
            return Answer(None)
        environment = dict(os.environ, LC_ALL="C", PYTHONIOENCODING="utf-8")
        try:
            with scratch_file() as out, scratch_file() as err:
                process = subprocess.Popen([path, *argv], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                           env=environment, start_new_session=True)
                code = self._wait(process, left, (out, err))
                if code is None:
                    self.hung, self.short = name, left < LIMIT_S / 2
                return Answer(code, self._content(out), self._content(err))
        except OSError as error:
            return Answer(126, err=str(error))

    @staticmethod
    def _content(file: Any) -> str:
        file.seek(0)
        text = file.read(OUTPUT_LIMIT).decode("utf-8", "replace").replace("\r\n", "\n")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)

    @staticmethod
    def _wait(process: Any, seconds: float, files: tuple[Any, ...]) -> int | None:
        """Return the exit code, or None for a process that had to be ended (or, in a dead driver, abandoned)."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and all(os.fstat(file.fileno()).st_size < OUTPUT_LIMIT for file in files):
            try:
                return process.wait(timeout=max(0.01, min(0.25, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                continue
        for number, patience in ((signal.SIGTERM, TERM_TO_KILL_S), (signal.SIGKILL, KILL_TO_ABANDON_S)):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=patience)
                break
            except (subprocess.TimeoutExpired, ProcessLookupError, PermissionError):
                continue
        return None


def first_json(text: str) -> Any:
    """Return the first JSON value that begins a line; warnings stand before it, other values may follow."""
    for found in re.finditer(r"^\s*([\[{])", text, re.M):
        try:
            return json.JSONDecoder().raw_decode(text, found.start(1))[0]
        except (ValueError, RecursionError):
            continue
    return None


def lower_keys(value: Any) -> dict[str, Any]:
    """Return a dictionary with its keys in lower case; {} for anything else."""
    return {str(key).lower(): item for key, item in value.items()} if isinstance(value, dict) else {}


# -- the PCI bus -------------------------------------------------------------------------------------------------------

VENDORS = {"10de": "NVIDIA", "1002": "AMD", "8086": "INTEL"}
# Class prefixes of GPUs. Not among them: NVSwitch bridges (0680), their audio and USB functions.
GPU_CLASSES = {"NVIDIA": ("0300", "0302"), "AMD": ("0300", "0302", "0380", "1200"), "INTEL": ("0300", "0302", "0380")}
ELSEWHERE = {"vfio-pci", "pci-stub", "gim", "xen-pciback"}  # drivers that give a device to a virtual machine
# Integrated AMD parts without ROCm support that is worth having: Raven to Krackan, but not Strix Halo (1586).
WEAK_IGPUS = {"15dd", "15d8", "1636", "1638", "164c", "163f", "164d", "1681", "15bf", "15c8", "164e", "1506", "13c0",
              "150e", "1900", "1901", "1114", "15e7"}
BOARD_DISPLAYS = {"515e", "4752"}  # ATI ES1000 and Rage XL, which servers have on their mainboards


class PciFunction:
    """A GPU on the bus, used or not. `driver` is None if none is bound, '' if that couldn't be seen.

    `kind` is the class and subclass in hexadecimal digits; `gone`: it no longer answers on the bus.
    """

    def __init__(self, bus: str, vendor: str, device: str, kind: str, driver: str | None, name: str | None, gone: bool
                 ) -> None:
        self.bus, self.vendor, self.device, self.kind = bus, vendor, device, kind
        self.driver, self.name, self.gone = driver, name, gone

    @property
    def weak(self) -> bool:
        """True for integrated graphics that nobody trains on."""
        return self.device in WEAK_IGPUS if self.vendor == "AMD" else self.is_intel_igpu

    @property
    def is_intel_igpu(self) -> bool:
        first_bus = self.bus.startswith("0000:00:")
        return self.vendor == "INTEL" and first_bus and (self.kind != "0380" or self.bus.startswith("0000:00:02"))


def pci_function(bus: Any, vendor: str, device: str, kind: str, driver: str | None, name: str | None = None,
                 gone: bool = False) -> PciFunction | None:
    """Return a function if it is a GPU. vendor, device, kind (the class): hexadecimal, with or without 0x."""
    maker = VENDORS.get(vendor.lower().replace("0x", "").zfill(4))
    address = bus_of(bus)
    kind = kind.lower().replace("0x", "")[:4]
    if not maker or not address or kind not in GPU_CLASSES[maker] or device.lower()[-4:] in BOARD_DISPLAYS:
        return None
    return PciFunction(address, maker, device.lower().replace("0x", "").zfill(4), kind, driver, name, gone)


def pci_from_sysfs() -> Iterator[PciFunction | None]:
    """Yield what /sys knows: the bus itself, or, where that isn't to be seen, the cards with a graphics driver."""
    for folder in listed("/sys/bus/pci/devices", r"[0-9a-f:.]+"):
        event = pairs(read(folder / "uevent"), "=")
        link = folder / "driver"
        driver = os.path.basename(os.readlink(str(link))) if link.is_symlink() else event.get("DRIVER")
        vendor, device, kind = read(folder / "vendor"), read(folder / "device"), read(folder / "class")
        yield pci_function(folder.name, vendor, device, kind, driver, gone=read(folder / "revision") == "0xff")
    for card in listed("/sys/class/drm", r"card[0-9]+"):
        event = pairs(read(card / "device" / "uevent"), "=")
        vendor, _, device = event.get("PCI_ID", "").partition(":")
        yield pci_function(event.get("PCI_SLOT_NAME"), vendor, device, event.get("PCI_CLASS", "").zfill(6),
                           event.get("DRIVER"))


def pci_from_lspci(text: str) -> Iterator[PciFunction | None]:
    """Yield the GPUs in the output of `lspci -nnk`."""
    blocks = re.split(r"\n(?=[0-9a-f])", text)
    seen = "Kernel driver in use:" in text or "Kernel modules:" in text
    for block in blocks:
        head = block.split("\n", 1)[0]
        ids = re.findall(r"\[([0-9a-f]{4}):([0-9a-f]{4})\]", head)
        found = re.match(r"(\S+) .*?\[([0-9a-f]{4})\]: (.*?) \[[0-9a-f]{4}:[0-9a-f]{4}\]", head)
        if found and ids:
            used = re.search(r"Kernel driver in use: (\S+)", block)
            driver = used.group(1) if used else None if seen else ""
            vendor, device = ids[-1]
            yield pci_function(found.group(1), vendor, device, found.group(2), driver, known(found.group(3)),
                               gone="(rev ff)" in head)


def scan_pci(tools: Tools) -> tuple[list[PciFunction], bool]:
    """Return the GPUs on the bus, and whether the bus could be seen at all."""
    found = {function.bus: function for function in reversed(list(pci_from_sysfs())) if function}
    visible = bool(listed("/sys/bus/pci/devices", ".*"))
    if not visible:
        answer = tools.run("lspci", "-nnkD")
        visible = bool(re.search(r"\[[0-9a-f]{4}:[0-9a-f]{4}\]", answer.out))
        for function in pci_from_lspci(answer.out):
            if function:
                found.setdefault(function.bus, function)
    return [found[bus] for bus in sorted(found)], visible


def pci_name(vendor: str, device: str) -> str | None:
    """Return a device's name from the system's list of PCI names, if it has one."""
    inside = False
    for path in ("/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids", "/usr/share/pci.ids"):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    if re.match("[0-9a-f]{4} ", line):
                        inside = line.startswith(vendor)
                    elif inside and line.startswith("\t" + device):
                        return known(line[5:])
        except OSError:
            continue
    return None


def hardware_row(function: PciFunction) -> Gpu:
    """Return the row of a GPU that is there and can't be used."""
    vendor_id = next(number for number, name in VENDORS.items() if name == function.vendor)
    name = function.name or pci_name(vendor_id, function.device) or f"{function.vendor} device 0x{function.device}"
    return gpu(name, usable=False, integrated=function.weak, _bus=function.bus)


# -- NVIDIA ------------------------------------------------------------------------------------------------------------

# The name comes last: it may hold commas. Temperature and utilization tell a GPU that needs a reset.
NV_FIELDS = ["index", "uuid", "pci.bus_id", "memory.total", "memory.free", "driver_version", "compute_cap",
             "mig.mode.current", "utilization.gpu", "temperature.gpu", "name"]
NV_FEWER_FIELDS = ["index", "uuid", "memory.total", "memory.free", "driver_version", "name"]
NV_LOST = re.compile(r"unable to determine the device handle for gpu\s*:?\s*([0-9a-fx:.]*)|gpu is lost|"
                     r"fallen off the bus", re.I)
# What nvidia-smi prints (on stdout too), its exit code, and what it means.
NV_FAULTS: list[tuple[str, int | None, str, str]] = [
    (r"driver/library version mismatch", 18, "NV_LIB_MISMATCH", ""),
    (r"couldn't communicate with the nvidia driver|driver (is )?not loaded", 9, "NV_DRIVER_NOT_LOADED",
     "the NVIDIA driver is not loaded: sudo modprobe nvidia; if that fails, install the driver for this kernel and "
     "reboot"),
    (r"couldn't find libnvidia-ml|libnvidia-ml\.so", 12, "NV_NVML_MISSING",
     "nvidia-smi finds no libnvidia-ml.so: in a container, start it with the NVIDIA runtime (docker run --gpus all); "
     "else reinstall the driver"),
    (r"insufficient permissions", 4, "NV_PERMISSION",
     "this user may not open the GPUs: look at ls -l /dev/nvidia* and ask for access to their group"),
    (r"no devices were found", 6, "NV_NO_DEVICES",
     "the NVIDIA driver is loaded and finds no GPU: sudo dmesg | grep -i nvrm says why; power off, reseat, reboot"),
    (NV_LOST.pattern, 15, "NV_GPU_LOST",
     "a GPU has fallen off the bus: reboot the node; if it comes back, look at its power and its seat"),
    (r"inforom is corrupted", 14, "TOOL_BAD_OUTPUT",
     "nvidia-smi warns that a GPU's infoROM is corrupted: it may go on working; if it fails, have it replaced"),
    (r"requires reset", None, "NV_RESET_REQUIRED",
     "a GPU needs a reset: end what uses it, then sudo nvidia-smi --gpu-reset, or reboot the node"),
    (r"failed to initialize nvml|unknown error", 255, "NV_UNKNOWN",
     "nvidia-smi fails with an unknown error: in a container, restart it (its devices were taken away); else reboot"),
]
NV_NO_SMI = ("NV_NO_SMI", "no nvidia-smi here, so that memory and health are unknown: install the driver's tools "
             "(nvidia-utils), or in a container start it with --gpus all")


def nv_fault(answer: Answer) -> Problem:
    """Return what a failed nvidia-smi means, from its words or else from its exit code."""
    for pattern, _, code, message in NV_FAULTS:
        if re.search(pattern, answer.text, re.I):
            return Problem(code, message or nv_mismatch(answer.text))
    for _, exit_code, code, message in NV_FAULTS:
        if exit_code == answer.code:
            return Problem(code, message or nv_mismatch(answer.text))
    said = known(answer.text.strip().split("\n")[0]) or "nothing"
    return Problem("TOOL_BAD_OUTPUT", f"nvidia-smi (exit {answer.code}) said what can't be understood: {said}")


def nv_mismatch(text: str) -> str:
    """Return the message for a kernel module and library of different versions, both named where they are known."""
    loaded = re.search(r"Kernel Module\D*?([0-9]+\.[0-9.]+)", read(rooted("/proc/driver/nvidia/version")))
    installed = re.search(r"library version:?\s*([0-9][0-9.]*)", text)
    versions = (f" ({loaded.group(1) if loaded else 'another'} loaded, "
                f"{installed.group(1) if installed else 'another'} installed)" if loaded or installed else "")
    return f"NVIDIA driver and library differ{versions}: reboot the node, or reload the module"


def nv_judged(row: Gpu, cells: dict[str, str], found: Findings) -> Gpu:
    """Judge a row by what its cells say: lost (takes no slot), to be reset (takes one), or fine."""
    text = " ".join(cells.values()).lower()
    if "requires reset" in text:
        row.update(usable=False, reset=True)
        found.add(*nv_said("requires reset"))
    elif "gpu is lost" in text or "unknown error" in (cells.get("memory.total", "") + cells.get("uuid", "")).lower():
        row.update(usable=False, lost=True)
        found.add(*nv_said("GPU is lost"))
    return row


def nv_said(text: str) -> tuple[str, str]:
    """Return code and message for words of nvidia-smi."""
    problem = nv_fault(Answer(None, text))
    return problem.code, problem.message


def nv_read_csv(text: str, fields: list[str], found: Findings) -> list[Gpu]:
    """Return the rows in a --query-gpu answer. Errors stand between rows: only a row that begins with digits is one."""
    rows: dict[int, Gpu] = {}
    broken, sentences = 0, set()
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",", len(fields) - 1)]
        if len(parts) == len(fields) and re.fullmatch("[0-9]{1,4}", parts[0]):
            cells = dict(zip(fields, parts))
            version = re.match(r"[0-9]+(\.[0-9]+)*", cells["driver_version"])
            found.driver = found.driver or (version.group(0) if version else None)
            capability = cells.get("compute_cap", "")
            row = gpu(known(cells["name"]), uuid=known(cells["uuid"]),
                      memory_total_mib=whole(cells["memory.total"]),
                      memory_free_mib=whole(cells["memory.free"]),
                      compute_capability=capability if re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", capability) else None,
                      mig=cells.get("mig.mode.current", "").lower() == "enabled", _bus=bus_of(cells.get("pci.bus_id")))
            rows.setdefault(int(parts[0]), nv_judged(row, cells, found))
        elif len(parts) == len(fields) and all(UNKNOWN.fullmatch(part) for part in parts):
            broken += 1
        else:
            lost = NV_LOST.search(line)
            if lost:
                sentences.add(lost.group(1) or line)
    named = [bus_of(sentence) for sentence in sorted(sentences)]
    missing = max(broken, len(named)) - sum(1 for row in rows.values() if row.get("lost"))
    if missing > 0:
        found.add(*nv_said("GPU is lost"))
    lost_rows = [gpu(None, usable=False, lost=True, _bus=named[n] if n < len(named) else None) for n in range(missing)]
    return [rows[number] for number in sorted(rows)] + lost_rows


def nv_query(tools: Tools, found: Findings) -> tuple[list[Gpu], Answer]:
    """Ask nvidia-smi for CSV, leaving out fields that it doesn't know; return rows and its last answer."""
    fields = list(NV_FIELDS)
    while True:
        answer = tools.run("nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits")
        rows = nv_read_csv(answer.out, fields, found)
        refused = [name for name in re.findall(r'Field "([^"]*)" is not a valid field', answer.text)
                   if name in fields and name not in NV_FEWER_FIELDS]
        if rows or not answer.there or answer.hung or fields == NV_FEWER_FIELDS:
            return rows, answer
        if refused:
            fields = [name for name in fields if name not in refused]
        elif answer.code == 2:
            fields = NV_FEWER_FIELDS
        else:
            return rows, answer


def nv_read_xml(text: str, found: Findings) -> list[Gpu]:
    """Return the rows in the output of `nvidia-smi -q -x`; [] if it isn't such XML."""
    text = text[max(text.find("<nvidia_smi_log"), 0) :].rpartition("</nvidia_smi_log>")[0] + "</nvidia_smi_log>"
    if "<!ENTITY" in text:
        return []
    try:
        log = xml.etree.ElementTree.fromstring(text)  # noqa: S314, entities are refused above
    except (xml.etree.ElementTree.ParseError, ValueError, RecursionError):
        return []
    found.driver = found.driver or known(log.findtext("driver_version"))
    rows = []
    for element in log.iter("gpu"):
        cells = {"uuid": element.findtext("uuid") or "",
                 "memory.total": element.findtext("fb_memory_usage/total") or "",
                 "utilization": element.findtext("utilization/gpu_util") or "",
                 "temperature": element.findtext("temperature/gpu_temp") or ""}
        used = [whole(process.findtext("used_memory")) for process in element.iter("process_info")
                if "C" in (process.findtext("type") or "")]
        row = gpu(known(element.findtext("product_name")), uuid=known(cells["uuid"]),
                  memory_total_mib=whole(cells["memory.total"]),
                  memory_free_mib=whole(element.findtext("fb_memory_usage/free")),
                  mig=(element.findtext("mig_mode/current_mig") or "").strip() == "Enabled",
                  busy_mib=total_of(used),
                  _bus=bus_of(element.get("id")))
        rows.append(nv_judged(row, cells, found))
    return rows


def nv_read_list(text: str) -> list[Gpu]:
    """Return the rows in the output of `nvidia-smi -L`; MIG instances are indented and don't count."""
    lines = re.findall(r"^GPU [0-9]+: (.*) \(UUID: ([^)\n]*)\)", text, re.M)
    return [gpu(known(name), uuid=known(uuid)) for name, uuid in lines]


def nv_read_proc() -> list[Gpu]:
    """Return the rows in /proc/driver/nvidia, which answers when nvidia-smi doesn't; memory is unknown there.

    In a container it may list GPUs of the host that weren't passed in: those have no device file.
    """
    passed = {int(path.name[6:]) for path in listed("/dev", "nvidia[0-9]+")}
    rows = []
    for folder in sorted(listed("/proc/driver/nvidia/gpus", r"[0-9a-fA-F:.]+")):  # by address, as the runtime does
        facts = pairs(read(folder / "information"))
        minor, excluded = whole(facts.get("Device Minor", "")), facts.get("GPU Excluded", "").lower() == "yes"
        if passed and minor is not None and minor not in passed and not excluded:
            continue
        uuid = known(facts.get("GPU UUID"))
        rows.append(gpu(known(facts.get("Model")), uuid=None if uuid and "?" in uuid else uuid, usable=not excluded,
                        lost=excluded, minor=minor, _bus=bus_of(facts.get("Bus Location") or folder.name)))
    if not rows:
        rows = [gpu("NVIDIA GPU") for _ in passed]
    return rows


def nv_busy(tools: Tools, rows: list[Gpu]) -> None:
    """Give each row the memory that compute processes hold on it, where that is known."""
    answer = tools.run("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_gpu_memory,process_name",
                       "--format=csv,noheader,nounits")
    if answer.code != 0:
        return
    held: dict[str, list[int | None]] = {}
    for line in answer.out.splitlines():
        parts = [part.strip() for part in line.split(",", 3)]
        if len(parts) == 4 and re.fullmatch("[0-9]+", parts[1]):
            held.setdefault(parts[0], []).append(whole(parts[2]))
    for row in rows:
        if row["uuid"]:
            row["busy_mib"] = total_of(held.get(row["uuid"], []))


def nv_missed(rows: list[Gpu], found: Findings) -> list[Gpu]:
    """Return rows for GPUs whose device files are here and that nvidia-smi doesn't list."""
    buses = {row["_bus"] for row in rows}
    if None in buses or not listed("/dev", "nvidia[0-9]+"):
        return []
    here = {int(path.name[6:]) for path in listed("/dev", "nvidia[0-9]+")}
    missed = [row for row in nv_read_proc() if row.get("minor") in here and row["_bus"] not in buses and row["usable"]]
    if missed:
        found.add(*nv_said("GPU is lost"))
    return [dict(row, usable=False, lost=True) for row in missed]


def find_nvidia(tools: Tools) -> Findings:
    """Ask nvidia-smi in ever simpler ways, and the driver's own tables."""
    found = Findings("NVIDIA")
    rows, answer = nv_query(tools, found)
    if rows and not found.faults and (answer.code or "inforom" in answer.text.lower()):
        problem = nv_fault(Answer(answer.code, "\n".join(re.findall(r"^[^0-9\n].*", answer.text, re.M))))
        found.add(problem.code, problem.message)
    elif not rows and answer.there and answer.code in (0, 2):
        rows = nv_read_xml(tools.run("nvidia-smi", "-q", "-x").out, found)
        if not rows:
            rows = nv_read_list(tools.run("nvidia-smi", "-L").out)
            if rows:
                found.add("TOOL_BAD_OUTPUT", "nvidia-smi answers -L only, so that memory and health are unknown: "
                          "update the NVIDIA driver")
    if rows:
        nv_busy(tools, rows)
        rows += nv_missed(rows, found)
        if tools.hung and not tools.short:
            found.add(*nv_timeout())
    else:
        rows = nv_without_answer(answer, found)
    found.gpus = rows
    return found


def nv_timeout() -> tuple[str, str]:
    """Return the problem of a hanging nvidia-smi."""
    return ("NV_TIMEOUT", f"nvidia-smi did not answer within {LIMIT_S:g} s: a dead GPU or driver (sudo dmesg | grep -i "
            "xid), reboot the node; if it is only slow, sudo nvidia-smi -pm 1")


def nv_without_answer(answer: Answer, found: Findings) -> list[Gpu]:
    """Return the rows that are known without nvidia-smi, and say why it's without."""
    rows = nv_read_proc()
    if not answer.there:
        if rows:
            found.add(*NV_NO_SMI)
        return rows or nv_jetson()
    if answer.hung:
        found.add(*nv_timeout())
    else:
        problem = nv_fault(answer)
        if not found.faults:
            found.add(problem.code, problem.message)
    return [dict(row, usable=False, lost=True) for row in rows]


def nv_off_bus() -> bool:
    """Return whether there are signs of NVIDIA hardware that no PCI bus shows, or that its driver was here."""
    return bool(nv_jetson() or listed("/dev", "nvidia[0-9]+"))


def nv_jetson() -> list[Gpu]:
    """Return the GPU of a Jetson, whose older systems have no nvidia-smi."""
    model = known(read(rooted("/proc/device-tree/model")))
    if rooted("/etc/nv_tegra_release").exists() or (model and "jetson" in model.lower()):
        return [gpu(model or "NVIDIA Jetson", integrated=True)]
    return []


# -- AMD ---------------------------------------------------------------------------------------------------------------

# Integrated graphics by the target that ROCm compiles for.
AMD_IGPU_TARGETS = {"gfx902", "gfx909", "gfx90c", "gfx1013", "gfx1033", "gfx1035", "gfx1036", "gfx1037", "gfx1103",
                    "gfx1150", "gfx1151", "gfx1152", "gfx1153"}
AMD_NAMES = {"738c": "AMD Instinct MI100", "740c": "AMD Instinct MI250X", "7408": "AMD Instinct MI250X",
             "740f": "AMD Instinct MI210", "74a0": "AMD Instinct MI300A", "74a1": "AMD Instinct MI300X",
             "74a2": "AMD Instinct MI308X", "74a5": "AMD Instinct MI325X", "74b9": "AMD Instinct MI325X VF",
             "75a0": "AMD Instinct MI350X", "75a3": "AMD Instinct MI355X"}
AMD_FAULTS = [
    (r"not initialized|not loaded|amdgpu not found in modules", "AMD_DRIVER_NOT_LOADED",
     "the amdgpu driver is not loaded: sudo modprobe amdgpu; if that fails, install amdgpu-dkms for this kernel"),
    (r"unable to open /dev/kfd|permission denied", "AMD_KFD_PERMISSION", ""),
    (r"no amd gpus?|no json data|no devices? found|no gpus? (?:found|detected)", "AMD_NO_DEVICES",
     "ROCm's tools find no GPU: sudo dmesg | grep -i amdgpu says why its initialisation failed"),
]
AMD_NO_KFD = ("AMD_NO_KFD", "an AMD GPU is here without /dev/kfd, so that ROCm can't use it: load amdgpu with compute "
              "support (install ROCm), or in a container pass --device=/dev/kfd --device=/dev/dri")


def kfd_permission() -> str:
    """Return the message for GPUs that this user may not open."""
    try:
        import pwd

        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = "$USER"
    return (f"user {user} may not open /dev/kfd: sudo usermod -aG render,video {user}, then log in again")


def gfx_name(version: Any) -> str | None:
    """Return KFD's gfx_target_version as a target: 90010 is gfx90a (major, minor, step; the last two hexadecimal)."""
    value = whole(version)
    return f"gfx{value // 10000}{value // 100 % 100:x}{value % 100:x}" if value else None


def first_whole(*texts: str) -> int | None:
    """Return the first that is a positive number of bytes, in MiB."""
    return next((value for value in map(mib_of_bytes, texts) if value), None)


def is_integrated(arch: str | None, device: str | None, name: str | None, folder: Path | None = None) -> bool:
    """Tell integrated from discrete AMD graphics by what the driver shows, else by target, PCI id or name."""
    if folder and folder.exists():
        # Older kernels have the file for integrated graphics too, and say "unknown" in it.
        if known(read(folder / "mem_info_vram_vendor")) or (folder / "board_info").exists():
            return False
        total, gtt = (mib_of_bytes(read(folder / f"mem_info_{kind}_total")) or 0 for kind in ("vram", "gtt"))
        if total and total <= 4096 and gtt >= 8192 and gtt >= 4 * total:
            return True
    if arch:  # some releases call a new discrete GPU just "AMD Radeon Graphics" too
        return arch in AMD_IGPU_TARGETS
    return (device or "") in WEAK_IGPUS or bool(re.search(r"Ryzen|Processor|Radeon(\(TM\))? Graphics$", name or ""))


def kfd_rows() -> list[Gpu]:
    """Return the GPUs of the kernel's compute topology, in the order in which HIP numbers them.

    A card that is partitioned has a node a partition. Nodes that this container may not read are left out.
    """
    rows = []
    for node in listed("/sys/class/kfd/kfd/topology/nodes", "[0-9]+"):
        facts = pairs(re.sub(r"(?m)^(\w+) ", r"\1:", read(node / "properties")))
        if not whole(facts.get("simd_count")) or whole(facts.get("vendor_id")) != 4098:
            continue
        drm = rooted(f"/sys/class/drm/renderD{facts.get('drm_render_minor', '')}/device")
        banks = [pairs(re.sub(r"(?m)^(\w+) ", r"\1:", read(bank / "properties")))
                 for bank in listed(str(node / "mem_banks")[len(ROOT) :], "[0-9]+")]
        own = sum(whole(bank.get("size_in_bytes")) or 0 for bank in banks if bank.get("heap_type") in ("1", "2"))
        memory = first_whole(str(own), facts.get("local_mem_size", ""), read(drm / "mem_info_vram_total"))
        device, arch = f"{whole(facts.get('device_id')) or 0:04x}", gfx_name(facts.get("gfx_target_version"))
        unique, place = whole_long(facts.get("unique_id")), whole(facts.get("location_id")) or 0
        name = known(read(drm / "product_name")) or AMD_NAMES.get(device) or pci_name("1002", device)
        used = kfd_used(whole(read(node / "gpu_id")))
        rows.append(gpu(
            name or f"AMD GPU 0x{device}", uuid=f"GPU-{unique:016x}" if unique else None, arch=arch,
            memory_total_mib=memory, busy_mib=used, integrated=is_integrated(arch, device, name, drm), node=node.name,
            card=(facts.get("domain"), place >> 3, unique),
            _bus=f"{whole(facts.get('domain')) or 0:04x}:{place >> 8 & 255:02x}:{place >> 3 & 31:02x}.{place & 7}"))
    return rows


def whole_long(text: Any) -> int | None:
    """Return a number of any length below 2**64, or None."""
    return int(text) if re.fullmatch("[0-9]{1,20}", str(text)) and int(text) < 1 << 64 else None


def kfd_used(gpu_id: int | None) -> int | None:
    """Return the MiB that compute processes hold on a GPU by the kernel's own count; None if it doesn't say."""
    if not rooted("/sys/class/kfd/kfd/proc").is_dir() or not gpu_id:
        return None
    held = [whole(read(process / f"vram_{gpu_id}")) for process in listed("/sys/class/kfd/kfd/proc", "[0-9]+")]
    return sum(value or 0 for value in held) >> 20


def amd_smi_rows(tools: Tools, found: Findings) -> list[Gpu]:
    """Return what amd-smi says, in both shapes of its JSON (a list; an object with gpu_data)."""
    answer = tools.run("amd-smi", "static", "--asic", "--vram", "--bus", "--driver", "--json")
    if answer.there and not answer.hung and first_json(answer.out) is None:
        answer = tools.run("amd-smi", "static", "--json")
    note_amd(answer, found, failed=first_json(answer.out) is None)
    data = first_json(answer.out)
    data = data.get("gpu_data", []) if isinstance(data, dict) else data
    rows, modes = [], set()
    for entry in map(lower_keys, data if isinstance(data, list) else []):
        asic, vram, bus, driver, board = (lower_keys(entry.get(part)) for part in
                                          ("asic", "vram", "bus", "driver", "board"))
        if whole(entry.get("gpu")) is None:
            continue
        size = vram.get("size", vram.get("vram_size_mb"))  # the latter in ROCm 6.0
        size = lower_keys(size).get("value") if isinstance(size, dict) else size
        name = known(asic.get("market_name")) or known(board.get("product_name"))
        device = str(asic.get("device_id", "")).lower().replace("0x", "")
        arch = known(asic.get("target_graphics_version"))
        found.driver = found.driver or known(driver.get("version")) or known(driver.get("driver_version"))
        modes.add(known(lower_keys(entry.get("partition")).get("compute_partition")))
        rows.append(gpu(name or AMD_NAMES.get(device) or f"AMD GPU 0x{device}", arch=arch_of(arch),
                        memory_total_mib=whole(size), integrated=is_integrated(arch, device, name),
                        _bus=bus_of(bus.get("bdf"))))
    first = {row["_bus"][:-1]: row["name"] for row in reversed(rows) if row["_bus"]}
    for row in rows:  # a partition's name may stand with its card's first function only
        if row["name"].startswith("AMD GPU ") and row["_bus"]:
            row["name"] = first[row["_bus"][:-1]]
    if modes - {None, "SPX"}:
        found.add("PARTITIONED", f"cards are partitioned; each of {len(rows)} partitions is one slot")
    listing = first_json(tools.run("amd-smi", "list", "--json").out)
    listing = listing.get("gpu_data", []) if isinstance(listing, dict) else listing
    entries = map(lower_keys, listing if isinstance(listing, list) else [])
    uuids = {bus_of(entry["bdf"]): known(entry.get("uuid")) for entry in entries if bus_of(entry.get("bdf"))}
    for row in rows:
        row["uuid"] = uuids.get(row["_bus"])
    return rows or [gpu("AMD GPU", uuid=uuid, _bus=bus) for bus, uuid in uuids.items()]


def arch_of(text: str | None) -> str | None:
    """Return a gfx target, or None for anything else."""
    return text if text and re.fullmatch("gfx[0-9a-f]{3,5}", text) else None


def rocm_smi_rows(tools: Tools, found: Findings) -> list[Gpu]:
    """Return what rocm-smi says as JSON, else CSV, else text; its exit code is 0 whatever happens."""
    asked = ["--showid", "--showproductname", "--showuniqueid", "--showbus", "--showmeminfo", "vram",
             "--showdriverversion"]
    for form in (["--json"], ["--csv"], []):
        answer = tools.run("rocm-smi", *asked, *form)
        cards = rocm_cards(answer.out)
        if cards or not answer.there or answer.hung:
            break
    note_amd(answer, found, failed=not cards)
    system = cards.pop("system", {})
    found.driver = found.driver or known(lower_keys(system).get("driver version"))
    return [rocm_row(lower_keys(cards[name])) for name in sorted(cards, key=lambda card: int(card[4:]))]


def rocm_cards(text: str) -> dict[str, dict[str, Any]]:
    """Return {card0: {key: value}} (and 'system') from rocm-smi's JSON, CSV or text."""
    value = first_json(text)
    if isinstance(value, dict):
        return {name: facts for name, facts in value.items()
                if isinstance(facts, dict) and re.fullmatch("card[0-9]{1,4}|system", name)}
    cards: dict[str, dict[str, Any]] = {}
    table = text[match.start() :] if (match := re.search(r"^device,", text, re.M)) else ""
    try:
        for record in csv.DictReader(table.splitlines()):
            if re.fullmatch("card[0-9]{1,4}", record.get("device") or ""):
                cards[record["device"]] = {key: cell for key, cell in record.items() if key}
    except csv.Error:
        return {}
    for number, key, cell in re.findall(r"^GPU\[([0-9]{1,4})\]\s*: ([^:\n]+?)\s*:\s*(.*)$", text, re.M):
        cards.setdefault(f"card{int(number)}", {})[key] = cell.strip()
    return cards


def rocm_row(facts: dict[str, Any]) -> Gpu:
    """Return a row of rocm-smi's facts on a card (keys in lower case; they drift between ROCm 4 and 7)."""
    names = (known(facts.get(key)) for key in ("card series", "device name", "card model"))
    name = next((name for name in names if name and not re.fullmatch("0x[0-9a-fA-F]+", name)), None)
    ids = (known(facts.get(key)) for key in ("device id", "gpu id", "card model"))
    device = next((text[2:].lower().zfill(4) for text in ids if text and re.fullmatch("0x[0-9a-fA-F]{1,4}", text)), "")
    total, used = (whole(facts.get(f"vram total {kind}memory (b)")) for kind in ("", "used "))
    arch, unique = arch_of(known(facts.get("gfx version"))), known(facts.get("unique id"))
    fine = unique is not None and re.fullmatch("0x[0-9a-fA-F]{1,16}", unique) and int(unique, 16)
    integrated = is_integrated(arch, device, name)
    name = name or AMD_NAMES.get(device) or (pci_name("1002", device) if device else None)
    return gpu(name or f"AMD GPU 0x{device or '?'}", uuid=f"GPU-{fine:016x}" if fine else None, arch=arch,
               memory_total_mib=mib_of_bytes(total),
               memory_free_mib=(total - used) >> 20 if total and used is not None and used <= total else None,
               integrated=integrated, node=known(facts.get("node id")), _bus=bus_of(facts.get("pci bus")))


def rocminfo_rows(tools: Tools, found: Findings) -> list[Gpu]:
    """Return the GPU agents that rocminfo lists; CPUs are agents too."""
    answer = tools.run("rocminfo")
    rows = []
    for block in re.split(r"^Agent [0-9]+\s*$", answer.out, flags=re.M)[1:]:
        facts: dict[str, str] = {}
        for key, value in pairs(block.partition("Pool Info")[0]).items():
            facts.setdefault(key, value)
        if facts.get("Device Type") != "GPU":
            continue
        pool = re.search(r"Segment:\s*GLOBAL.*?Size:\s*([0-9]{1,15})\(", block, re.S)  # in KB
        name, arch, uuid = known(facts.get("Marketing Name")), arch_of(facts.get("Name")), facts.get("Uuid", "")
        rows.append(gpu(name or f"AMD GPU {arch or '?'}", arch=arch, integrated=is_integrated(arch, None, name),
                        uuid=uuid if re.fullmatch("GPU-[0-9a-f]{16}", uuid) else None,
                        memory_total_mib=int(pool.group(1)) >> 10 if pool else None))
    note_amd(answer, found, failed=not rows)
    return rows


def note_amd(answer: Answer, found: Findings, failed: bool = False) -> None:
    """Keep what a tool of ROCm says about itself."""
    if answer.hung:
        found.add("TOOL_BAD_OUTPUT", f"AMD's tools did not answer within {LIMIT_S:g} s: sudo dmesg | grep -i amdgpu; "
                  "reboot the node if a GPU hangs")
    if "missing the following required groups" in answer.text:
        found.add("AMD_GROUPS", "amd-smi misses groups: " + kfd_permission().partition(": ")[2])
    if failed and answer.there and not answer.hung:
        for pattern, code, message in AMD_FAULTS:
            if re.search(pattern, answer.text, re.I):
                found.add(code, message or kfd_permission())
                return
        found.add("TOOL_BAD_OUTPUT", "ROCm's tools said what can't be understood: "
                  + (known(answer.text.strip().split("\n")[0]) or "nothing"))


def join(rows: list[Gpu], told: list[Gpu]) -> None:
    """Complete the kernel's rows with the names and memory that a tool tells of the same GPUs."""
    for number, row in enumerate(rows):
        same = [other for other in told if (other.get("node") and other["node"] == row["node"])
                or (other["_bus"] and other["_bus"] == row["_bus"])]
        if not same and len(told) == len(rows) and not any(other["_bus"] or other.get("node") for other in told):
            same = [told[number]]
        for other in same[:1]:
            if other["name"] and "0x" not in other["name"]:
                row["name"] = other["name"]
            for key in ("memory_total_mib", "arch", "uuid"):
                row[key] = row[key] if row[key] is not None else other[key]
            if row["memory_total_mib"] == other["memory_total_mib"]:
                row["memory_free_mib"] = other["memory_free_mib"]


def find_amd(tools: Tools) -> Findings:
    """Count by the kernel's compute topology where there is one, else by ROCm's tools, which also give the names."""
    found = Findings("AMD")
    rows = kfd_rows()
    told = amd_smi_rows(tools, found)
    if not told or (rows and not all(row["memory_free_mib"] for row in told)):
        told = rocm_smi_rows(tools, found) or told
    if not rows and not told:
        told = rocminfo_rows(tools, found)
    if rows:
        join(rows, told)
    else:
        rows = told
        for row in rows:  # partitions are functions of one PCI device
            row["card"] = row["_bus"].rpartition(".")[0] if row["_bus"] else id(row)
    if rows:  # then it matters little what a tool had to complain of, but not that one hangs
        found.problems = [problem for problem in found.problems if not problem.is_fault or tools.hung]
        cards = {row["card"] for row in rows}
        if len(cards) < len(rows):
            found.add("PARTITIONED", f"{count_of(len(cards), 'card')} in {len(rows)} partitions; each is one slot")
    found.driver = found.driver or known(read(rooted("/sys/module/amdgpu/version")))
    check_kfd(rows, found)
    if any(not row["integrated"] for row in rows):
        for row in rows:
            row["usable"] = row["usable"] and not row["integrated"]
    found.gpus = rows
    return found


def check_kfd(rows: list[Gpu], found: Findings) -> None:
    """Mark all rows unusable where /dev/kfd is missing or closed to this user. A root without /dev says nothing."""
    device = rooted("/dev/kfd")
    if not rows or not rooted("/dev").is_dir() or rooted("/dev/dxg").exists():  # WSL does without
        return
    if not device.exists():
        found.add(*AMD_NO_KFD)
    elif not os.access(str(device), os.R_OK | os.W_OK):
        found.add("AMD_KFD_PERMISSION", kfd_permission())
    else:
        return
    for row in rows:
        row.update(usable=False, lost=True)


# -- Intel -------------------------------------------------------------------------------------------------------------


def find_intel(tools: Tools) -> Findings:
    """Ask xpu-smi; it lists devices without their memory, which it tells one by one."""
    found = Findings("INTEL")
    answer = tools.run("xpu-smi", "discovery", "-j")
    listing = first_json(answer.out)
    devices = lower_keys(listing).get("device_list")
    rows = [lower_keys(entry) for entry in devices] if isinstance(devices, list) else []
    if not rows and answer.there and not answer.hung:
        rows = xpu_table(tools.run("xpu-smi", "discovery").out)
    rows = [row for row in rows if whole(row.get("device_id")) is not None
            and not (bus_of(row.get("pci_bdf_address")) or "").startswith("0000:00:02")]
    physical = [row for row in rows if row.get("device_function_type") != "virtual"]
    for facts in physical or rows:
        number = str(whole(facts["device_id"]))
        text = tools.run("xpu-smi", "discovery", "-d", number, "-j").out
        more = lower_keys(first_json(text)) or next((row for row in xpu_table(text) if row["device_id"] == number), {})
        facts = {**more, **facts}
        found.driver = found.driver or known(more.get("driver_version"))
        found.gpus.append(gpu(
            known(facts.get("device_name")), uuid=known(facts.get("uuid")),
            memory_total_mib=mib_of_bytes(facts.get("memory_physical_size_byte")) or whole(facts.get("memory_mib")),
            memory_free_mib=mib_of_bytes(facts.get("memory_free_size_byte")),
            _bus=bus_of(facts.get("pci_bdf_address"))))
    stuck = [row for row in found.gpus if in_survivability_mode(row["_bus"])]
    leave_out(stuck)
    if stuck:
        found.add(*firmware_broken(len(stuck)))
    if answer.there and (tools.hung or not found.gpus):
        what = f"did not answer within {LIMIT_S:g} s" if tools.hung else "lists no GPU"
        found.add("TOOL_BAD_OUTPUT", f"xpu-smi {what}: reboot the node, or reinstall Intel's GPU driver and level-zero")
    return found


def in_survivability_mode(bus: str | None) -> bool:
    """Return whether the xe driver keeps an Intel GPU only for a new firmware (drm/xe, xe_survivability_mode.c)."""
    return bus is not None and rooted(f"/sys/bus/pci/devices/{bus}/survivability_mode").exists()


def firmware_broken(count: int) -> tuple[str, str]:
    """Return the problem of GPUs whose firmware is broken."""
    return "HW_WITHOUT_DRIVER", (f"{count_of(count, 'Intel GPU')} in survivability mode, with broken firmware: flash "
                                 "it (sudo fwupdmgr update), then reboot")


def xpu_table(text: str) -> list[dict[str, Any]]:
    """Return the devices in xpu-smi's table: a number in the first column begins one, 'Key: value' follow."""
    keys = {"device name": "device_name", "uuid": "uuid", "soc uuid": "uuid", "pci bdf address": "pci_bdf_address",
            "function type": "device_function_type", "driver version": "driver_version",
            "memory physical size": "memory_mib"}
    rows: list[dict[str, Any]] = []
    for number, key, value in re.findall(r"^\|\s*([0-9]*)\s*\|\s*([^:|\n]+?):\s*(.*?)\s*\|\s*$", text, re.M):
        if number:
            rows.append({"device_id": number})
        if rows and key.lower() in keys:
            rows[-1][keys[key.lower()]] = value
    return rows


# -- the verdict -------------------------------------------------------------------------------------------------------


def explain_hardware(found: Findings, functions: list[PciFunction]) -> None:
    """Say why GPUs of this vendor that are on the bus aren't among those that answered."""
    mine = [function for function in functions if function.vendor == found.vendor and not function.weak]
    listed_here = {row["_bus"] for row in found.gpus}
    only_integrated = bool(found.gpus) and all(row["integrated"] and row["_bus"] for row in found.gpus)
    elsewhere = [function for function in mine if function.driver in ELSEWHERE and function.bus not in listed_here]
    if elsewhere:
        found.add("GPU_BOUND_VFIO", f"{count_of(len(elsewhere), found.vendor + ' GPU')} reserved for virtual machines "
                  f"({elsewhere[0].driver}): unbind and load the vendor's driver to train on it")
        leave_out(found.gpus if only_integrated else [])
        found.gpus += [hardware_row(function) for function in elsewhere]
    silent = [function for function in mine if function not in elsewhere]
    gone = [function for function in silent if function.gone and function.bus not in listed_here]
    if found.vendor == "NVIDIA" and found.gpus and gone and not found.faults:
        found.add(*nv_said("GPU is lost"))
        found.gpus += [hardware_row(function) for function in gone]
    if only_integrated:
        silent = [function for function in silent if function.bus not in listed_here]
    elif found.gpus:
        return
    if not silent:
        return
    leave_out(found.gpus if only_integrated else [])
    found.gpus += [hardware_row(function) for function in silent]
    if found.faults:
        return
    what, driver = count_of(len(silent), f"{found.vendor} GPU") + " on the bus", silent[0].driver
    if found.vendor == "NVIDIA" and driver == "nvidia":
        found.add("NV_NO_SMI", f"{what}, but no nvidia-smi and no device files are here: in a container, start it "
                  "with --gpus all; else reinstall the driver")
    elif found.vendor == "AMD" and driver == "amdgpu":
        found.add(*AMD_NO_KFD)
    elif found.vendor == "INTEL" and any(in_survivability_mode(function.bus) for function in silent):
        found.add(*firmware_broken(sum(in_survivability_mode(function.bus) for function in silent)))
    elif found.vendor == "INTEL" and driver in ("i915", "xe"):
        found.add("TOOL_BAD_OUTPUT", f"{what}, and no xpu-smi to ask about it: install xpu-smi and level-zero")
    else:
        remedy = {"NVIDIA": "install NVIDIA's driver", "AMD": "install amdgpu and ROCm",
                  "INTEL": "install Intel's GPU driver and level-zero"}[found.vendor]
        holder = f" (bound to {driver})" if driver else ""
        found.add("HW_WITHOUT_DRIVER", f"{what} without its driver{holder}: {remedy}, then reboot")


def leave_out(rows: list[Gpu]) -> None:
    """Mark integrated graphics as unusable: they don't stand in for a broken discrete GPU."""
    for row in rows:
        row.update(usable=False, lost=True)


def choose(findings: list[Findings]) -> Findings | None:
    """Return the vendor to train on: most usable discrete GPUs, then discrete hardware, then integrated graphics."""

    def rank(found: Findings) -> tuple[int, bool, int]:
        usable = [row for row in found.gpus if row["usable"]]
        discrete = sum(1 for row in usable if not row["integrated"])
        here = bool(found.faults) or any(not row["integrated"] for row in found.gpus)
        return discrete, here, len(usable)

    best = max(findings, key=rank)  # of equals the first
    return best if any(rank(best)) else None


def numbered(found: Findings) -> tuple[list[Gpu], list[int], int]:
    """Give rows the runtime's numbers; return rows, slots to use, and how many slots the runtime has."""
    # The runtime numbers integrated graphics beside discrete ones, and a GPU that needs a reset; not one that is lost.
    beside = found.vendor == "AMD" and any(row["usable"] for row in found.gpus)
    slots = [row for row in found.gpus if row["usable"] or row.get("reset")
             or (beside and row["integrated"] and not row.get("lost"))]
    for number, row in enumerate(slots):
        row["index"] = number
    others = [row for row in found.gpus if row["index"] is None]
    return slots + others, [row["index"] for row in slots if row["usable"]], len(slots)


def notice(found: Findings, others: list[Findings], rows: list[Gpu]) -> None:
    """Add what isn't wrong and still worth knowing."""
    usable = [row for row in rows if row["usable"]]
    if any(row["mig"] for row in usable):
        found.add("MIG_ENABLED", "a GPU in MIG mode is one slot with the memory of one instance: "
                  "sudo nvidia-smi -i N -mig 0 gives the whole GPU")
    if usable and all(row["integrated"] for row in usable):
        found.add("IGPU_ONLY", "the only GPU is an integrated one: it shares the machine's memory")
    elif usable and any(row["integrated"] for row in rows):
        found.add("IGPU_PRESENT", "integrated graphics have a slot number too: leave that slot out (--include)")
    if len({(row["name"], row["memory_total_mib"]) for row in usable}) > 1 \
            and "PARTITIONED" not in [problem.code for problem in found.problems]:
        models = sorted({row["name"] or "unknown" for row in usable})
        found.add("MIXED_MODELS", f"different GPUs in one machine ({', '.join(models)}): the slowest and smallest sets "
                  "the pace")
    busy = [row for row in usable if (row["busy_mib"] or 0) > BUSY_MIB]
    if busy:
        what = ", ".join(f"slot {row['index']}: {row['busy_mib']} MiB" for row in busy)
        found.add("GPU_BUSY", f"other programs compute here ({what}): see nvidia-smi or rocm-smi --showpids")
    also = [other for other in others if any(not row["integrated"] for row in other.gpus)]
    if usable and also:
        found.add("MIXED_VENDORS", f"{' and '.join(other.vendor for other in also)} hardware is here too; one training "
                  f"uses one vendor's, here {found.vendor}")
    for name in {"NVIDIA": ["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"], "INTEL": ["ZE_AFFINITY_MASK"],
                 "AMD": ["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"]
                 }[found.vendor]:
        value = os.environ.get(name)
        if value is not None and value != "all":
            kin = {"ZE_AFFINITY_MASK": "ZE_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL": "HIP_VISIBLE_DEVICES"}
            found.add(kin.get(name, name) + "_SET", f"{name}={known(value) or ''} is set for this user; all GPUs are "
                      "listed here all the same, and DeepSpeed sets its own")


def look(deadline: float) -> tuple[list[Findings], list[PciFunction], bool]:
    """Ask about all vendors side by side; one that isn't back at the deadline, hung in a driver, is given up."""
    bus: list[Any] = [[], False]
    vendors: list[Findings] = []

    def ask(position: int, finder: Callable[[Tools], Findings]) -> None:
        try:
            vendors[position] = finder(Tools())
        except Exception as error:  # whatever a driver or tool does, there is a report
            vendors[position].add("TOOL_BAD_OUTPUT", f"what {vendors[position].vendor}'s tools say can't be understood "
                                  f"({type(error).__name__}: {known(error.args[0]) if error.args else ''})")

    def ask_bus() -> None:
        bus[:] = scan_pci(Tools())

    threads = [threading.Thread(target=ask_bus, daemon=True)]
    for position, finder in enumerate((find_nvidia, find_amd, find_intel)):
        vendors.append(Findings(("NVIDIA", "AMD", "INTEL")[position]))
        threads.append(threading.Thread(target=ask, args=(position, finder), daemon=True))
    for thread in threads:
        thread.start()
    for position, thread in enumerate(threads):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive() and position == 1:
            vendors[0].add(*nv_timeout())
        elif thread.is_alive() and position > 1:
            vendors[position - 1].add("TOOL_BAD_OUTPUT", f"{vendors[position - 1].vendor}'s driver does not answer")
    return list(vendors), list(bus[0]), bool(bus[1])


def make_report() -> dict[str, Any]:
    """Return the report as schemas/gpu_report.schema.json describes it."""
    findings, functions, bus_visible = look(STARTED + LIMIT_S + TERM_TO_KILL_S + KILL_TO_ABANDON_S + 0.4)
    in_wsl = rooted("/dev/dxg").exists()  # whose bus doesn't show the host's GPU
    for found in findings:
        explain_hardware(found, functions)
        # A vendor's tools may be installed where there is none of its hardware: not a fault.
        idle = {"NV_DRIVER_NOT_LOADED", "NV_NVML_MISSING", "AMD_DRIVER_NOT_LOADED", "AMD_NO_DEVICES", "TOOL_BAD_OUTPUT"}
        hidden = in_wsl or (found.vendor == "NVIDIA" and nv_off_bus())
        if bus_visible and not hidden and not found.gpus and {problem.code for problem in found.faults} <= idle:
            found.problems = []
    chosen = choose(findings)
    report: dict[str, Any] = {"schema": "gpu-report/1", "detector": "detect_gpus.py", "hostname": socket.gethostname(),
                              "vendor": "NONE", "status": "none", "slots_total": 0, "slots_use": [],
                              "driver_version": None, "gpus": [], "problems": []}
    if chosen is None:
        if any(function.weak for function in functions):
            report["problems"] = [{"code": "IGPU_ONLY", "message": "only integrated graphics, not fit for training"}]
        return report
    rows, use, total = numbered(chosen)
    notice(chosen, [found for found in findings if found is not chosen], rows)
    broken = any(not row["usable"] and not row["integrated"] for row in rows)
    keys = list(gpu(None))[:-1]
    report.update(
        vendor=chosen.vendor, slots_total=total, slots_use=use, driver_version=chosen.driver,
        status="error" if not use else "degraded" if broken or chosen.faults else "ok",
        gpus=[{key: row[key] for key in keys} for row in rows],
        problems=[{"code": problem.code, "message": problem.message} for problem in chosen.problems])
    return report


# -- output ------------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """Return a report for people."""
    head = f"{report['hostname']}: "
    if report["vendor"] == "NONE":
        head += "no GPU to train on"
    else:
        driver = f", driver {report['driver_version']}" if report["driver_version"] else ""
        head += f"{report['vendor']}, {report['status']}, {count_of(report['slots_total'], 'slot')}{driver}"
    lines = [head]
    cells = [["slot", "name", "MiB", "free", "busy", ""]]
    for row in report["gpus"]:
        number = "-" if row["index"] is None else str(row["index"])
        state = "" if row["usable"] else "integrated, left out" if row["integrated"] else "UNUSABLE"
        numbers = ["?" if row[key] is None else str(row[key])
                   for key in ("memory_total_mib", "memory_free_mib", "busy_mib")]
        cells.append([number, row["name"] or "?", *numbers, state])
    if report["gpus"]:
        wide = [max(least, *(len(line[column]) for line in cells)) for column, least in enumerate((4, 4, 6, 6, 6, 0))]
        for line in cells:
            texts = [line[n].rjust(wide[n]) if n in (2, 3, 4) else line[n].ljust(wide[n]) for n in range(6)]
            lines.append(("  " + "  ".join(texts)).rstrip())
    lines += [f"  {problem['code']}: {problem['message']}" for problem in report["problems"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the report; return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nonce", help="a word to find the report's line by, letters and digits")
    parser.add_argument("--json", action="store_true", help="the line, on a terminal too")
    parser.add_argument("--table", action="store_true", help="the table, without a terminal too")
    options = parser.parse_args(argv)
    if options.nonce is not None and not re.fullmatch("[0-9A-Za-z_.-]{1,64}", options.nonce):
        parser.error("--nonce: letters, digits, '_', '.' and '-', at most 64")
    report = make_report()
    if options.table or not (options.json or options.nonce or not sys.stdout.isatty()):
        print(table(report))
    else:
        # A newline first: a login banner may have ended without one.
        print(f"\n@@GPU_REPORT {options.nonce or '-'} {json.dumps(report)}")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    code = main()
    # Threads that hang in a driver must not keep the session open.
    os._exit(code)
