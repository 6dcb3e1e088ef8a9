"""Tests that run on all slots as a training does: do the ranks come together, and is one of them slow?"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from master.check.finding import Finding
from master.core.json_schema import loads
from master.core.paths import ROOT

NAMES = {"allreduce_test.py": "the all-reduce test", "speed_test.py": "the speed test"}
SPEED_MARK = "@@SPEED "
SLOW = 0.9  # of what slots of the same model usually do


def run_on_slots(script: str, hostfile: Path, hosts: Sequence[str], flags: Sequence[str], password: dict[str, str]
                 ) -> tuple[list[str], Finding | None]:
    """Run a script of trainer/ on all slots of these hosts; return what rank 0 printed, or why it failed.

    `flags`: of ssh; `password`: its environment variable.
    """
    words = [sys.executable, str(ROOT / "master" / "launch_training.py"), "--hostfile", str(hostfile.absolute()),
             "--script", str(ROOT / "trainer" / script), "--include", "@".join(hosts), *flags]
    with tempfile.TemporaryDirectory(prefix="lanspeed-") as folder:  # where the run's folder goes
        done = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              env={**os.environ, **password})
    if done.returncode == 0:
        return done.stdout.strip().splitlines(), None
    said = [line.strip() for line in done.stderr.splitlines() if ": " in line and not line.startswith("output: ")]
    what = next((line for line in said if line.startswith("error: ")), said[-1] if said else f"exit {done.returncode}")
    return [], Finding("error", tuple(hosts), f"{NAMES[script]} failed: {what.removeprefix('error: ')}",
                       "a training would fail the same way", shlex.join(words[:6]) + " shows all")


def read_speeds(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return what speed_test.py measured: host, slot, device, tflops; what makes no sense is left out."""
    for line in lines:
        if line.startswith(SPEED_MARK):
            try:
                found = loads(line[len(SPEED_MARK) :])
            except ValueError:
                return []
            return [each for each in found if isinstance(each, dict) and isinstance(each.get("tflops"), int | float)
                    and {"host", "slot", "device"} <= set(each)] if isinstance(found, list) else []
    return []


def speed_findings(speeds: Sequence[dict[str, Any]]) -> list[Finding]:
    """Return which slots are slower than the others of the same model."""
    found, models = [], defaultdict(list)
    for each in speeds:
        models[each["device"]].append(each["tflops"])
    for each in speeds:
        usual = median(models[each["device"]])
        if each["tflops"] < SLOW * usual:
            found.append(Finding("warning", (str(each["host"]),),
                                 f"slot {each['slot']} does {each['tflops']:.3g} TFLOP/s, a usual {each['device']} "
                                 f"here {usual:.3g}", "every step waits for the slowest slot",
                                 "look at its temperature, power and other programs: invoke watch"))
    return found


def speed_lines(speeds: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each model of GPU."""
    models = defaultdict(list)
    for each in speeds:
        models[str(each["device"])].append(each["tflops"])
    return [f"speed: {device}: {min(rates):.3g} to {max(rates):.3g} TFLOP/s on {len(rates)} slots"
            for device, rates in models.items()]
