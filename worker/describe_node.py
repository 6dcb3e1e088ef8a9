#!/usr/bin/env python3
"""Tell what a node has for a training, as one JSON line: versions, code, paths, room, addresses, a free port.

    python3 worker/describe_node.py '{"folder": "/home/me/lanspeed", "paths": ["/data/notes"]}'

The master streams this file to the Python that will train there. Standard library only, Python 3.8 or newer.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from typing import Any

# What PyTorch makes of the GPUs here; asked of a process of its own, since importing it takes seconds.
TORCH = """
import json, torch
found = {"version": torch.__version__, "built_for": None, "archs": [], "devices": [], "error": None}
try:
    if torch.version.cuda or torch.version.hip:
        found["built_for"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        found["archs"] = (torch._C._cuda_getArchFlags() or "").split()
        torch.cuda.init()
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            arch = device.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{device.major}{device.minor}"
            found["devices"].append({"name": device.name, "arch": arch})
    elif torch.xpu._is_compiled():
        found["built_for"] = "XPU"
        torch.xpu.init()
        for number in range(torch.xpu.device_count()):
            found["devices"].append({"name": torch.xpu.get_device_name(number), "arch": None})
except Exception as error:
    found["error"] = str(error)
print("@@TORCH " + json.dumps(found))
"""
TORCH_LIMIT = 75  # seconds

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "tokenizers")


def package_versions() -> dict[str, str]:
    """Return the versions of what a training's result and speed depend on; a missing one is left out."""
    from importlib import metadata

    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def code_digest(folder: str) -> str | None:
    """Return a digest of the trainer's source, by which two checkouts can be compared; None if there is none."""
    digest = hashlib.sha256()
    paths = sorted(glob.glob(os.path.join(folder, "trainer", "*.py")))
    for path in paths:
        with open(path, "rb") as file:
            digest.update(os.path.basename(path).encode() + b"\0" + file.read() + b"\0")
    return digest.hexdigest()[:16] if paths else None


def free_port(wanted: int | None) -> int | None:
    """Return a TCP port that is free here; the wanted one, or None if it isn't."""
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", wanted or 0))
        return int(probe.getsockname()[1])
    return None


def memory_bytes() -> dict[str, int]:
    """Return the machine's RAM and what of it is available."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        found = dict(re.findall(r"(\w+):\s+(\d+) kB", file.read()))
        return {name: int(found[key]) * 1024 for name, key in (("ram_bytes", "MemTotal"),
                                                               ("ram_available_bytes", "MemAvailable")) if key in found}
    return {}


def room_bytes(folder: str) -> int | None:
    """Return the free bytes on the disk of a folder, or of the nearest one above it that is there."""
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder.rstrip("/"))
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder or "/").free
    return None


def jobs() -> list[str]:
    """Return the names of lanspeed's trainings that run here under this account."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/environ"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            named = re.search(rb"(?:^|\0)LANSPEED_JOB=([\w.-]+)\0", file.read() + b"\0")
            if named:
                found.add(named.group(1).decode())
    return sorted(found)


def ask_torch() -> dict[str, Any]:
    """Return what PyTorch was built for, the devices it finds, and the error if it can't use them."""
    environment = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    try:
        done = subprocess.run([sys.executable, "-c", TORCH], env=environment, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=TORCH_LIMIT)
    except (OSError, subprocess.TimeoutExpired):
        return {"error": "PyTorch gives no answer"}
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        if line.startswith("@@TORCH "):
            found: dict[str, Any] = json.loads(line[len("@@TORCH ") :])
            return found
    said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"]
    return {"error": said[-1][:300]}


def describe(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the facts; `wanted` names the folder, paths to look for, the port, others that may be there."""
    folder = wanted.get("folder") or os.getcwd()
    return {
        "schema": "node-facts/1", "hostname": socket.gethostname(), "python": platform.python_version(),
        "executable": sys.executable, "packages": package_versions(), "folder": os.path.isdir(folder),
        "code": code_digest(folder), "free_bytes": room_bytes(wanted.get("room") or folder),
        "missing": [path for path in wanted.get("paths", []) if not os.path.exists(path)],
        "there": [path for path in wanted.get("marks", []) if os.path.exists(path)],
        "port": free_port(wanted.get("port")), "cores": len(os.sched_getaffinity(0)), "jobs": jobs(),
        "address": (os.environ.get("SSH_CONNECTION", "").split() + [None] * 3)[2], "time": time.time(),
        "torch": ask_torch() if wanted.get("torch") else None, **memory_bytes()}


def main() -> int:
    """Print the line."""
    wanted = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    print("\n@@NODE_FACTS " + json.dumps(describe(wanted)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
