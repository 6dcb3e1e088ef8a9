"""A training as it was asked for: which hosts, which program with which flags, and how it is supervised."""

from __future__ import annotations

import argparse
import difflib
import glob
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from master.core.paths import TRAINER
from master.core.run_cli import UsageError
from master.inventory.cluster_file import known_by_name
from master.inventory.hostfile import Slots
from master.run.command_record import flags_to_repeat, has_flag
from master.run.rank_environment import environment
from master.training.deepspeed_command import is_only_here, plain_command
from master.training.job import Supervision
from trainer.flags.dataset_words import name_and_weight
from trainer.flags.run_names import INSIDE

DATA_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet", ".gz")
PATHS = ("--adapter", "--eval_dataset", "--chat_template")  # the trainer's flags that may name what lies here
CONFIG_FLAGS = ("--deepspeed_config", "--deepspeed")  # of this project's trainer, and of others
MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
MOST_SENT = 1 << 20  # bytes of a config


@dataclass(frozen=True)
class Hosts:
    """Where to train: lines of a hostfile, and what cluster.json says of the hosts.

    `hostfile` is the path to show, None for this machine alone without one.
    """

    slots: tuple[Slots, ...]
    cluster: Mapping[str, Any]
    hostfile: Path | None

    @property
    def are_here(self) -> bool:
        """True if this machine is the only one."""
        return is_only_here(self.slots)

    @property
    def ranks(self) -> int:
        """Slots in use, each of which runs a rank."""
        return sum(len(host.use) for host in self.slots)

    @property
    def known(self) -> dict[str, Any]:
        """What cluster.json says of each host, by name."""
        return known_by_name(self.cluster)


@dataclass(frozen=True)
class TrainingRequest:
    """What each rank runs, where. `is_ours`: the script is trainer/train.py; `files`: what every host must have;
    `sent`: texts of small files, by their path here, that the hosts are sent; `is_module`: the script is one's name."""

    hosts: Hosts
    run: Path
    script: Path
    arguments: tuple[str, ...]
    files: tuple[str, ...]
    sent: Mapping[str, str]
    environment: Mapping[str, str]
    plain_command: str
    no_local_rank: bool
    is_module: bool
    master_port: int | None
    supervision: Supervision

    @property
    def is_ours(self) -> bool:
        """True for the trainer, False for a script of the user's."""
        return self.script == TRAINER


def request_of(options: argparse.Namespace, trainer_flags: Sequence[str], hosts: Hosts, run: Path, config: Path
               ) -> TrainingRequest:
    """Return what the flags ask for. Raises UsageError, RunError, ClusterError."""
    script, is_module = script_of(options.script)
    model = path_or_name("--model", options.model, hosts)
    trainer_flags, more = (list(trainer_flags), []) if options.script else with_whole_paths(trainer_flags, hosts)
    datasets = [str(path_or_name("--dataset", name, hosts)) + (f":{weight:g}" if weight else "")
                for name, weight in map(name_and_weight, options.dataset)]
    if options.script:
        arguments = list(trainer_flags)
    else:
        run, place = place_of_run(options, trainer_flags, run)
        arguments = [*arguments_of(options, run, model, datasets, config, trainer_flags),
                     *survival_flags(options, hosts), *trainer_flags, *place]
    sent = files_to_send(arguments, hosts)
    used = [*({str(config)} - set(sent)), model, *more, *(name_and_weight(word)[0] for word in datasets),
            options.script]
    return TrainingRequest(
        hosts=hosts, run=run, script=script, arguments=tuple(arguments),
        files=tuple(path for word in used if word and word != "tiny" for path in files_of(word)),
        sent=sent, environment=environment(hosts.slots[0].vendor, options.env),
        plain_command=plain_command(hosts.hostfile, hosts.slots, hosts.cluster,
                                    [options.script or shown(TRAINER), *arguments], options.no_local_rank,
                                    is_module),
        no_local_rank=options.no_local_rank, is_module=is_module, master_port=options.master_port,
        supervision=Supervision(options.grace, options.restarts, options.stall_timeout,
                                options.on_lost_master == "continue", options.patience, options.on_stall == "end",
                                options.min_hosts))


def script_of(word: str | None) -> tuple[Path, bool]:
    """Return the script that --script names (None: the trainer), and whether it is a module. Raises UsageError."""
    if not word or Path(word).is_file():
        return (Path(word).absolute() if word else TRAINER), False
    if MODULE.fullmatch(word) and not word.endswith(".py"):
        return Path(word), True
    raise UsageError(f"--script {word}: no such file, nor a module's name like trl.scripts.sft")


def on_hosts(request: TrainingRequest, slots: Sequence[Slots]) -> TrainingRequest:
    """Return the same training on other hosts. Raises ClusterError."""
    hosts = replace(request.hosts, slots=tuple(slots))
    script = shown(request.script) if request.is_ours else str(request.script)
    plain = plain_command(hosts.hostfile, hosts.slots, hosts.cluster, [script, *request.arguments],
                          request.no_local_rank, request.is_module)
    return replace(request, hosts=hosts, plain_command=plain)


def survival_flags(options: argparse.Namespace, hosts: Hosts) -> list[str]:
    """Return the trainer's flags by which a checkpoint outlives as many hosts as --min-hosts lets go.

    Raises UsageError where there aren't so many hosts.
    """
    spare = len(hosts.slots) - options.min_hosts if options.min_hosts else 0
    if spare < 0:
        raise UsageError(f"--min-hosts {options.min_hosts}: there {'is' if len(hosts.slots) == 1 else 'are'} only "
                         f"{len(hosts.slots)}")
    return ["--checkpoint_copies", str(spare), "--flexible_batch"] if spare > 0 else []


