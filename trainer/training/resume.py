"""Which checkpoint to continue from: the newest that every machine has whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint import pickles, universal, verification
from trainer.checkpoint.verification import Layout
from trainer.distributed.ranks import PREPARING_LIMIT_S, Ranks
from trainer.errors import UserError
from trainer.exchange.hosts import Hosts
from trainer.options import Options
from trainer.results.console import Console
from trainer.results.run_folder import RunFolder
from trainer.results.setup import global_batch_size


def choose_checkpoint(
    options: Options, run: RunFolder, ranks: Ranks, layout: Layout, console: Console
) -> Path | None:
    """Return the checkpoint to continue from, or None to start from the beginning; damaged ones are reported and
    skipped.

    Raises UserError where nothing good is found though a path was named, where the checkpoint could run code or doesn't
    fit this training, and where a new run would write into the folder of an old one.
    """
    wanted = options.resume_from_checkpoint
    if not wanted:
        if any((folder / verification.MANIFEST).exists() for folder in verification.list_checkpoints(run.checkpoints)):
            raise UserError(f"{run.path} holds an earlier run: --resume_from_checkpoint auto continues it, another "
                            "--output_dir starts a new one", shared=True)
        return None
    named = Path(wanted) if Path(wanted).name.startswith("checkpoint-") else None
    views = ranks.all_gather_json("checkpoints", local_checkpoints(run, named) if ranks.is_first_here else None)
    folder = newest_common(views, ranks.hosts, run, console if ranks.is_first else None)
    if folder is None:
        if wanted != "auto":
            raise UserError(f"{named or run.checkpoints}: no valid checkpoint there", shared=True)
        console.say(f"no valid checkpoint in {run.checkpoints}: starting from the beginning")
        return None
    planted = pickles.find_planted(folder) if ranks.is_first_here else None
    if found := [text for text in ranks.all_gather_json("checkpoint-pickles", planted) if text]:
        raise UserError(found[0], shared=True)
    differs = verification.read_layout(folder).difference(layout) if ranks.is_first_here else None
    if found := [text for text in ranks.all_gather_json("checkpoint-layout", differs) if text]:
        raise UserError(f"{folder} {found[0]}", shared=True)
    return folder


def adapt_to_ranks(folder: Path, options: Options, config: dict[str, Any] | None, ranks: Ranks, console: Console,
                   writes: bool, hosts: Hosts | None) -> tuple[Options, bool]:
    """Make a checkpoint and the batch fit the ranks that are there now.

    Return the options with that batch, and whether the checkpoint is in universal form now.

    `config` is DeepSpeed's, which is changed; one rank of each disk `writes`; `hosts` that each have an engine. Raises
    UserError where parts of it are elsewhere, or the global batch can't be divided.
    """
    before = verification.read_layout(folder) if ranks.is_first_here else None
    told = ranks.all_gather_json("written-by", before and vars(before))
    written = Layout(**next(each for each in told if each))
    now = global_batch_size(options, ranks.world_size)
    if written.world_size != ranks.world_size or written.batch not in (0, now):
        options = adapt_batch(folder, written, options, config, ranks, console)
    sharing = len(hosts.here) if hosts else ranks.world_size  # an engine's ranks
    fits = before is None or before.parts == sharing
    if all(ranks.all_gather_json("fits", fits)):
        if hosts:
            stop_unless_complete(folder, before, ranks)
        return options, False
    stop_unless_complete(folder, before, ranks)
    split = any(ranks.all_gather_json("split", ranks.is_first_here and bool(universal.optimizer_shards(folder))))
    if config is not None and split:
        if options.optim not in universal.OPTIMIZERS:
            raise UserError(f"{folder} was written by {written.parts} ranks with --optim {options.optim}, whose states "
                            "can't be split anew: resume with as many", shared=True)
        if writes:
            universal.convert(folder)
        ranks.all_gather_json("universal", True, PREPARING_LIMIT_S)  # a large model's takes long
        config.setdefault("checkpoint", {})["load_universal"] = True
    return options, split


def adapt_batch(folder: Path, written: Layout, options: Options, config: dict[str, Any] | None, ranks: Ranks,
                console: Console) -> Options:
    """Return the options with the global batch that a checkpoint was written with, or the nearest that can be."""
    if options.streaming and written.world_size != ranks.world_size:
        raise UserError(f"{folder} was written by {written.world_size} ranks, each with a stream of its own: "
                        "resume with as many", shared=True)
    sharing = global_batch_size(options, ranks.world_size) // options.batch_per_rank  # ranks that each have a part
    options = universal.keep_global_batch(options, written.batch, sharing)
    if config is not None:
        universal.free_batch(config)
    same = written.world_size == ranks.world_size
    who = "resumes as before" if same else f"was written by {written.world_size} ranks, {ranks.world_size} resume it"
    batch = global_batch_size(options, ranks.world_size)
    kept = f"{batch} as before" if batch == written.batch else f"{batch} from now on, {written.batch} before"
    console.say(f"{folder.name} {who}: global batch {kept}, {options.per_device_train_batch_size} micro x "
                f"{options.gradient_accumulation_steps} accumulation")
    return options


def stop_unless_complete(folder: Path, written: Layout | None, ranks: Ranks) -> None:
    """Raise a UserError where a host lacks some of its checkpoint's parts; `written` is None but for its first rank."""
    lacking = universal.missing_shards(folder, written.parts) if written else None
    if found := [text for text in ranks.all_gather_json("parts", lacking) if text]:
        raise UserError(found[0], shared=True)


def local_checkpoints(run: RunFolder, named: Path | None) -> dict[str, Any]:
    """Return the good steps on this machine and what is wrong with the bad ones."""
    if named:
        damage = verification.find_damage(named)
        step = verification.step_of(named)
        return {"good": [] if damage else [step], "bad": {str(step): damage} if damage else {}}
    good, bad = verification.survey_checkpoints(run.checkpoints)
    return {"good": good, "bad": {str(step): text for step, text in bad.items()}}


def newest_common(
    views: list[dict[str, Any] | None], hosts: Sequence[str], run: RunFolder, console: Console | None
) -> Path | None:
    """Return the newest checkpoint that is good in every machine's view; name the newer ones that aren't."""
    looked = [(host, view) for host, view in zip(hosts, views, strict=True) if view]
    common = set.intersection(*(set(view["good"]) for _, view in looked))
    newest = max(common, default=None)
    for host, view in looked:
        for step, damage in view["bad"].items():
            if console and (newest is None or int(step) > newest):
                console.warn(f"{host}: {run.checkpoints}/checkpoint-{step} is {damage}; skipped")
        for step in view["good"]:
            if console and step not in common and step > (newest or 0):
                console.warn(f"{host}: checkpoint-{step} is valid only here; skipped")
    return run.checkpoints / f"checkpoint-{newest}" if newest is not None else None
