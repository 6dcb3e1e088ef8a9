"""One training from start to end, as `trainer/train.py` runs it: prepare, make the steps, finish.

The model is built last: DeepSpeed's config must be known to transformers before a big model's weights are loaded.
"""

from __future__ import annotations

import gc
import os
import shlex
import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
import transformers

from trainer.distributed import heartbeat
from trainer.distributed.communication_time import time_shares
from trainer.distributed.ranks import Ranks
from trainer.distributed.sent_bytes import SentBytes, card_of_ranks
from trainer.exchange import host_engine
from trainer.model import lora
from trainer.options import Options
from trainer.results import model_folder, samples, summary
from trainer.results.best_model import SaveBest
from trainer.results.console import Console
from trainer.results.disk_space import check_disk_space
from trainer.results.likeness import differences
from trainer.results.loss_curve import draw_curve
from trainer.results.model_card import write_card
from trainer.results.samples import Samples
from trainer.results.setup import Setup, Workload
from trainer.results.traffic_report import traffic_of
from trainer.steps.verified_trainer import VerifiedTrainer
from trainer.training import memory_report
from trainer.training.building import build_model, dtype_of, flops_of, pair_trainer, text_trainer
from trainer.training.causal_trainer import StopOnSignal
from trainer.training.preflight import Preflight
from trainer.training.preparation import prepare
from trainer.training.progress_report import ProgressReport


