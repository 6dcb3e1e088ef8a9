"""A training on this machine: its GPUs or CPU ranks by DeepSpeed's own per-node launcher, for launch_training.py."""

from __future__ import annotations

import argparse
import base64
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from master.core.paths import TRAINER
from master.core.run_cli import UsageError
from master.core.terminal import one_line, say
from master.inventory.cluster_file import empty
from master.inventory.hostfile import Slots
from master.ssh.options import PASSWORD_VARIABLE
from master.training.processes import Job
from master.training.run_folder import keep_hosts, mark_failed, memory_advice, sign

KILLED = 256 - signal.SIGKILL  # what DeepSpeed's launcher makes of it
GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD128")


def shown(path: Path) -> str:
    """Return a path as a person here would write it."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def count_gpus() -> int:
    """Return how many GPUs torch can use here; torch is asked, in a process of its own, only if a driver is there."""
    if not any(os.path.exists(path) for path in GPU_DEVICE_FILES):
        return 0
    program = "import torch; print(torch.accelerator.device_count())"
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return int(asked.stdout) if asked.stdout.strip().isdigit() else 0


def choose_slots(wanted: int | None, gpus: int) -> list[int]:
    """Return the device numbers to train on: CUDA_VISIBLE_DEVICES' own, or the first `wanted`.

    Raises UsageError where they can't be had.
    """
    if not gpus:
        return list(range(wanted or 1))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and not all(word.strip().isdigit() for word in visible.split(",")):
        raise UsageError(f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's launcher takes numbers only, like 0,1")
    devices = [int(word) for word in visible.split(",")] if visible else list(range(gpus))
    if wanted and wanted > len(devices):
        raise UsageError(f"--slots {wanted}: {len(devices)} GPUs are here")
    return devices[:wanted]


def free_port() -> int:
    """Return a TCP port of the loopback address that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def launcher_command(slots: list[int], port: int, arguments: list[str]) -> list[str]:
    """Return the command that `deepspeed` itself would run on this node."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": slots}).encode()).decode()
    return [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0",
            "--master_addr=127.0.0.1", f"--master_port={port}", "--log_level=critical", str(TRAINER), *arguments]


def plain_command(slots: list[int], arguments: list[str]) -> list[str]:
    """Return the same training as a plain `deepspeed` command."""
    include = "localhost:" + ",".join(map(str, slots))
    return ["deepspeed", "--include", include, shown(TRAINER), *arguments]


def environment(gpus: int) -> dict[str, str]:
    """Return the ranks' environment: this one's bin folder first (a bare PATH hides ninja), the accelerator named."""
    found = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    found.pop(PASSWORD_VARIABLE, None)
    if not gpus:
        found.setdefault("DS_ACCELERATOR", "cpu")
    return found


def explain(code: int) -> str:
    """Return what a failed launcher's exit code means: it reports a rank's signal n as 256 - n."""
    if code < 0:
        return f"DeepSpeed's launcher was killed by signal {-code}"
    if code == KILLED:
        return "a rank was killed (SIGKILL); if nobody did, the kernel ran out of memory: sudo dmesg | tail"
    if code > 200:
        return f"a rank was killed by signal {256 - code}"
    return f"a rank ended with exit code {code}"


def train_here(options: argparse.Namespace, slots: Sequence[int], gpus: int, arguments: list[str], run: Path | None,
               config: Path) -> int:
    """Train on these slots and return the exit code; `run` is the folder, None where the trainer finds it."""
    command = launcher_command(list(slots), free_port(), arguments)
    kind = f"GPU {','.join(map(str, slots))}" if gpus else f"{len(slots)} CPU rank{'s' * (len(slots) > 1)}"
    say(f"training on this machine: {kind}, {shown(config)}")
    if not options.hostfile and Path("hostfile.txt").exists():
        say("hostfile.txt is left alone: --hostfile hostfile.txt trains on its hosts")
    prefix = [] if gpus else ["DS_ACCELERATOR=cpu"]
    plain = shlex.join([*prefix, *plain_command(list(slots), arguments)])
    if options.dry_run:
        print(f"would run:\n  {shlex.join([*prefix, *command])}")
        print(f"the same with plain DeepSpeed:\n  {plain}")
        return 0
    if run:
        sign(run)
        keep_hosts(run, [Slots("localhost", max(slots) + 1, tuple(slots), "" if gpus else "CPU")], empty())
    started = time.monotonic()
    variables = {**environment(gpus), "LANSPEED_PLAIN": plain}
    code = Job(command, variables, options.grace).run(say)
    if code:
        if run:
            mark_failed(run, code)
        say(f"training failed after {time.monotonic() - started:.0f} s: {explain(code)}")
        for line in memory_advice(run) if run and code == KILLED else ():
            say(one_line(line))
    return code if code in (0, 2) else 1
