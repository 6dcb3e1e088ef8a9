#!/usr/bin/env python3
"""Tell every few seconds how busy a node is, as JSON lines: GPUs (use, memory, temperature), network, memory, load.

    python3 worker/measure_node.py 2 < /dev/tty

`invoke watch` streams this file over SSH and reads. It ends with its input, or after half a minute without any: nothing
stays behind when the watcher has disconnected. Standard library only, Python 3.8 or newer.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from typing import Any, Dict, Tuple

PATIENCE = 30.0  # seconds without a word from whoever watches
PLACES = ("/usr/bin", "/usr/local/bin", "/usr/lib/wsl/lib")  # not all on the PATH of an ssh session
GPU_LIMIT = 10.0  # seconds after which nvidia-smi counts as hanging
FIELDS = "index,utilization.gpu,memory.used,memory.total,temperature.gpu,power.draw"
Counts = Dict[str, Tuple[int, int]]  # of each network card, bytes received and sent
NAMES = ("slot", "use_percent", "memory_used_mib", "memory_total_mib", "temperature_c", "power_w")


def read(path: str) -> str | None:
    """Return what a file of the kernel says, None if it isn't there."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None


def number(text: str | None, divisor: float = 1) -> float | None:
    """Return a number, None for what isn't one ("[N/A]", "[GPU requires reset]")."""
    try:
        value = float(text or "") / divisor
    except ValueError:
        return None
    return int(value) if value == int(value) else round(value, 1)


class NvidiaSmi:
    """nvidia-smi, which takes a second and may hang: one at a time, and never waited for."""

    def __init__(self) -> None:
        self.program = shutil.which("nvidia-smi", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.latest: list[dict[str, Any]] = []
        self.problem: str | None = None

    def look(self) -> None:
        """Take in its answer if there is one, and ask again."""
        if not self.program:
            return
        if self.process and self.process.poll() is None:
            if time.monotonic() - self.started > GPU_LIMIT:
                self.latest, self.problem = [], "nvidia-smi gives no answer"
            return
        if self.process:
            assert self.process.stdout
            text = self.process.stdout.read().decode("utf-8", "replace")
            self.process.stdout.close()
            self.latest, self.problem = parse_nvidia(text), None
            if self.process.returncode:
                self.problem = (text.strip().splitlines() or ["nvidia-smi fails"])[-1][:200]
        self.started = time.monotonic()
        self.process = subprocess.Popen([self.program, "--query-gpu=" + FIELDS, "--format=csv,noheader,nounits"],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def parse_nvidia(text: str) -> list[dict[str, Any]]:
    """Return the GPUs of nvidia-smi's table."""
    found = []
    for line in text.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == len(NAMES) and words[0].isdigit():
            found.append(dict(zip(NAMES, map(number, words))))
    return found


def amd_gpus(root: str = "/sys/class/drm") -> list[dict[str, Any]]:
    """Return the AMD GPUs as their driver describes them."""
    found: list[dict[str, Any]] = []
    cards = [path for path in glob.glob(root + "/card*") if re.fullmatch(r"card\d+", os.path.basename(path))]
    for card in sorted(cards, key=lambda path: int(path.rpartition("card")[2])):
        device = card + "/device"
        if read(device + "/vendor") != "0x1002" or read(device + "/mem_info_vram_total") is None:
            continue
        sensors = glob.glob(device + "/hwmon/hwmon*")
        sensor = sensors[0] if sensors else ""
        files = ((device + "/gpu_busy_percent", 1), (device + "/mem_info_vram_used", 1 << 20),
                 (device + "/mem_info_vram_total", 1 << 20), (sensor + "/temp1_input", 1000),
                 (sensor + "/power1_average", 1e6))
        found.append(dict(zip(NAMES, [len(found), *(number(read(path), divisor) for path, divisor in files)])))
    return found


def traffic() -> Counts:
    """Return each network card's bytes received and sent since it came up, the loopback left out."""
    found = {}
    for line in (read("/proc/net/dev") or "").splitlines()[2:]:
        name, _, counts = line.partition(":")
        words = counts.split()
        if name.strip() != "lo" and len(words) >= 9:
            found[name.strip()] = int(words[0]), int(words[8])
    return found


def rates(before: Counts, after: Counts, seconds: float) -> list[dict[str, Any]]:
    """Return bytes a second and the speed in Mbit/s (None unknown) of each card that moves any, the busiest first."""
    found: list[dict[str, Any]] = []
    for name, (received, sent) in after.items():
        was = before.get(name, (received, sent))
        incoming, outgoing = received - was[0], sent - was[1]
        speed = number(read(f"/sys/class/net/{name}/speed"))
        if incoming > 0 or outgoing > 0:
            found.append({"name": name, "in": round(incoming / seconds), "out": round(outgoing / seconds),
                          "mbit": speed if speed and speed > 0 else None})
    return sorted(found, key=lambda each: -(each["in"] + each["out"]))


def memory() -> dict[str, int | None]:
    """Return RAM in MiB: all and available."""
    found = dict(re.findall(r"(\w+):\s+(\d+) kB", read("/proc/meminfo") or ""))
    return {name: int(found[key]) // 1024 if key in found else None
            for name, key in (("ram_mib", "MemTotal"), ("ram_available_mib", "MemAvailable"))}


def busy_share(before: list[int], after: list[int]) -> int | None:
    """Return the percentage of the CPUs' time that was spent at work, from two first lines of /proc/stat."""
    total, idle = sum(after) - sum(before), sum(after[3:5]) - sum(before[3:5])
    return round(100 * (total - idle) / total) if total > 0 else None


def cpu_times() -> list[int]:
    """Return the CPUs' times (proc(5): user nice system idle iowait irq softirq steal)."""
    return [int(word) for word in ((read("/proc/stat") or "cpu 0").splitlines()[0].split()[1:9])]


def main() -> int:
    """Print a line every so many seconds until the input ends."""
    every = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    tool, heard = NvidiaSmi(), time.monotonic()
    tool.look()
    then, before, cpu = time.monotonic(), traffic(), cpu_times()
    while time.monotonic() - heard < PATIENCE:
        if select.select([0], [], [], max(0.0, then + every - time.monotonic()))[0]:
            if not os.read(0, 4096):
                break
            heard = time.monotonic()
            continue
        tool.look()
        now, after, cpu_now = time.monotonic(), traffic(), cpu_times()
        line = {"gpus": tool.latest or amd_gpus(), "problem": tool.problem, "nics": rates(before, after, now - then),
                "cpu_percent": busy_share(cpu, cpu_now), **memory()}
        then, before, cpu = now, after, cpu_now
        try:
            print("@@MEASURED " + json.dumps(line), flush=True)
        except OSError:  # nobody reads any more
            break
    if tool.process and tool.process.poll() is None:
        tool.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in its driver can't be ended
            tool.process.wait(timeout=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
