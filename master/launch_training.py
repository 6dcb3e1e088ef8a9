"""Train on this machine or on several: one rank per GPU (or CPU slot), started by DeepSpeed's launcher and supervised.

    invoke train --model tiny
    python master/launch_training.py --model tiny --dataset notes/ --max_steps 200
    python master/launch_training.py --model tiny --hostfile hostfile.txt

Flags that this tool doesn't know, and whatever follows --, go to trainer/train.py. Ctrl-C lets the ranks save, a second
one kills them. All hosts are checked first; if one fails or its connection is lost, the others end within seconds.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.paths import PRESETS, ROOT, TRAINER
from master.core.run_cli import UsageError, UserError, run_cli
from master.core.terminal import print_lines, say
from master.core.tool_parser import ToolParser
from master.inventory.cluster_file import empty_cluster, read_cluster, with_logins
from master.inventory.hostfile import read_hostfile, select
from master.inventory.local_gpus import choose_slots, count_gpus
from master.plan.launch_default import choose, compared
from master.plan.layer_split import in_order
from master.run.command_record import own_command
from master.run.launcher_process import detach, ensure_not_running
from master.run.repeated_run import compared_facts, take_flags
from master.run.run_folder import find_run, new_run_path
from master.ssh.options import PASSWORD_VARIABLE, add_ssh_flags, ssh_flags, ssh_options
from master.ssh.route import SshOptions
from master.training.deepspeed_command import is_only_here, needs_of_plain
from master.training.request import Hosts, TrainingRequest, request_of, shown
from trainer.estimate.stages import PLANNED

RESTARTS_WITH_SPARE_HOSTS = 10
WRONG_USAGE = 2  # the exit code
LEAST_PATIENCE_S = 5.0  # hosts and master speak every few seconds


def build_parser() -> ToolParser:
    """Return the parser of this tool's own flags."""
    parser = ToolParser("launch_training.py", __doc__, "--model M [flags] [flags of trainer/train.py]",
                        ("--model", "--dataset"))
    flag, several = parser.add_argument, dict[str, Any](action="extend", nargs="+", default=[])
    flag("--model", metavar="M", help="a Hugging Face name, a folder, or 'tiny' (needs no download)")
    flag("--dataset", metavar="D", **several, help="files, folders or names, D:0.3 with a weight (Python's own docs)")
    flag("--config", metavar="C", type=Path,
         help="DeepSpeed config (default: what the plan says for these hosts; without a GPU trainer/configs/cpu.json)")
    flag("--hostfile", type=Path, metavar="H", help="train on these hosts (default: on this machine)")
    flag("--nodes", metavar="N", **several, help="find the GPUs of these hosts first, then train on them")
    flag("--slots", type=int, metavar="N",
         help="ranks on this machine, or at most on each of --nodes (default: all GPUs; 1 without any)")
    flag("--grace", type=float, default=60, metavar="S", help="seconds to begin, and to end, a save after Ctrl-C (60)")
    flag("--include", default="", metavar="I", help="only these hosts and slots of the hostfile: gpu1@gpu2:0,2")
    flag("--exclude", default="", metavar="E", help="all hosts and slots but these")
    flag("--resume", metavar="RUN",
         help="resume a run from its newest valid checkpoint, with the flags it was started with")
    flag("--like", metavar="RUN", help="train as that run did, in a new run; what differs is reported")
    flag("--restarts", type=int, metavar="N", help="restart after a failure, at most N times (0; with --min-hosts 10)")
    flag("--min-hosts", type=int, metavar="N",
         help="when hosts are lost for good, continue with the others, N at least, from the newest checkpoint")
    flag("--stall-timeout", type=float, metavar="S",
         help="report a hang and its cause after so long without progress (300, or 10 steps if longer; 0: never)")
    flag("--on-stall", choices=["report", "end"], default="report",
         help="after a hang, only report its cause, or end the ranks too; --restarts then applies (report)")
    flag("--on-lost-master", choices=["end", "continue"], default="end",
         help="what the hosts do after --patience: save and end, or continue (end)")
    flag("--patience", type=float, default=60, metavar="S",
         help="seconds without contact to a host until its ranks save and end (60)")
    flag("--attach", metavar="RUN", help="supervise a run whose launcher has ended and whose hosts still train")
    flag("--detach", action="store_true", help="continue without this terminal")
    flag("--stop", nargs="?", const="", metavar="RUN",
         help="stop a run; its ranks save first (default: the newest active run)")
    flag("--script", metavar="F", help="your own training script, or a module like trl.scripts.sft")
    flag("--no-local-rank", action="store_true", help="start it without DeepSpeed's --local_rank=N")
    flag("--env", action="append", default=[], metavar="K=V",
         help="an environment variable for all ranks; K alone: with its value here")
    flag("--master-port", type=int, metavar="P", help="port of rank 0 (default: one that is free there)")
    flag("--dry-run", action="store_true", help="print what would be run")
    add_ssh_flags(parser)
    return parser


