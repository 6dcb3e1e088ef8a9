"""Train on this machine or on many: a process a GPU, or CPU ranks, by DeepSpeed's own per-node launcher, supervised.

    invoke train --model tiny
    python master/launch_training.py --model tiny --dataset notes/ -- --max_steps 200
    python master/launch_training.py --model tiny --hostfile hostfile.txt

What follows -- goes to trainer/train.py. Ctrl-C once lets the ranks save, twice ends at once; nothing runs on after.
With a hostfile, all its hosts are looked at first; if one fails or vanishes, the others end within seconds.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.paths import PRESETS, ROOT, TRAINER
from master.core.run_cli import UsageError, UserError, run_cli
from master.core.terminal import say
from master.inventory.cluster_file import empty, read_cluster
from master.inventory.hostfile import Slots, read_hostfile, select
from master.ssh.options import PASSWORD_VARIABLE, access_of, access_words, add_access_flags
from master.training.deepspeed_command import default_config, first_address, is_only_here, launcher_words
from master.training.local_run import choose_slots, count_gpus, shown, train_here
from master.training.processes import detach
from master.training.run_folder import find_run, new_run_path, place_of_run, refuse_twice, trainer_words


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool's own flags."""
    parser = argparse.ArgumentParser(
        prog="launch_training.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--model", metavar="M", help="a Hugging Face name, a folder, or 'tiny' (needs no download)")
    flag("--dataset", metavar="D", help="file, folder or Hugging Face name (default: Python's own documentation)")
    flag("--config", metavar="C", type=Path,
         help="DeepSpeed config (default: trainer/ds_config.json; without a GPU trainer/configs/cpu.json)")
    flag("--hostfile", type=Path, metavar="H", help="train on these hosts (default: on this machine)")
    flag("--nodes", nargs="+", metavar="N", default=[], help="find these hosts' GPUs first, and train on them")
    flag("--slots", type=int, metavar="N",
         help="ranks on this machine (default: all GPUs; 1 without any); CPU slots on each of --nodes")
    flag("--grace", type=float, default=60, metavar="S", help="seconds to save in after Ctrl-C (60)")
    flag("--include", default="", metavar="I", help="these hosts and slots of the hostfile: gpu1@gpu2:0,2")
    flag("--exclude", default="", metavar="E", help="all but these")
    flag("--resume", metavar="RUN", help="go on with a run from its newest good checkpoint, as it was started")
    flag("--restarts", type=int, default=0, metavar="N", help="after a failure begin again, so many times (0)")
    flag("--stall-timeout", type=float, metavar="S",
         help="seconds without a sign of life that are told of (default: 300, or 10 steps if that is more; 0: none)")
    flag("--on-lost-master", choices=["end", "continue"], default="end",
         help="what the hosts do when this machine is gone (end)")
    flag("--detach", action="store_true", help="go on without this terminal")
    flag("--stop", nargs="?", const="", metavar="RUN", help="stop a run in order (default: the newest that runs)")
    flag("--script", metavar="F", help="your own training script instead of trainer/train.py (with --hostfile)")
    flag("--no-local-rank", action="store_true", help="start it without DeepSpeed's --local_rank=N")
    flag("--env", action="append", default=[], metavar="K=V", help="a variable for all ranks; K alone: as it is here")
    flag("--master-port", type=int, metavar="P", help="port of rank 0 (default: one that is free there)")
    flag("--dry-run", action="store_true", help="print what would run")
    add_access_flags(parser)
    flag("trainer_flags", nargs="*", metavar="-- FLAGS", help="flags of trainer/train.py")
    return parser


def existing(config: Path) -> Path:
    """Return the path of a config that is there; raise UsageError if it isn't."""
    if not config.is_file():
        raise UsageError(f"--config {config}: no such file. Presets: {PRESETS}")
    return config


class ConfigError(UserError):
    """A DeepSpeed config that would be refused."""


def check_config(config: Path, ranks: int) -> None:
    """Say what is wrong with a config; raise ConfigError if DeepSpeed or the Trainer would refuse it."""
    from master.ds_config.checker import Target, check
    from master.ds_config.json_text import Document, TextError

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


def trainer_line(options: argparse.Namespace, config: Path) -> list[str]:
    """Return the trainer's flags: as typed, or, on --resume without a model, as the run was started."""
    if options.script:
        return list(options.trainer_flags)
    if options.resume and not options.model:
        return trainer_words(options.run) + options.trainer_flags
    words = ["--model_name_or_path", options.model, "--deepspeed", "--deepspeed_config", str(config)]
    return words + (["--dataset_path", options.dataset] if options.dataset else []) + options.trainer_flags


def whole_checkpoint(options: argparse.Namespace, hosts: Sequence[Slots]) -> list[str]:
    """Bring a resumed run's checkpoint to hosts that lack some of it; return the flags that name it.

    Raises RunError where it can't be had.
    """
    before = options.run / "hostfile.txt"
    if options.script or not options.resume or not before.exists():
        return []
    from master.training.checkpoint_transfer import bring_together

    options.access = options.access or access_of(options)
    clusters = [read_cluster(before.with_name("cluster.json")), options.cluster]
    known = {host["name"]: host for cluster in clusters for host in cluster["hosts"]}
    found = bring_together(options.run, read_hostfile(before), hosts, known, options.access)
    return ["--resume_from_checkpoint", str(found)] if found else []