class Session:
    """One rank's training: `prepare`, `run_steps`, `finish`; whatever fails between, `fail`."""

    setup: Setup
    workload: Workload
    trainer: VerifiedTrainer

    def __init__(
        self, options: Options, ranks: Ranks, console: Console, ds_config: dict[str, Any] | None
    ) -> None:
        self._given = options, ranks, console, ds_config
        self._started = time.monotonic()
        self._began = False

    def prepare(self) -> None:
        """Do everything up to the first step."""
        self.setup, self._communication = prepare(*self._given)
        self._build_trainer()
        check_disk_space(self.setup, self.workload, 4 if dtype_of(self.setup) == "float32" else 2)
        summary.describe(self.setup, self.workload)

    # -- the trainer -----------------------------------------------------------------------------------------------

    def _build_trainer(self) -> None:
        """Make the model and its Trainer."""
        setup, ranks = self.setup, self.setup.ranks
        built, arguments = build_model(setup)
        self.stop = StopOnSignal(ranks)
        self._sent = SentBytes("" if ranks.on_one_machine else card_of_ranks())
        self._report = ProgressReport(ranks, setup.run, setup.console, flops_of(setup, built), setup.peak, self._sent,
                                      bool(setup.options.logging_steps))
        make = pair_trainer if setup.pairs else text_trainer
        self.workload, self.trainer = make(setup, built, arguments,
                                           [self.stop, self._sent, self._report, self._communication])
        for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
            self.trainer.remove_callback(callback)
        added: list[transformers.TrainerCallback] = [
            Preflight(setup, self.trainer, built.liger), Samples(setup, self.trainer)]
        if setup.options.split_layers is not None:  # its family was tried in small; a stage alone can't speak
            added = []
        if patience := setup.options.early_stopping:
            added += [SaveBest(), transformers.EarlyStoppingCallback(patience)]
        for each in added:
            self.trainer.add_callback(each)

    # -- training and after ----------------------------------------------------------------------------------------

    def run_steps(self) -> None:
        """Train."""
        setup, workload = self.setup, self.workload
        self._began = True
        gc.collect()
        gc.freeze()  # else a step would wait now and then until model, data and libraries were looked through
        if setup.ranks.is_first:
            facts = summary.run_facts(setup, workload, memory_report.described(setup, workload))
            setup.run.start(facts, setup.resume_step)
            for line in differences(setup.run.record):
                setup.console.say(line)
        rows = [row for row in setup.run.read_metrics() if "tokens" in row] if setup.resume_step else []
        self._report.watch(self.trainer, rows[-1] if rows else {})
        hosts = setup.hosts
        of_host = host_engine.engine_of_host(hosts, clips=bool(setup.options.lan_average)) if hosts else nullcontext()
        try:
            with of_host:
                self.trainer.train(resume_from_checkpoint=str(setup.checkpoint) if setup.checkpoint else None)
            self.trainer.check_finite()
            self.trainer.settle()
        finally:
            setup.console.stop_bar()

    def finish(self) -> int:
        """Save the model, or after a request to stop print how to resume; return 0, 1 if nothing could be saved."""
        setup, run, step = self.setup, self.setup.run, self.trainer.state.global_step
        times = setup.ranks.all_gather_json("waiting", [self._communication.waited_s, self._communication.steps_s])
        waited = None
        if setup.options.split_layers is not None:
            idle = setup.ranks.all_gather_json("idle", self.trainer.idle_share())
            waited = (time_shares(idle, [1.0] * len(idle), setup.ranks.hosts) or {}) | {"idle": idle}
        elif setup.ds_config is not None:
            waited = time_shares([time[0] for time in times], [time[1] for time in times], setup.ranks.hosts)
        peak = memory_report.peak_bytes(setup)
        lost = self.stop.stopped and self.trainer.saved_step != step
        if setup.options.measure:
            setup.console.result(summary.speed_line(setup, self._report.usual_rate(), peak))
            run.forget()
        elif self.stop.stopped:
            if setup.ranks.is_first:
                run.finish("stopped", int(lost), step=step, waiting=waited)
                draw_curve(run)
            what = f"not saved: the last checkpoint is of step {self.trainer.saved_step or setup.resume_step or 0}" \
                if lost else f"saved {run.checkpoints}/checkpoint-{step}"
            again = f"invoke train --resume {shlex.quote(str(run.path))}" if "LANSPEED_PLAIN" in os.environ else \
                f"the same command with --resume_from_checkpoint {run.path}"  # without the launcher
            setup.console.result(f"stopped at step {step} of {self.workload.steps}; {what}\ncontinue: {again}")
        else:
            self._save()
            if setup.ranks.is_first:
                draw_curve(run)
                found = summary.summary(setup, self.workload, self.trainer, time.monotonic() - self._started,
                                        self._report.tokens, self._report.by_dataset) | {
                                            "peak_bytes": peak, "computed_tokens_per_second": self._report.usual_rate()}
                traffic = traffic_of(setup, self.workload, self.trainer, self._sent.total, self._sent.steps)
                write_card(setup, self.workload, found, step)
                run.finish("finished", 0, step=step, waiting=waited, summary=found,
                           traffic=asdict(traffic) if traffic else None)
                told = traffic.sentence(setup.ranks.host) if traffic else None
                summary.print_summary(setup, found, step, waited, told)
        setup.ranks.barrier()  # no rank waits for one that has exited
        torch.distributed.destroy_process_group()
        return int(lost)

    def _save(self) -> None:
        """Evaluate once more, where that is due; write the model and samples; merge an adapter."""
        setup, trainer = self.setup, self.trainer
        if setup.evaluates and summary.last_evaluation(trainer)["step"] != trainer.state.global_step:
            trainer.evaluate()
        heartbeat.report("saving the model")
        model_folder.save_model(setup, trainer)
        if not setup.evaluates and setup.options.split_layers is None:  # else they came with it
            samples.write(setup, trainer)
        if setup.ranks.is_first and model_folder.merges(setup.options):
            heartbeat.report("merging the adapter")
            whole = lora.merged(setup.options, setup.tokenizer, dtype_of(setup), setup.run.adapter)
            model_folder.put_in_place(setup, whole, setup.run.model, type(whole).save_pretrained)

    def fail(self) -> None:
        """Record in run.json that the training failed, if it had begun."""
        if self._began and self.setup.ranks.is_first:
            self.setup.run.finish("failed", 1)

    def out_of_memory(self) -> str:
        """Return what a person reads when this rank's memory has run out."""
        step = self.trainer.state.global_step if hasattr(self, "trainer") else 0
        setup, workload = getattr(self, "setup", None), getattr(self, "workload", None)
        return memory_report.explained(self._given[1], setup, workload, step)
