"""What a training says of itself: the block before it, the model, sample, curve and summary after it."""

from __future__ import annotations

import itertools
import json
import shutil
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.checkpoint.verification import write_whole
from trainer.data.chat import TEXT
from trainer.distributed import heartbeat
from trainer.distributed.communication_time import shares
from trainer.estimate import memory
from trainer.model import loading, lora
from trainer.results import samples
from trainer.results.console import duration, short

if TYPE_CHECKING:
    from trainer.training.session import Session

SHOWN = 1000  # characters at each end of the first example
TOLD_OF = 0.02  # share of the time that goes by in waiting for the slowest rank


def flops_per_token(session: Session) -> float:
    """Return the FLOP of a training step per token: 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B).

    N: parameters without the input embedding, L: layers, H Q: hidden size, T: sequence length. Of a frozen model's
    6 N, the 2 N for the gradients of its weights fall away.
    """
    config = session.model_config
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.hidden_size * session.sequence_length
    return (4.0 if session.options.lora else 6.0) * (session.parameters - embedding) + attention


def describe(session: Session) -> None:
    """Print what is about to be done."""
    o, facts, rows, ranks = session.options, session.data.facts, session.rows, session.ranks
    hosts = Counter(ranks.hosts)
    adapter = f", {short(session.trained)} of an adapter are trained (LoRA, rank {o.lora})" if o.lora else ""
    share = f"{short(rows.loss_tokens)} tokens that carry loss"
    if facts.form != TEXT:
        share = f"`{facts.form}`, {rows.loss_tokens / rows.tokens:.0%} of {short(rows.tokens)} tokens carry loss"
    batch = session.rows_a_step
    fill = rows.tokens / (rows.filled * session.sequence_length)
    packed = "padded" if o.no_packing else f"packed, {fill:.1%} full"
    held_out = f"{facts.eval_documents:,} documents" if not facts.eval_by_pieces else "pieces of few documents"
    dropped = f", {facts.dropped:,} empty ones left out" if facts.dropped else ""
    where = ", ".join(f"{host} x {count}" for host, count in hosts.items())
    session.console.block("lanspeed", {
        "model": f"{o.model_name_or_path}, {short(session.parameters)} parameters{adapter}",
        "data": f"{'streamed; the first ' if o.streaming else ''}{facts.documents:,} documents{dropped}, {share}",
        "rows": f"{rows.filled:,} of {session.sequence_length} tokens, {packed}; {facts.cut:,} documents cut",
        "evaluation": f"{held_out} held out" if len(session.data.evaluation) else "none",
        "world size": f"{ranks.world_size} ({where})",
        "batch": f"{batch} rows a step = {o.per_device_train_batch_size} micro x {o.gradient_accumulation_steps} "
                 f"accumulation x {ranks.world_size} ranks, {short(batch * rows.tokens / rows.filled)} tokens",
        "steps": f"{session.steps:,}" + (f", continuing after {session.resume_step:,}" if session.resume_step else ""),
        "precision": f"{session.precision} on {session.device}",
        "engine": session.engine,
        "run": f"{session.run.path}",
    })
    if o.lora and session.engine.endswith("ZeRO-3") and not ranks.on_one_machine:
        weight = 4 if session.precision == "fp32" else 2
        session.console.warn(
            f"ZeRO-3 sends each rank {lora.gathered_gigabytes(session.parameters, weight, ranks.world_size):.1f} GB of "
            "frozen weights at every micro step: trainer/configs/zero1.json sends the adapter's gradients alone")
    if shown := example(session):
        session.console.result("the first example as the model sees it; what stands between » and « carries loss:\n"
                               + textwrap.indent(shown.rstrip(), "  "))
    if session.spare_devices > 0 and ranks.world_size == 1:
        session.console.warn(f"{session.spare_devices} more GPUs are here: `invoke train` uses them all")


def example(session: Session) -> str:
    """Return the first example as the model sees it, what carries loss between » and «; "" for plain text."""
    if session.data.facts.form == TEXT:
        return ""
    piece, found = session.data.train[0], ""
    for learnt, group in itertools.groupby(zip(piece["input_ids"], piece["loss"], strict=True), lambda pair: pair[1]):
        text = session.tokenizer.decode([token for token, _ in group])
        found += f"»{text}«" if learnt else text
    return found if len(found) <= 2 * SHOWN else f"{found[:SHOWN]} [...] {found[-SHOWN:]}"


def run_facts(session: Session) -> dict[str, Any]:
    """Return what run.json says of the run."""
    hosts = Counter(session.ranks.hosts)
    return {"model": session.options.model_name_or_path, "dataset": session.data.facts.name,
            "data_key": session.data.facts.key, "hosts": list(hosts), "slots": dict(hosts),
            "world_size": session.ranks.world_size, "engine": session.engine, "precision": session.precision,
            "parameters": session.parameters, "trained_parameters": session.trained, "lora": session.options.lora,
            "steps": session.steps, "seed": session.options.seed, "memory": memory.described(session)}