def existing(config: Path | None) -> Path | None:
    """Return the absolute path of a config that is there, None for none; raise UsageError if it isn't there."""
    if config and not config.is_file():
        raise UsageError(f"--config {config}: no such file. Presets: {PRESETS}")
    return config and config.absolute()


def choose_hosts(options: argparse.Namespace, again: Path | None, ssh: SshOptions) -> Hosts:
    """Return where to train: --nodes, --hostfile, where the run was that is trained `again`, or this machine."""
    before = (again or Path()) / "hostfile.txt"
    resumed = again and not options.slots and before.exists()
    if again and resumed and not (options.hostfile or options.nodes or is_only_here(read_hostfile(before))
                                  or own_command(again)):
        say(f"{before} is not this machine's own: --hostfile names hosts; without it this machine trains")
        resumed = False
    if options.nodes:
        return ask_nodes(options, ssh)
    if hostfile := options.hostfile or (before if resumed else None):
        if options.slots:
            raise UsageError("--slots is for this machine alone; the hostfile has slots of its own")
        hosts = select(read_hostfile(hostfile), options.include, options.exclude)
        return Hosts(tuple(hosts), read_cluster(hostfile.with_name("cluster.json")), hostfile)
    if options.include or options.exclude:
        raise UsageError("--include and --exclude need --hostfile or --nodes")
    if Path("hostfile.txt").exists() and not again:
        say("hostfile.txt is not used: --hostfile hostfile.txt trains on its hosts")
    return Hosts((choose_slots(options.slots, count_gpus(), os.environ),), empty_cluster(), None)


def ask_nodes(options: argparse.Namespace, ssh: SshOptions) -> Hosts:
    """Return the hosts of --nodes, whose GPUs generate_hostfile.py finds. Raises UserError if one of them failed."""
    password = {PASSWORD_VARIABLE: ssh.password} if ssh.password else {}
    with tempfile.TemporaryDirectory(prefix="lanspeed-") as folder:
        hostfile = Path(folder) / "hostfile.txt"
        if Path("cluster.json").exists():  # which knows where lanspeed lives on the hosts
            shutil.copy("cluster.json", folder)
        command = [sys.executable, str(ROOT / "master" / "generate_hostfile.py"), "--nodes", *options.nodes,
                   "--output", str(hostfile), *ssh_flags(options)]
        command += ["--slots", str(options.slots)] if options.slots else []
        if subprocess.run(command, stdout=sys.stderr, env={**os.environ, **password}).returncode:
            raise UserError("nothing was started: fix what failed or leave it out of --nodes (--slots N trains on "
                             "CPUs)")
        hosts = select(read_hostfile(hostfile), options.include, options.exclude)
        # The name to show is the one that `invoke hostfile --nodes ...` would write.
        return Hosts(tuple(hosts), read_cluster(hostfile.with_name("cluster.json")), Path("hostfile.txt"))


def check_flags(request: TrainingRequest) -> None:
    """Have the trainer check its flags before anything starts. Raises UsageError with its message."""
    if request.is_ours:
        elsewhere = [] if request.hosts.are_here else ["--elsewhere"]
        words = [sys.executable, str(TRAINER.with_name("check_inputs.py")), *elsewhere, *request.arguments]
        told = {**os.environ, "WORLD_SIZE": str(request.hosts.ranks)}
        if code := (done := subprocess.run(words, capture_output=True, text=True, env=told)).returncode:
            raise (UsageError if code == WRONG_USAGE else UserError)(done.stderr.strip().removeprefix("error: "))


