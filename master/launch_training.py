"""Train on this machine or on many: a process a GPU, or CPU ranks, by DeepSpeed's own per-node launcher, supervised.

    invoke train --model tiny
    python master/launch_training.py --model tiny --dataset notes/ -- --max_steps 200
    python master/launch_training.py --model tiny --hostfile hostfile.txt

What follows -- goes to trainer/train.py. Ctrl-C once lets the ranks save, twice ends at once; nothing runs on after.
With a hostfile, all its hosts are looked at first; if one fails or vanishes, the others end within seconds.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from master.access import AccessError, add_access_flags
from master.cluster import ClusterError
from master.console import say
from master.hostfile import HostfileError, Slots, read_hostfile
from master.plain_deepspeed import default_config, first_address, is_only_here, launcher_words
from master.processes import Job
from master.runs import mark_failed, new_run_path

HOME = Path(__file__).resolve().parent.parent
TRAINER = HOME / "trainer" / "train.py"
PRESETS = HOME / "trainer" / "configs"
GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD128")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool's own flags."""
    parser = argparse.ArgumentParser(
        prog="launch_training.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--model", required=True, metavar="M", help="a Hugging Face name, a folder, or 'tiny' (needs no download)")
    flag("--dataset", metavar="D", help="file, folder or Hugging Face name (default: Python's own documentation)")
    flag("--config", metavar="C", type=Path,
         help="DeepSpeed config (default: trainer/ds_config.json; without a GPU trainer/configs/cpu.json)")
    flag("--hostfile", type=Path, metavar="H", help="train on these hosts (default: on this machine)")
    flag("--slots", type=int, metavar="N", help="ranks on this machine (default: all GPUs; 1 without any)")
    flag("--grace", type=float, default=60, metavar="S", help="seconds to save in after Ctrl-C (60)")
    flag("--script", metavar="F", help="your own training script instead of trainer/train.py (with --hostfile)")
    flag("--env", action="append", default=[], metavar="K=V", help="a variable for all ranks; K alone: as it is here")
    flag("--master-port", type=int, metavar="P", help="port of rank 0 (default: one that is free there)")
    flag("--dry-run", action="store_true", help="print what would run")
    add_access_flags(parser)
    flag("trainer_flags", nargs="*", metavar="-- FLAGS", help="flags of trainer/train.py")
    return parser


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

    Raises ValueError where they can't be had.
    """
    if not gpus:
        return list(range(wanted or 1))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and not all(word.strip().isdigit() for word in visible.split(",")):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's launcher takes numbers only, like 0,1")
    devices = [int(word) for word in visible.split(",")] if visible else list(range(gpus))
    if wanted and wanted > len(devices):
        raise ValueError(f"--slots {wanted}: {len(devices)} GPUs are here")
    return devices[:wanted]


def free_port() -> int:
    """Return a TCP port of the loopback address that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def trainer_arguments(options: argparse.Namespace, config: Path) -> tuple[Path | None, list[str]]:
    """Return the run folder (None where the trainer finds it: on resume) and the trainer's command line."""
    words = ["--model_name_or_path", options.model, "--deepspeed", "--deepspeed_config", str(config)]
    words += ["--dataset_path", options.dataset] if options.dataset else []
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--output_dir", "--output-dir", type=Path)
    named.add_argument("--resume_from_checkpoint", "--resume-from-checkpoint")
    found, _ = named.parse_known_args(options.trainer_flags)
    if not (found.output_dir or found.resume_from_checkpoint):
        found.output_dir = new_run_path(options.model)
        words += ["--output_dir", str(found.output_dir)]
    return found.output_dir, words + options.trainer_flags


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
    if not gpus:
        found.setdefault("DS_ACCELERATOR", "cpu")
    return found


def explain(code: int) -> str:
    """Return what a failed launcher's exit code means: it reports a rank's signal n as 256 - n."""
    if code < 0:
        return f"DeepSpeed's launcher was killed by signal {-code}"
    if code == 256 - 9:
        return "a rank was killed (SIGKILL); if nobody did, the kernel ran out of memory: sudo dmesg | tail"
    if code > 200:
        return f"a rank was killed by signal {256 - code}"
    return f"a rank ended with exit code {code}"


def existing(config: Path) -> Path:
    """Return the path of a config that is there; raise ValueError if it isn't."""
    if not config.is_file():
        raise ValueError(f"--config {config}: no such file. Presets: {PRESETS}")
    return config