def launch_on_hosts(options: argparse.Namespace, hosts: Sequence[Slots]) -> int:
    """Train on a hostfile's hosts; return the exit code. Raises what `main` catches."""
    from master.training.cluster_run import train_on_hosts

    config = existing(options.config or ROOT / default_config(hosts)).absolute()
    if not options.script:
        check_config(config, sum(len(host.use) for host in hosts))
    for name in ("model", "dataset"):  # the ranks start elsewhere
        if (value := getattr(options, name)) and value != "tiny" and Path(value).exists():
            setattr(options, name, str(Path(value).absolute()))
    words = trainer_line(options, config)
    run, place = place_of_run(options)
    if not options.script:
        options.run, words = run or options.run, words + place
    named = Path("hostfile.txt") if options.nodes else options.hostfile  # invoke hostfile --nodes ... writes that
    plain = [*launcher_words(named, hosts, first_address(hosts, options.hostfile)),
             *(["--no_local_rank"] if options.no_local_rank else []), options.script or str(TRAINER), *words]
    options.plain = ("DS_ACCELERATOR=cpu " if hosts[0].vendor == "CPU" else "") + shlex.join(plain)
    if options.dry_run:
        where = "; ".join(f"{host.host}: slots {','.join(map(str, host.use))}" for host in hosts)
        print(f"would run on {where}:\n  {shlex.join([options.script or str(TRAINER), *words])}")
        print(f"the same with plain DeepSpeed, over pdsh:\n  {options.plain}")
        return 0
    refuse_twice(options.run)
    options.access = options.access or access_of(options)
    words += whole_checkpoint(options, hosts)
    if options.detach and not detach(options.run):
        return 0
    return train_on_hosts(options, hosts, config, words)


def launch(options: argparse.Namespace) -> int:
    """Run the training that `options` name and return its exit code. Raises what `main` catches."""
    before = options.run / "hostfile.txt"
    if options.resume and not (options.hostfile or options.slots) and before.exists():
        options.hostfile = before
    hosts = read_hostfile(options.hostfile) if options.hostfile else []
    options.cluster = empty()
    if hosts:
        hosts = select(hosts, options.include, options.exclude)
        options.cluster = read_cluster(options.hostfile.with_name("cluster.json"))
    elif options.include or options.exclude or options.script or options.restarts:
        raise UsageError("--include, --exclude, --script and --restarts need --hostfile or --nodes")
    if hosts and options.slots:
        raise UsageError("--slots is for this machine alone; the hostfile has slots of its own")
    if hosts and (not is_only_here(hosts) or options.script):
        return launch_on_hosts(options, hosts)
    gpus = count_gpus() if not hosts or hosts[0].vendor != "CPU" else 0
    slots = list(hosts[0].use) if hosts else choose_slots(options.slots, gpus)
    config = existing(options.config or (ROOT / "trainer" / "ds_config.json" if gpus else PRESETS / "cpu.json"))
    check_config(config, len(slots))
    run, place = place_of_run(options)
    if options.restarts:
        raise UsageError("--restarts: not on this machine alone: --resume goes on")
    if run and not options.dry_run:
        refuse_twice(run)
        here = Slots("localhost", max(slots) + 1, tuple(slots), "" if gpus else "CPU")
        place += whole_checkpoint(options, hosts or [here])
    if options.detach and not options.dry_run and not detach(run or options.run):
        return 0
    return train_here(options, slots, gpus, trainer_line(options, config) + place, run, config)


def launch_on_nodes(options: argparse.Namespace) -> int:
    """Write the hostfile of --nodes into the run folder by generate_hostfile.py; train if no host failed."""
    options.access = access_of(options)  # a password is asked for once, and never in an argument
    password = {PASSWORD_VARIABLE: options.access.password} if options.access.password else {}
    folder = Path(tempfile.mkdtemp(prefix="lanspeed-"))
    options.hostfile = folder / "hostfile.txt"
    if Path("cluster.json").exists():  # which knows where lanspeed lives on the hosts
        shutil.copy("cluster.json", folder)
    command = [sys.executable, str(ROOT / "master" / "generate_hostfile.py"), "--nodes", *options.nodes,
               "--output", str(options.hostfile), *access_words(options)]
    if options.slots:
        command += ["--cpu-slots", str(options.slots)]
        options.slots = None
    try:
        if subprocess.run(command, stdout=sys.stderr, env={**os.environ, **password}).returncode == 0:
            return launch(options)
        say("nothing was started: leave out of --nodes what failed, or mend it (--slots N trains on CPUs)")
        return 1
    finally:  # all of it has been read before anything is started
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` and train; return 0, 1 on a fault, 2 on wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    options = build_parser().parse_args(words[:cut])
    options.trainer_flags, options.access = words[cut + 1 :], None
    return run_cli(lambda: act(options))


def act(options: argparse.Namespace) -> int:
    """Train, or stop a run, as the flags say; return the exit code."""
    if options.stop is not None:
        from master.training.stop_run import stop

        return stop(options.stop or None, options)
    if not (options.model or options.script or options.resume):
        raise UsageError("which model? --model tiny (or a Hugging Face name, or a folder)")
    if options.slots is not None and options.slots < 1:
        raise UsageError(f"--slots {options.slots}: at least 1")
    if options.nodes and options.hostfile:
        raise UsageError("--nodes makes a hostfile of its own: give no --hostfile")
    options.run = find_run(options.resume) if options.resume else new_run_path(options.model or "script")
    return launch_on_nodes(options) if options.nodes else launch(options)


if __name__ == "__main__":
    raise SystemExit(main())