def show(request: TrainingRequest, ssh: SshOptions) -> int:
    """Print what would run, here and by plain DeepSpeed; return 0, 1 if something prevents it."""
    from master.training.attempts import is_possible

    where = "; ".join(f"{host.host}: slots {','.join(map(str, host.use))}" for host in request.hosts.slots)
    print_lines(f"would run on {where}:", f"  {shlex.join([str(request.script), *request.arguments])}",
                f"the same with plain DeepSpeed{needs_of_plain(request.hosts.slots, request.hosts.known)}:",
                f"  {request.plain_command}")
    return 0 if is_possible(request, ssh) else 1


def launch(options: argparse.Namespace, trainer_flags: list[str]) -> int:
    """Run the training that the flags ask for and return its exit code. Raises UserError."""
    from master.training.attempts import train, with_whole_checkpoint

    again = find_run(options.resume or options.like) if options.resume or options.like else None
    if again and options.like:
        trainer_flags = take_flags(options, again, trainer_flags)
    run = again if again and options.resume else new_run_path(options.model or "script")
    ssh = ssh_options(options)
    hosts = choose_hosts(options, again, ssh)
    is_planned = not (options.script or options.resume)
    plan = choose(existing(options.config), options.model if is_planned else None, options.dataset, trainer_flags,
                  hosts.slots, hosts.cluster)
    if plan.split:
        hosts = replace(hosts, slots=tuple(in_order(hosts.slots, plan.split)))
    if not options.script:
        from master.ds_config.checker import ensure_accepted

        ensure_accepted(plan.config, hosts.ranks, shown(plan.config))
    request = request_of(options, trainer_flags, hosts, run, plan.config)
    if plan.split:
        request = replace(request, environment={**request.environment, PLANNED: plan.split.cuts})
    if again and options.like:
        request = replace(request, environment={**request.environment, **compared_facts(again)})
    check_flags(request)
    ssh = with_logins(ssh, hosts.cluster)
    if options.dry_run:
        return show(request, ssh)
    ensure_not_running(request.run)
    if options.resume and request.is_ours and (before := run / "hostfile.txt").exists():
        request = with_whole_checkpoint(request, before, ssh)
    if options.detach and not detach(request.run):
        return 0
    with compared(request.run, plan):
        return train(request, ssh)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` and train; return 0, 1 on a fault, 2 on wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = build_parser()
    if any(word.partition("=")[0] == "--script" for word in words[:cut]):
        parser.other_names = {}  # what it calls --model_name_or_path is its own matter
    options, unknown = parser.parse_known_args(words[:cut])
    return run_cli(lambda: act(options, [*unknown, *words[cut + 1 :]]))


def act(options: argparse.Namespace, trainer_flags: list[str]) -> int:
    """Train, or stop a run, as the flags say; return the exit code."""
    for word in trainer_flags:
        if word.startswith(("--ssh", "--host-key")):  # it isn't shown with its value, which may be a password
            raise UsageError(f"unknown flag {word.partition('=')[0]}: launch_training.py --help lists those of ssh")
    if options.stop is not None:
        from master.training.stop_run import stop

        return stop(options.stop or None, options)
    if options.attach:
        from master.training.takeover import read_job_record, take_over

        run, ssh = find_run(options.attach), ssh_options(options)
        ensure_not_running(run)
        read_job_record(run)
        return take_over(run, ssh) if not options.detach or detach(run) else 0
    if options.like and (options.resume or options.script):
        raise UsageError("--like begins another run: give neither --resume nor --script")
    if not (options.model or options.script or options.resume or options.like):
        raise UsageError("which model? invoke train --model tiny (or a Hugging Face name, or a folder)")
    if options.patience < LEAST_PATIENCE_S:
        raise UsageError(f"--patience {options.patience:g}: at least {LEAST_PATIENCE_S:g} s")
    if options.min_hosts is not None and (options.min_hosts < 1 or options.script):
        raise UsageError(f"--min-hosts {options.min_hosts}: at least 1, and only for lanspeed's own trainer")
    if options.restarts is None:
        options.restarts = RESTARTS_WITH_SPARE_HOSTS if options.min_hosts else 0
    if options.slots is not None and options.slots < 1:
        raise UsageError(f"--slots {options.slots}: at least 1")
    if options.nodes and options.hostfile:
        raise UsageError("--nodes makes a hostfile of its own: give no --hostfile")
    return launch(options, trainer_flags)


if __name__ == "__main__":
    raise SystemExit(main())