def keep_ds_config(session: Session) -> None:
    """Write ds_config.json into the run folder as DeepSpeed got it, every "auto" filled."""
    if session.ds_config is not None and session.ranks.is_first:
        used = dict(session.trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
        used.pop("steps_per_print", None)  # infinity, set by accelerate; not JSON
        if session.universal:  # that form is gone by then
            used["checkpoint"] = {key: value for key, value in used["checkpoint"].items() if key != "load_universal"}
        write_whole(session.run.path / "ds_config.json", json.dumps(used, indent=2) + "\n")


def finish(session: Session) -> int:
    """Finish the run folder; return 0."""
    run, console, trainer, ranks = session.run, session.console, session.trainer, session.ranks
    step = trainer.state.global_step
    times = ranks.exchange("waiting", [session.waiting.waited_s, session.waiting.steps_s])
    waited = None
    if session.ds_config is not None:
        waited = shares([time[0] for time in times], [time[1] for time in times], ranks.hosts)
    if session.stop.stopped:
        if ranks.is_first:
            run.finish("stopped", 0, step=step, waiting=waited)
            run.draw_curve()
        console.result(f"stopped at step {step} of {session.steps}; saved {run.checkpoints}/checkpoint-{step}\n"
                       f"continue: the same command with --resume_from_checkpoint {run.path}")
        leave(session)
        return 0
    if len(session.data.evaluation) and last_evaluation(session)["step"] != step:
        trainer.evaluate()
    heartbeat.tell("saving the model")
    save_model(session)
    if not len(session.data.evaluation):  # else they came with it
        samples.write(session)
    if ranks.is_first and merges(session):
        heartbeat.tell("merging the adapter")
        whole = lora.merged(session)
        put_in_place(session, whole, run.model, type(whole).save_pretrained)
    if ranks.is_first:
        run.draw_curve()
        run.finish("finished", 0, step=step, waiting=waited, summary=summary(session))
        print_summary(session, waited)
    leave(session)
    return 0


def leave(session: Session) -> None:
    """Leave the process group together, so that no rank waits for one that has gone."""
    session.ranks.barrier()
    torch.distributed.destroy_process_group()


def evaluations(session: Session) -> list[dict[str, Any]]:
    """Return the evaluations so far, oldest first."""
    return [row for row in session.trainer.state.log_history if "eval_loss" in row]


def last_evaluation(session: Session) -> dict[str, Any]:
    """Return the newest evaluation, or {'step': None}."""
    return (evaluations(session) or [{"step": None}])[-1]


def save_model(session: Session) -> None:
    """Write model/ (or adapter/) on rank 0: weights as safetensors and the tokenizer, loadable by from_pretrained."""
    trainer, run = session.trainer, session.run
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # ZeRO-3 gathers: every rank takes part
    if session.ranks.is_first:
        model = trainer.accelerator.unwrap_model(trainer.model)
        write = lora.save_adapter if session.options.lora else type(model).save_pretrained
        put_in_place(session, model, run.adapter if merges(session) else run.model, partial(write, state_dict=state))


def put_in_place(session: Session, model: Any, place: Path, write: Callable[[Any, Path], None]) -> None:
    """Have a model and the tokenizer written, so that their folder is there whole or not at all."""
    scratch = session.run.path / "model.part"
    shutil.rmtree(scratch, ignore_errors=True)
    model.config.use_cache = True  # off for training; generation is slow without
    write(model, scratch)
    session.tokenizer.save_pretrained(scratch)
    shutil.rmtree(place, ignore_errors=True)
    scratch.replace(place)


def merges(session: Session) -> bool:
    """Tell whether an adapter is merged at the end: where asked for, and for tiny, whose base lies nowhere."""
    o = session.options
    return bool(o.lora) and (o.merge_lora or o.model_name_or_path == loading.TINY)


def summary(session: Session) -> dict[str, Any]:
    """Return the figures of the result, for run.json and the console."""
    rows = evaluations(session)
    losses = [row["loss"] for row in session.trainer.state.log_history if "loss" in row]
    found: dict[str, Any] = {"seconds": round(time.monotonic() - session.started, 1), "tokens": session.report.tokens,
                             "loss_first": losses[0] if losses else None, "loss_last": losses[-1] if losses else None}
    if rows:
        found |= {"eval_loss_first": rows[0]["eval_loss"], "eval_loss_last": rows[-1]["eval_loss"],
                  "bits_per_byte_first": rows[0].get("eval_bits_per_byte"),
                  "bits_per_byte_last": rows[-1].get("eval_bits_per_byte"),
                  "gzip_bits_per_byte": session.data.facts.gzip_bits_per_byte}
    return found


def print_summary(session: Session, waited: dict[str, Any] | None) -> None:
    """Print the result, what of the steps' time went by in waiting, and the paths that a person opens next."""
    found, say, run = summary(session), session.console.result, session.run
    say("")
    say(f"trained {session.trainer.state.global_step:,} steps, {short(found['tokens'])} tokens "
        f"in {duration(found['seconds'])}")
    if found["loss_last"] is not None:
        say(f"  training loss    {found['loss_first']:.3f} -> {found['loss_last']:.3f}")
    if "eval_loss_last" in found:
        say(f"  evaluation loss  {found['eval_loss_first']:.3f} -> {found['eval_loss_last']:.3f}")
    if found.get("bits_per_byte_last") is not None:
        gzip = found["gzip_bits_per_byte"]
        beside = f" (gzip -9 of the same text: {gzip:.2f})" if gzip else ""
        say(f"  bits per byte    {found['bits_per_byte_first']:.2f} -> {found['bits_per_byte_last']:.2f} "
            f"on text that was held out{beside}")
    if waited:
        ranks_here = session.ranks.on_one_machine
        slow = f", {waited['slowest']:.0%} for rank {waited['slowest_rank']} on {waited['slowest_host']}"
        what = "for the ranks' exchange" if ranks_here else "for the network"
        say(f"  waiting          {waited['network']:.0%} of the steps' time {what}"
            + (slow if waited["slowest"] >= TOLD_OF else ""))
    if run.sample.exists():
        say("\nhow it goes on after >>>, in text that was held out:\n")
        say(textwrap.indent(run.sample.read_text(encoding="utf-8").rstrip(), "  "))
    say(f"\nmodel   {run.model}\ncurve   {run.curve}\nsamples {run.samples}")
