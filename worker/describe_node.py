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
import sys
sys.path[:] = [path for path in sys.path if path]  # not the folder that it starts in
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

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "tokenizers", "peft")
NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")  # the package is named by the CUDA it is for
SAMPLE, SAMPLED = 1 << 16, 2000  # bytes at each end of a file, files
TUNNELS = ("tun", "tap", "wg", "tailscale", "zt", "docker", "br-", "virbr", "veth", "cni", "flannel", "cali")


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
    paths = sorted(glob.glob(os.path.join(folder, "trainer", "**", "*.py"), recursive=True))
    for path in paths:
        with open(path, "rb") as file:
            digest.update(os.path.relpath(path, folder).encode() + b"\0" + file.read() + b"\0")
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


def usable(path: str) -> bool:
    """Return whether a path is there, and, of a folder, whether this account may work in it."""
    return os.access(path, os.R_OK | os.W_OK | os.X_OK) if os.path.isdir(path) else os.path.exists(path)


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


def read(path: str) -> str | None:
    """Return what a file says, None if it can't be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def system() -> dict[str, Any]:
    """Return the operating system, kernel, C library, and the limits that trainings run into."""
    import resource

    named = re.search(r'^PRETTY_NAME="?([^"\n]*)', read("/etc/os-release") or "", re.M)
    limits = {name: resource.getrlimit(number)[0] for name, number in (("nofile", resource.RLIMIT_NOFILE),
                                                                       ("memlock_bytes", resource.RLIMIT_MEMLOCK))}
    return {"os": named.group(1) if named else platform.system(), "kernel": platform.release(),
            "glibc": platform.libc_ver()[1] or None, "timezone": time.strftime("%z"),
            "shm_bytes": room_bytes("/dev/shm"),  # noqa: S108, it is looked at  # nosec B108
            **{name: None if limit == resource.RLIM_INFINITY else limit for name, limit in limits.items()}}


def gpu_health() -> list[dict[str, Any]]:
    """Return of each NVIDIA GPU its slot, why it is slowed down (NVML's bits) and its PCIe lanes, now and at most."""
    query = "index,clocks_throttle_reasons.active,pcie.link.width.current,pcie.link.width.max"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=TORCH_LIMIT)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in done.stdout.decode("ascii", "replace").splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        with contextlib.suppress(ValueError, IndexError):
            numbers = [int(cell, 0) if re.fullmatch("[0-9]{1,9}|0x[0-9a-fA-F]{1,16}", cell) else None for cell in cells]
            if numbers[0] is not None:
                found.append({"slot": numbers[0], "slowed": numbers[1], "lanes": numbers[2], "lanes_max": numbers[3]})
    return found[:64]