def files_of(word: str) -> list[str]:
    """Return what a path or pattern names here, as absolute paths; of many files the first hundred."""
    if Path(word).exists():
        return [str(Path(word).absolute())]
    return [os.path.abspath(path) for path in sorted(glob.glob(os.path.expanduser(word), recursive=True))[:100]]


def files_to_send(arguments: Sequence[str], hosts: Hosts) -> dict[str, str]:
    """Return the DeepSpeed config that is named among a script's flags, by its path, unless the hosts have it."""
    if hosts.are_here:
        return {}
    found = {word: Path(word) for flag, word in itertools.pairwise(arguments) if flag in CONFIG_FLAGS}
    own = TRAINER.parent  # whose files are code, and the same everywhere
    return {word: path.read_text(encoding="utf-8") for word, path in found.items()
            if path.is_file() and not path.absolute().is_relative_to(own) and path.stat().st_size <= MOST_SENT}


def path_or_name(flag: str, word: str | None, hosts: Hosts) -> str | None:
    """Return --model or --dataset as the ranks can use it: an absolute path if they may start in another folder.

    Raises UsageError for a path that is nowhere; other hosts may have an absolute one.
    """
    if not word or word == "tiny":
        return word
    if Path(word).expanduser().exists():
        return word if hosts.are_here else str(Path(word).absolute())
    if glob.glob(os.path.expanduser(word), recursive=True):
        return word if hosts.are_here else os.path.abspath(os.path.expanduser(word))
    if looks_like_path(word) and (hosts.are_here or not os.path.isabs(word)):
        beside = Path(word).parent
        near = difflib.get_close_matches(Path(word).name, os.listdir(beside) if beside.is_dir() else [], n=1)
        if beside.name and (beside / "run.json").exists() and Path(word).name in INSIDE:
            raise UsageError(f"{flag} {word}: that run has no {Path(word).name} yet: invoke train --resume {beside}")
        raise UsageError(f"{flag} {word}: no such file or folder"
                         + (f": did you mean {beside / near[0]}?" if near else ""))
    return word


def with_whole_paths(flags: Sequence[str], hosts: Hosts) -> tuple[list[str], list[str]]:
    """Return the trainer's flags with what lies here by its absolute path, where ranks may start in another folder, and
    those paths."""
    found, used = list(flags), []
    for number, word in enumerate(found):
        name, equals, value = word.partition("=")
        if name.replace("-", "_").replace("__", "--", 1) not in PATHS:
            continue
        place = number if equals else number + 1
        value = value if equals else "".join(found[place : place + 1])
        if value and Path(value).expanduser().exists():
            whole = value if hosts.are_here else str(Path(value).expanduser().absolute())
            found[place] = f"{name}={whole}" if equals else whole
            used.append(value)
    return found, used


def looks_like_path(word: str) -> bool:
    """Tell a path from a Hugging Face name, which has one slash at most, no wildcard and no suffix of a data file."""
    if word.endswith(DATA_SUFFIXES):
        return True
    return word.startswith((".", "/", "~")) or word.rstrip("/").count("/") > 1 or word.endswith("/") or any(
        mark in word for mark in "*?[")


def arguments_of(options: argparse.Namespace, run: Path, model: str | None, datasets: Sequence[str], config: Path,
                 trainer_flags: Sequence[str]) -> list[str]:
    """Return the trainer's flags, or, on --resume without a model, those that the run was started with.

    Raises CommandError.
    """
    data = ["--dataset_path", *datasets] if datasets else []
    engine = [] if has_flag(trainer_flags, "--split_layers") else ["--deepspeed", "--deepspeed_config", str(config)]
    if options.resume and not model:
        typed = [*data, *(engine if options.config else []), *trainer_flags]
        words = flags_to_repeat(run, typed, ask=not options.dry_run)
        lacks_config = "--deepspeed" in words and "--deepspeed_config" not in words
        return [*words, *data, *(engine if options.config or lacks_config else [])]
    return ["--model_name_or_path", str(model), *engine, *data]


def place_of_run(options: argparse.Namespace, trainer_flags: Sequence[str], run: Path) -> tuple[Path, list[str]]:
    """Return the run folder, and the flags that name it to the trainer unless the user's own flags do."""
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--output_dir", "--output-dir", type=Path)
    named.add_argument("--resume_from_checkpoint", "--resume-from-checkpoint")
    found, _ = named.parse_known_args(trainer_flags)
    if options.resume:
        return run, ["--output_dir", str(run), "--resume_from_checkpoint", str(run)]
    if found.output_dir:
        return found.output_dir, []
    if found.resume_from_checkpoint == "auto":  # the newest run of this model, as the trainer itself would find it
        runs = sorted(Path("runs").glob(f"*-{run.name.split('-', 2)[2]}/checkpoints"))
        newest = runs[-1].parent if runs else run
        return newest, ["--output_dir", str(newest)]
    if found.resume_from_checkpoint:
        path = Path(found.resume_from_checkpoint)
        return (path.parent.parent if path.name.startswith("checkpoint-") else path), []
    return run, ["--output_dir", str(run)]


def shown(path: Path) -> str:
    """Return a path as a person here would write it."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
