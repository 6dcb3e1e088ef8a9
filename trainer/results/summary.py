"""What a training says of itself: the block before it, run.json's facts, the summary after it."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections import Counter
from statistics import fmean
from typing import Any

from trainer.data.preferences import PAIR_COLUMNS
from trainer.data.rows import TEXT
from trainer.distributed import deepspeed_config
from trainer.estimate.memory import gigabytes
from trainer.model import lora
from trainer.results.console import duration, short
from trainer.results.setup import Setup, Workload
from trainer.sequences import mixture

ACCURACY = "eval_rewards/accuracies"
MEASURED = "@@STEPS "
FEW_TOKENS = 500
SHOWN = 1000  # characters at each end of the first example
MIN_WAIT_SHARE = 0.02  # share of the time that goes by in waiting for the slowest rank


def describe(setup: Setup, workload: Workload) -> None:
    """Print what is about to be done."""
    o, info, packed, ranks = setup.options, setup.data.info, workload.sequences, setup.ranks
    hosts = Counter(ranks.hosts)
    adapter = (f", {short(workload.trained)} of an adapter are trained (LoRA, rank {o.lora}, on "
               f"{workload.adapter_share:.0%} of the linear weights)" if o.lora else "")
    share = f"{short(packed.loss_tokens)} trained tokens"
    if info.form != TEXT:  # of pairs the answers are
        share = f"`{info.form}`, {packed.loss_tokens / packed.tokens:.0%} of {short(packed.tokens)} tokens are trained"
    batch, reason = setup.global_batch_size, f"; {setup.batch_reason}" if setup.batch_reason else ""
    layout = f"{packed.filled:,} of {setup.sequence_length} tokens, padded"
    if setup.pairs:
        layout = f"{packed.filled:,} pairs of up to {setup.sequence_length} tokens each, padded"
    elif not o.no_packing:
        layout = (f"{packed.filled:,} of {setup.sequence_length} tokens, packed, "
                  f"{packed.tokens / (packed.filled * setup.sequence_length):.1%} full")
    held_out = f"{info.eval_documents:,} documents" if not info.eval_by_pieces else "pieces of few documents"
    taken = "" if workload.evaluated == workload.held_out else (
        f"; each evaluation takes {workload.evaluated:,} of their {workload.held_out:,} sequences, the same each time "
        "(--eval_max_sequences)")
    dropped = f", {info.dropped:,} empty ones left out" if info.dropped else ""
    where = ", ".join(f"{host} x {count}" for host, count in hosts.items())
    several = {"mixture": mixture.described(setup.data.train, setup.data.epoch, names_of(setup))} \
        if len(info.sources) > 1 else {}
    method = {"method": f"DPO, beta {o.dpo_beta:g}, compared with the model as it is now"} if setup.pairs else {}
    setup.console.block("lanspeed", {
        "model": f"{o.model_name_or_path}, {short(workload.parameters)} parameters{adapter}",
        "data": f"{'streamed; the first ' if o.streaming else ''}{info.documents:,} documents{dropped}, {share}",
        **several,
        "sequences": layout + ("" if setup.pairs else f"; {info.cut:,} documents cut"),
        "evaluation": f"{held_out} held out{taken}" if len(setup.data.evaluation) else "none",
        "world size": f"{ranks.world_size} ({where})",
        "global batch": f"{batch} {'pairs' if setup.pairs else 'sequences'} = {o.per_device_train_batch_size} micro x "
                 f"{o.gradient_accumulation_steps} " + (
                     "micro batches" if workload.layers else f"accumulation x {ranks.world_size} ranks")
                 + f", {short(batch * packed.tokens / packed.filled)} tokens" + reason,
        **({"layers": workload.layers} if workload.layers else {}),
        "steps": f"{workload.steps:,}" + (f", resuming after {setup.resume_step:,}" if setup.resume_step else ""),
        "schedule": f"learning rate up to {o.learning_rate:g}, {schedule(setup, workload.steps)}",
        "precision": f"{setup.precision} on {setup.device}",
        "engine": setup.engine,
        **method,
        "run": f"{setup.run.path}",
    })
    if info.notes:
        setup.console.say("data: " + "; ".join(f"{what} ({count:,} rows)" if count else what
                                               for what, count in info.notes.items()))
    if o.lora and setup.engine.endswith("ZeRO-3") and not ranks.on_one_machine:
        weight = 4 if setup.precision == "fp32" else 2
        setup.console.warn(
            f"ZeRO-3 sends each rank {lora.gathered_gigabytes(workload.parameters, weight, ranks.world_size):.1f} GB "
            "of frozen weights at every micro step: trainer/configs/zero1.json sends the adapter's gradients alone")
    if packed.loss_tokens < FEW_TOKENS:
        setup.console.warn(f"only {packed.loss_tokens:,} trained tokens: no model learns from so few; is "
                           "--dataset_path the right one?")
    if shown := example(setup):
        setup.console.result("the first example as the model sees it; the tokens between » and « are trained:\n"
                             + textwrap.indent(shown.rstrip(), "  "))
    if setup.spare_devices > 0 and ranks.world_size == 1:
        setup.console.warn(f"{setup.spare_devices} more GPUs are here: `invoke train` uses them all")


def schedule_share(setup: Setup) -> float:
    """Return the share of the time that a rank waits where nothing but the schedule lets it: (S - 1) / (M + S - 1)."""
    others = setup.ranks.world_size - 1
    return others / (setup.options.gradient_accumulation_steps + others)


def names_of(setup: Setup) -> list[str]:
    """Return what the user calls the datasets."""
    return [part.name for part in setup.options.datasets]


def schedule(setup: Setup, steps: int) -> str:
    """Return how the learning rate changes, like 'cosine after 5 steps of warm-up'."""
    o = setup.options
    if o.lr_scheduler_type == deepspeed_config.OF_CONFIG:
        name = deepspeed_config.lookup(setup.ds_config or {}, "scheduler.type")
        return f"{name} of {o.deepspeed}"
    warmup = round(o.warmup_steps if o.warmup_steps >= 1 else o.warmup_steps * steps)
    return f"{o.lr_scheduler_type}" + (f" after {warmup:,} steps of warm-up" if warmup else "")


def example(setup: Setup) -> str:
    """Return the first example as the model sees it, what carries loss between » and «; "" for plain text."""
    if setup.data.info.form == TEXT:
        return ""
    piece, found = setup.data.train[0], ""
    if setup.pairs:
        prompt, chosen, rejected = (setup.tokenizer.decode(piece[name])[:SHOWN] for name in PAIR_COLUMNS)
        return f"{prompt}»{chosen}«\n  rather than\n{rejected}"
    for learnt, group in itertools.groupby(zip(piece["input_ids"], piece["loss_mask"], strict=True),
                                           lambda pair: pair[1]):
        text = setup.tokenizer.decode([token for token, _ in group])
        found += f"»{text}«" if learnt else text
    return found if len(found) <= 2 * SHOWN else f"{found[:SHOWN]} [...] {found[-SHOWN:]}"


def run_facts(setup: Setup, workload: Workload, memory: dict[str, Any] | None) -> dict[str, Any]:
    """Return what run.json says of the run."""
    hosts = Counter(setup.ranks.hosts)
    return {"model": setup.options.model_name_or_path, "dataset": setup.data.info.name,
            "data_key": setup.data.info.key, "hosts": list(hosts), "slots": dict(hosts),
            "world_size": setup.ranks.world_size, "engine": setup.engine, "precision": setup.precision,
            "parameters": workload.parameters, "trained_parameters": workload.trained, "lora": setup.options.lora,
            "steps": workload.steps, "seed": setup.options.seed, "memory": memory, "method": setup.options.method,
            "form": setup.data.info.form}


def evaluations(trainer: Any) -> list[dict[str, Any]]:
    """Return the evaluations so far, oldest first."""
    return [row for row in trainer.state.log_history if "eval_loss" in row]


def last_evaluation(trainer: Any) -> dict[str, Any]:
    """Return the newest evaluation, or {'step': None}."""
    return (evaluations(trainer) or [{"step": None}])[-1]


def summary(setup: Setup, workload: Workload, trainer: Any, seconds: float, tokens: int, by_dataset: list[int]
            ) -> dict[str, Any]:
    """Return the figures of the result, for run.json and the console."""
    rows = evaluations(trainer)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    tenth = -(-len(losses) // 10)  # single batches differ by more than a model learns
    found: dict[str, Any] = {"seconds": round(seconds, 1), "tokens": tokens,
                             "loss_first": fmean(losses[:tenth]) if losses else None,
                             "loss_last": fmean(losses[-tenth:]) if losses else None}
    if by_dataset:
        found["tokens_by_dataset"] = dict(zip(names_of(setup), by_dataset, strict=True))
    step = trainer.state.best_global_step  # of --early_stopping; a checkpoint that couldn't be saved is none
    if step and (step == trainer.state.global_step or (setup.run.checkpoints / f"checkpoint-{step}").is_dir()):
        found |= {"best_step": step, "best_eval_loss": trainer.state.best_metric,
                  "stopped_early": trainer.state.global_step < workload.steps}
    if rows:
        found |= {"eval_loss_first": rows[0]["eval_loss"], "eval_loss_last": rows[-1]["eval_loss"],
                  "bits_per_byte_first": rows[0].get("eval_bits_per_byte"),
                  "bits_per_byte_last": rows[-1].get("eval_bits_per_byte"),
                  "eval_sequences": workload.evaluated, "held_out_sequences": workload.held_out,
                  "gzip_bits_per_byte": setup.data.info.gzip_bits_per_byte}
    if ACCURACY in (rows or [{}])[0]:
        found["accuracy"] = rows[-1][ACCURACY]  # the first one is 0: nothing has been learnt
    return found


def speed_line(setup: Setup, rate: float | None, peak: int) -> str:
    """Return what --measure tells, as the one line that `invoke plan --measure` reads."""
    o = setup.options
    return MEASURED + json.dumps({
        "tokens_per_second": rate, "ranks": setup.ranks.world_size, "micro": o.per_device_train_batch_size,
        "accumulation": o.gradient_accumulation_steps, "checkpoints": o.activation_checkpointing,
        "sequence": setup.sequence_length, "peak_bytes": peak})


def print_summary(setup: Setup, found: dict[str, Any], step: int, waited: dict[str, Any] | None,
                  traffic: str | None = None) -> None:
    """Print the result, what of the steps' time went by in waiting, what was sent, and the paths to open next."""
    say, run = setup.console.result, setup.run
    part = found.get("eval_sequences") != found.get("held_out_sequences")
    say("")
    say(f"trained {step:,} steps, {short(found['tokens'])} tokens "
        f"in {duration(found['seconds'])}")
    if found["loss_last"] is not None:
        say(f"  training loss    {found['loss_first']:.3f} -> {found['loss_last']:.3f} "
            "(means of the first and last tenth)")
    if "eval_loss_last" in found:
        say(f"  evaluation loss  {found['eval_loss_first']:.3f} -> {found['eval_loss_last']:.3f}"
            + (f" ({found['eval_sequences']:,} of {found['held_out_sequences']:,} held-out sequences)" if part else ""))
    if "accuracy" in found:
        say(f"  accuracy         {found['accuracy']:.0%} of the held-out pairs: the better answer has gained more")
    if "best_step" in found:
        say(f"  lowest           {found['best_eval_loss']:.3f} at step {found['best_step']:,}, whose weights are in "
            f"{run.model.name}/" + (f"; no lower one in {setup.options.early_stopping} evaluations ended the training"
                                    if found["stopped_early"] else ""))
    if by_dataset := found.get("tokens_by_dataset"):
        once = mixture.columns_of(setup.data.train, len(by_dataset))[2]
        say("  datasets         " + ", ".join(
            f"{name} {short(tokens)} tokens ({tokens / max(sum(by_dataset.values()), 1):.1%}, read {tokens / size:.1f} "
            "times)" for (name, tokens), size in zip(by_dataset.items(), once, strict=True)))
    if found.get("bits_per_byte_last") is not None:
        gzip = found["gzip_bits_per_byte"]
        beside = f" (gzip -9 of {'all of it' if part else 'the same text'}: {gzip:.2f})" if gzip else ""
        say(f"  bits per byte    {found['bits_per_byte_first']:.2f} -> {found['bits_per_byte_last']:.2f} "
            f"on held-out text{beside}")
    where = "of a rank" if setup.device == "cpu" else f"of {setup.memory / 1e9:.0f} GB on a GPU"
    say(f"  peak memory      {gigabytes(found['peak_bytes'])} GB {where}")
    if waited and "idle" in waited:
        own = schedule_share(setup)
        idle = ", ".join(f"{share:.0%}" for share in waited["idle"])
        say(f"  idle             {idle} of the ranks' time; the schedule's part, {own:.0%}, falls with more micro "
            "batches")
    elif waited:
        ranks_here = setup.ranks.on_one_machine
        slow = f", {waited['slowest']:.0%} for rank {waited['slowest_rank']} on {waited['slowest_host']}"
        what = "for communication" if ranks_here else "for the network"
        say(f"  waiting          {waited['network']:.0%} of the steps' time {what}"
            + (slow if waited["slowest"] >= MIN_WAIT_SHARE else ""))
    if traffic:
        say(f"  network          {traffic}")
    if run.sample.exists():
        say(f"\nthe model's continuation after >>>, in {'held-out' if setup.evaluates else 'training'} text:\n")
        say(textwrap.indent(run.sample.read_text(encoding="utf-8").rstrip(), "  "))
    samples = f"\nsamples {run.samples}" if run.samples.exists() else ""
    say(f"\nmodel   {run.model}\ncurve   {run.curve}{samples}")