def kernel_faults() -> list[str]:
    """Return what the kernel's log says of GPU faults (Xid), the last few; [] where this account may not read it."""
    try:
        done = subprocess.run(["dmesg"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return ["".join(one for one in line if one.isprintable())[:300] for line in lines if "NVRM: Xid" in line][-5:]


def port_range() -> list[int] | None:
    """Return the first and last port that connections come from and that port 0 means; None if that can't be told."""
    words = (read("/proc/sys/net/ipv4/ip_local_port_range") or "").split()
    return [int(word) for word in words] if len(words) == 2 and all(word.isdigit() for word in words) else None


def nccl_version() -> str | None:
    """Return the version of the NCCL that PyTorch brings along, None without one."""
    from importlib import metadata

    for name in NCCL:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def disks(paths: list[str]) -> list[dict[str, Any]]:
    """Return the disks below these paths: where mounted, free and all bytes, whether it turns (None unknown)."""
    found: dict[str, dict[str, Any]] = {}
    mounts = [line.split()[1].encode().decode("unicode_escape") for line in (read("/proc/mounts") or "").splitlines()]
    for path in paths:
        place = os.path.realpath(path)
        above = [mount for mount in mounts if place == mount or place.startswith(mount.rstrip("/") + "/")]
        mount = max(above, key=len, default="/")
        with contextlib.suppress(OSError):
            usage, device = shutil.disk_usage(mount), os.stat(mount).st_dev
            block = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
            turns = read(block + "/queue/rotational") or read(block + "/../queue/rotational")
            found[mount] = {"mount": mount, "free_bytes": usage.free, "total_bytes": usage.total,
                            "rotational": None if turns is None else turns == "1"}
    return list(found.values())


def ip(*words: str) -> list[list[str]]:
    """Return the words of each line that `ip` prints; [] without it."""
    try:
        done = subprocess.run(["ip", "-o", *words], stdin=subprocess.DEVNULL, capture_output=True)
    except OSError:
        return []
    return [line.split() for line in done.stdout.decode("ascii", "replace").splitlines()]


def addresses() -> dict[str, list[str]]:
    """Return the addresses, with their prefix lengths, of each network card that is up."""
    found: dict[str, list[str]] = {}
    for words in ip("addr", "show", "up"):
        if len(words) > 3 and words[2] in ("inet", "inet6") and "link" not in words[3:8] and words[1] != "lo":
            found.setdefault(words[1], []).append(words[3])
    return found


def network_cards() -> list[dict[str, Any]]:
    """Return the cards that have an address: speed in Mbit/s (None unknown), MTU, driver, and what kind they are."""
    found = []
    links = {words[1].rstrip(":").split("@")[0]: words for words in ip("link") if "mtu" in words}
    for name, own in sorted(addresses().items()):
        place = "/sys/class/net/" + name
        speed = read(place + "/speed")
        mtu = links[name][links[name].index("mtu") + 1] if name in links else None
        kind = "wifi" if os.path.isdir(place + "/wireless") else "bridge" if os.path.isdir(place + "/bridge") else \
            "tunnel" if name.startswith(TUNNELS) else "card"
        found.append({"name": name, "addresses": own, "mbit": int(speed) if speed and speed.isdigit() else None,
                      "mtu": int(mtu) if mtu and mtu.isdigit() else None, "kind": kind,
                      "driver": os.path.basename(os.path.realpath(place + "/device/driver"))
                      if os.path.exists(place + "/device/driver") else None})
    return found


def resolved(names: list[str]) -> dict[str, list[str]]:
    """Return the addresses by which this node knows each name, [] for an unknown one."""
    found = {}
    for name in names:
        try:
            entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            found[name] = sorted({str(entry[4][0]) for entry in entries})
        except OSError:
            found[name] = []
    return found


def content(path: str) -> str | None:
    """Return a digest by which copies of a file or folder are compared, None if it isn't there.

    Names and sizes of all files, and of the first 2,000 their first and last 64 KiB: gigabytes take no time.
    """
    files = [path] if os.path.isfile(path) else []
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:  # a link to a folder that it is in
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        files += [os.path.join(folder, name) for name in names if not name.startswith(".lanspeed-")]
    files = sorted(name for name in files if os.path.isfile(name))
    digest = hashlib.sha256()
    for number, name in enumerate(files):
        with contextlib.suppress(OSError):
            size = os.path.getsize(name)
            digest.update(f"{os.path.relpath(name, path)} {size} ".encode("utf-8", "surrogateescape"))
            if number < SAMPLED:
                with open(name, "rb") as file:
                    digest.update(file.read(SAMPLE))
                    file.seek(max(0, size - SAMPLE))
                    digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16] if files else None


def hub_content(name: str) -> str | None:
    """Return the same for what the Hugging Face cache has of a model or dataset ("models--org--name")."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    place = os.path.join(home, "hub", name)
    return content(os.path.join(place, "snapshots", read(os.path.join(place, "refs", "main")) or "-"))


def more(wanted: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return what a check of the cluster asks beyond what a start needs."""
    cache = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    return {**system(), "nccl": nccl_version(), "nics": network_cards(), "names": resolved(wanted.get("names", [])),
            "content": {**{path: content(path) for path in wanted.get("paths", [])},
                        **{name: hub_content(name) for name in wanted.get("hub", [])}},
            "gpu_health": gpu_health(), "kernel_faults": kernel_faults(), "port_range": port_range(),
            "own_name": resolved([socket.gethostname()])[socket.gethostname()],
            "disks": disks([folder, cache, *wanted.get("paths", [])])}


def describe(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the facts; `wanted` names the folder, paths to look for, the port, others that may be there."""
    folder = wanted.get("folder") or os.getcwd()
    return {
        "schema": "node-facts/1", "hostname": socket.gethostname(), "python": platform.python_version(),
        "executable": sys.executable, "packages": package_versions(), "folder": os.path.isdir(folder),
        "code": code_digest(folder), "free_bytes": room_bytes(wanted.get("room") or folder),
        "missing": [path for path in wanted.get("paths", []) if not os.path.exists(path)],
        "there": [path for path in wanted.get("marks", []) if usable(path)],
        "port": free_port(wanted.get("port")), "cores": len(os.sched_getaffinity(0)), "jobs": jobs(),
        "address": (os.environ.get("SSH_CONNECTION", "").split() + [None] * 3)[2], "time": time.time(),
        "torch": ask_torch() if wanted.get("torch") else None, **memory_bytes(),
        **(more(wanted, folder) if wanted.get("more") else {})}


def main() -> int:
    """Print the line."""
    wanted = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    print("\n@@NODE_FACTS " + json.dumps(describe(wanted)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