class ConfigError(Exception):
    """A DeepSpeed config that would be refused."""


def check_config(config: Path, ranks: int) -> None:
    """Say what is wrong with a config; raise ConfigError if DeepSpeed or the Trainer would refuse it."""
    from master.ds_config import Target, check  # here: it takes a tenth of a second to load
    from master.json_text import Document, TextError

    try:
        document = Document(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, TextError) as error:
        raise ConfigError(f"{shown(config)}: {getattr(error, 'strerror', None) or error}") from None
    problems = check(document, Target(trainer=True, completed=True, world_size=ranks))
    for problem in problems:
        if problem.level != "info":
            say(problem.line(shown(config), document.line(document.place(problem.path))[0]))
    if errors := sum(problem.level == "error" for problem in problems):
        raise ConfigError(f"{shown(config)} has {errors} error{'s' * (errors > 1)}: "
                         f"invoke validate --config {shlex.quote(shown(config))} --fix")


def launch_on_hosts(options: argparse.Namespace, hosts: Sequence[Slots]) -> int:
    """Train on a hostfile's hosts; return the exit code. Raises what `main` catches."""
    from master.cluster_training import train_on_hosts

    config = existing(options.config or HOME / default_config(hosts))
    check_config(config, sum(len(host.use) for host in hosts))
    words = options.trainer_flags if options.script else [
        "--model_name_or_path", options.model, "--deepspeed", "--deepspeed_config", str(config.absolute()),
        *(["--dataset_path", options.dataset] if options.dataset else []), *options.trainer_flags]
    if options.dry_run:
        plain = [*launcher_words(options.hostfile, hosts, first_address(hosts, options.hostfile)), str(TRAINER), *words]
        where = "; ".join(f"{host.host}: slots {','.join(map(str, host.use))}" for host in hosts)
        print(f"would run on {where}:\n  {shlex.join([options.script or str(TRAINER), *words])}")
        prefix = "DS_ACCELERATOR=cpu " if hosts[0].vendor == "CPU" else ""
        print(f"the same with plain DeepSpeed, over pdsh:\n  {prefix}{shlex.join(plain)}")
        return 0
    return train_on_hosts(options, hosts, config, words)


def launch(options: argparse.Namespace) -> int:
    """Run the training that `options` name and return its exit code. Raises ValueError for what can't be."""
    hosts = read_hostfile(options.hostfile) if options.hostfile else []
    if hosts and options.slots:
        raise ValueError("--slots is for this machine alone; the hostfile has slots of its own")
    if hosts and not is_only_here(hosts):
        return launch_on_hosts(options, hosts)
    gpus = count_gpus() if not hosts or hosts[0].vendor != "CPU" else 0
    slots = list(hosts[0].use) if hosts else choose_slots(options.slots, gpus)
    config = existing(options.config or (HOME / "trainer" / "ds_config.json" if gpus else PRESETS / "cpu.json"))
    check_config(config, len(slots))
    run, arguments = trainer_arguments(options, config)
    command = launcher_command(slots, free_port(), arguments)
    kind = f"GPU {','.join(map(str, slots))}" if gpus else f"{len(slots)} CPU rank{'s' * (len(slots) > 1)}"
    say(f"training on this machine: {kind}, {shown(config)}")
    if not hosts and Path("hostfile.txt").exists():
        say("hostfile.txt is left alone: --hostfile hostfile.txt trains on its hosts")
    prefix = [] if gpus else ["DS_ACCELERATOR=cpu"]
    if options.dry_run:
        print(f"would run:\n  {shlex.join([*prefix, *command])}")
        print(f"the same with plain DeepSpeed:\n  {shlex.join([*prefix, *plain_command(slots, arguments)])}")
        return 0
    started = time.monotonic()
    code = Job(command, environment(gpus), options.grace).run(say)
    if code:
        if run:
            mark_failed(run, code)
        say(f"training failed after {time.monotonic() - started:.0f} s: {explain(code)}")
    return code if code in (0, 2) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` and train; return 0, 1 on a fault, 2 on wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    options = build_parser().parse_args(words[:cut])
    options.trainer_flags = words[cut + 1 :]
    if options.slots is not None and options.slots < 1:
        say(f"error: --slots {options.slots}: at least 1")
        return 2
    try:
        return launch(options)
    except (ClusterError, HostfileError, ConfigError) as error:
        say(f"error: {error}")
        return 1
    except (AccessError, ValueError) as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
