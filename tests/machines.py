"""Machines to try the GPU detectors on: a folder for /, tools that print what they are told, nothing else on PATH."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from master.inventory.gpu_report import GpuReport, parse_report

WORKER = Path(__file__).resolve().parent.parent / "worker"
WAYS = ["py", "sh", "alone"]
PLAIN_TOOLS = ["bash", "cat", "env", "head", "id", "mktemp", "rm", "setsid", "sh", "sleep", "sort", "tr"]

# Answers --query-gpu with the columns that are asked for, like the real one; exits 2 for a field in `unknown`.
NVIDIA_SMI = """#!{python} -I
import json, sys
told = json.load(open({told!r}))
words = " ".join(sys.argv[1:])
if words.startswith("--query-gpu="):
    asked = words.split("=", 1)[1].split(" ")[0].split(",")
    bad = [name for name in asked if name in told.get("unknown", [])]
    if bad:
        print(f'Field "{{bad[0]}}" is not a valid field to query.')
        sys.exit(2)
    for gpu in told["gpus"]:
        if isinstance(gpu, str):
            print(gpu)
        else:
            print(", ".join(gpu.get(name, "[N/A]") for name in asked))
elif words.startswith("--query-compute-apps="):
    print("\\n".join(told.get("apps", [])))
else:
    sys.exit(2)
"""


def nvidia_gpu(number: int, name: str = "NVIDIA GeForce RTX 3090", mib: str = "24576", **others: str) -> dict[str, str]:
    """A row for `Machine.nvidia`; others: columns by their names with _ for a dot."""
    row = {"index": str(number), "uuid": f"GPU-{number:08x}-1111-2222-3333-444444444444", "name": name,
           "pci.bus_id": f"00000000:{number + 1:02X}:00.0", "memory.total": mib, "memory.free": "24000",
           "driver_version": "560.35.03", "compute_cap": "8.6", "mig.mode.current": "[N/A]", "utilization.gpu": "0",
           "temperature.gpu": "31"}
    return {**row, **{key if key in row else key.replace("_", "."): value for key, value in others.items()}}


class Machine:
    """A made-up machine below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.base = folder / "root", folder / "bin", folder / "base"
        self.scratch = folder / "scratch"
        for path in (self.root, self.bin, self.base, self.scratch):
            path.mkdir(parents=True)
        for name in PLAIN_TOOLS:
            (self.base / name).symlink_to(str(shutil.which(name)))
        self.variables: dict[str, str] = {}
        self.seconds = self.cpu_seconds = 0.0  # that the last answer took

    def file(self, path: str, text: str = "") -> Path:
        """Put a file below the machine's /."""
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        return place

    def script(self, name: str, text: str, at: str = "") -> None:
        """Install a tool that is this script; at a folder below / instead of on PATH."""
        folder = self.root / at.lstrip("/") if at else self.bin
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)

    def tool(self, name: str, *answers: tuple[str, str, int], err: str = "") -> None:
        """Install a tool: the first of (pattern of its arguments, what it prints, exit code) that fits."""
        cases = ""
        for number, (pattern, text, code) in enumerate(answers):
            saved = self.bin / f".{name}.{number}"
            saved.write_text(text)
            cases += f"{pattern}) {shutil.which('cat')} '{saved}'; exit {code};;\n"
        complaint = f"printf '%s\\n' '{err}' >&2\n" if err else ""
        self.script(name, f'#!/bin/sh\n{complaint}case "$*" in\n{cases}esac\nexit 2\n')

    def nvidia(self, *gpus: Any, at: str = "", python: str = sys.executable, **others: Any) -> None:
        """Install an nvidia-smi that knows these GPUs (rows, or sentences between them); it is run by `python`."""
        told = self.bin / ".nvidia-smi.json"
        told.write_text(json.dumps({"gpus": gpus, **others}))
        self.script("nvidia-smi", NVIDIA_SMI.format(python=python, told=str(told)), at)

    def kfd(self, node: int, banks: tuple[int, ...] = (), drm: dict[str, str] | None = None, **facts: Any) -> None:
        """Add a node to AMD's compute topology; banks: bytes of its memory, drm: files of its graphics driver."""
        place = f"/sys/class/kfd/kfd/topology/nodes/{node}"
        own = {"simd_count": 416, "vendor_id": 4098, "device_id": 0x740F, "gfx_target_version": 90010, "domain": 0,
               "location_id": (node + 1) << 8, "drm_render_minor": 128 + node, "local_mem_size": 0,
               "unique_id": 1 << 63 | node, **facts}
        self.file(f"{place}/properties", "".join(f"{key} {value}\n" for key, value in own.items()))
        for number, size in enumerate(banks):
            self.file(f"{place}/mem_banks/{number}/properties", f"heap_type 1\nsize_in_bytes {size}\nflags 0\n")
        for name, text in (drm or {}).items():
            self.file(f"/sys/class/drm/renderD{own['drm_render_minor']}/device/{name}", text + "\n")

    def pci(self, bus: str, vendor: int, device: int, kind: int, driver: str = "") -> None:
        """Add a function to the PCI bus; kind: class and subclass."""
        folder = f"/sys/bus/pci/devices/{bus}"
        for name, value in (("vendor", f"0x{vendor:04x}"), ("device", f"0x{device:04x}"), ("class", f"0x{kind:04x}00")):
            self.file(f"{folder}/{name}", value + "\n")
        if driver:
            (self.root / folder.lstrip("/") / "driver").symlink_to(f"../../../bus/pci/drivers/{driver}")

    def command(self, how: str) -> tuple[list[str], str]:
        """The command for one of the ways to ask, and its input."""
        script = WORKER / "detect_gpus.sh"
        return {"sh": (["bash", str(script)], ""), "py": ([sys.executable, "-I", str(WORKER / "detect_gpus.py")], ""),
                "alone": (["bash", "--noprofile", "--norc", "-s", "--"], script.read_text())}[how]

    def ask(self, how: str = "py", limit: str = "3", words: tuple[str, ...] = ("--nonce", "n1"), user: str = "") -> str:
        """Return what a detector prints; how: py, sh (with Python beside it) or alone (streamed, without Python)."""
        command, sent = self.command(how)
        python = self.base / "python3"
        python.unlink(missing_ok=True)
        if how == "sh":
            python.symlink_to(sys.executable)
        environment = {"PATH": f"{self.bin}:{self.base}", "HOME": str(self.scratch), "TMPDIR": str(self.scratch),
                       "GPU_DETECT_SYSROOT": str(self.root), "GPU_DETECT_TIMEOUT": limit, **self.variables}
        if user:
            command = [str(shutil.which("setpriv")), "--reuid", user, "--regid", user, "--clear-groups", *command]
        started, before = time.monotonic(), os.times()
        done = subprocess.run([*command, *words], input=sent, env=environment, capture_output=True, text=True,
                              timeout=60, cwd=self.scratch)
        self.seconds, after = time.monotonic() - started, os.times()
        self.cpu_seconds = sum(after[2:4]) - sum(before[2:4])
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert os.listdir(self.scratch) == []
        return done.stdout

    def report(self, how: str = "py", **others: Any) -> GpuReport:
        """Return the checked report."""
        return parse_report(self.ask(how, **others), "n1")


def codes(report: GpuReport) -> list[str]:
    """The codes of a report's problems."""
    return [problem.code for problem in report.problems]
