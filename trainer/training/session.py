"""One training from start to end, as `trainer/train.py` runs it: prepare, make the steps, finish.

The model is built last: DeepSpeed's config must be known to transformers before a big model's weights are loaded.
"""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
import transformers

from trainer.data import sources
from trainer.distributed import heartbeat
from trainer.distributed.communication_time import time_shares
from trainer.distributed.ranks import Ranks
from trainer.distributed.sent_bytes import SentBytes, card_of_ranks
from trainer.estimate.flops import flops_per_token
from trainer.exchange import host_engine, start_weights
from trainer.model import from_config, loading, lora
from trainer.options import Options
from trainer.results import export, samples, summary
from trainer.results.best_model import SaveBest
from trainer.results.console import Console
from trainer.results.disk_space import check_disk_space
from trainer.results.loss_curve import draw_curve
from trainer.results.samples import Samples
from trainer.results.setup import Setup, Workload
from trainer.results.traffic_report import traffic_of
from trainer.sequences import streaming
from trainer.sequences.packing import Collator, PackedSequences
from trainer.steps.evaluation import affordable_sequences
from trainer.steps.finite import FiniteCheck
from trainer.training import kernels, memory_report
from trainer.training.arguments import training_arguments
from trainer.training.causal_trainer import CausalTrainer, StopOnSignal
from trainer.training.preflight import Preflight, check_world_sizes
from trainer.training.preparation import prepare
from trainer.training.progress_report import ProgressReport

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Session:
    """One rank's training: `prepare`, `run_steps`, `finish`; whatever fails between, `fail`."""

    setup: Setup
    workload: Workload
    trainer: CausalTrainer

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
        check_disk_space(self.setup, self.workload, self.dtype_bytes)
        summary.describe(self.setup, self.workload)

    # -- the trainer -----------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> str:
        """The kind of the weights: DeepSpeed keeps 32-bit copies itself, plain PyTorch doesn't, of what is trained."""
        in_32_bits = self.setup.ds_config is None and not self.setup.options.lora
        return "float32" if in_32_bits else DTYPES[self.setup.precision]

    @property
    def dtype_bytes(self) -> int:
        """The bytes of a saved weight."""
        return 4 if self.dtype == "float32" else 2

    def _build_model(self) -> Any:
        """Return the model as it is before an adapter."""
        options, setup = self.setup.options, self.setup
        if options.from_config:
            return from_config.build_model(options, setup.config, setup.tokenizer, self.dtype, setup.flash)
        if options.qlora:
            here = "cpu" if setup.device == "cpu" else f"{setup.device}:{setup.ranks.local_rank}"
            return loading.load_model(options, DTYPES[setup.precision], setup.flash, here)
        return loading.load_model(options, self.dtype, setup.flash)

    def _build_trainer(self) -> None:
        """Make sequences, arguments, model and Trainer; stop if the Trainer and DeepSpeed count different ranks."""
        setup, options, ranks = self.setup, self.setup.options, self.setup.ranks
        heartbeat.report("loading the model")
        tiny = options.model_name_or_path == loading.TINY
        # A tiny model is built before transformers knows of ZeRO-3, so that its weights hang on the seed alone.
        model = loading.build_tiny(setup.tokenizer, options.seed) if tiny else None
        arguments = training_arguments(setup)
        check_world_sizes(ranks.world_size, arguments.world_size, engine=ranks.world_size)
        if model is None:
            model = self._build_model()
        resized = loading.resize(model, options, setup.tokenizer)
        if loading.freeze_other_senses(model):
            setup.console.say("what the model has for pictures or sound stays as it is")
        config = model.config.get_text_config()
        parameters = model.num_parameters() if options.qlora else lora.trained(model)
        active = lora.active_parameters(model, parameters)
        kernels.keep_residual(model, setup)
        with_liger, head_loss, share = kernels.choose(model, setup), kernels.head_loss_of(model), None
        if options.lora:
            transformers.set_seed(options.seed)
            model, share = lora.add_adapter(model, options, setup.engine.endswith("ZeRO-3"), resized)
        if setup.hosts and not start_weights.agree(model, ranks):
            setup.console.warn("the hosts had other weights to start with: those of rank 0 were sent to all")
        trained = lora.trained(model)
        capacity = None if options.no_packing else setup.sequence_length
        sequences = PackedSequences(setup.data.train, capacity, setup.global_batch_size, epoch=setup.data.epoch)
        micro_steps = len(sequences) // (options.per_device_train_batch_size * ranks.world_size)
        epoch_steps = micro_steps // options.gradient_accumulation_steps
        steps = options.max_steps if options.max_steps > 0 else epoch_steps * options.num_epochs
        most = affordable_sequences(options, steps, setup.global_batch_size)
        held_out = PackedSequences(setup.data.evaluation, capacity)
        evaluated = held_out.spread(most)
        self.workload = Workload(config, parameters, trained, sequences, steps, evaluated.filled, held_out.filled,
                                 with_liger, str(model.config._attn_implementation), share)
        self.stop = StopOnSignal(ranks)
        shape = setup.shape and replace(setup.shape, active=active)
        flops = flops_per_token(shape, setup.sequence_length, frozen=bool(options.lora)) if shape else None
        self._sent = SentBytes("" if ranks.on_one_machine else card_of_ranks())
        self._report = ProgressReport(ranks, setup.run, setup.console, flops, setup.peak, self._sent)
        self.trainer = CausalTrainer(
            ranks=ranks, eval_sequences=evaluated, layout=setup.layout, keep=options.save_total_limit,
            copies=options.checkpoint_copies, warn=setup.console.warn,
            finite=FiniteCheck(ranks, setup.precision, options.learning_rate),
            collate=Collator(setup.tokenizer.pad_token_id, capacity, len(setup.data.info.sources)), model=model,
            args=arguments,
            train_dataset=stream_of(setup, capacity) if options.streaming else sequences,
            processing_class=setup.tokenizer, callbacks=[self.stop, self._sent, self._report, self._communication])
        self.trainer.head_loss = head_loss
        for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
            self.trainer.remove_callback(callback)
        added: list[transformers.TrainerCallback] = [
            Preflight(setup, self.trainer, with_liger), Samples(setup, self.trainer)]
        if options.early_stopping:
            added += [SaveBest(), transformers.EarlyStoppingCallback(options.early_stopping)]
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
        if setup.ds_config is not None:
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
            setup.console.result(f"stopped at step {step} of {self.workload.steps}; {what}\n"
                                 f"continue: the same command with --resume_from_checkpoint {run.path}")
        else:
            self._save()
            if setup.ranks.is_first:
                draw_curve(run)
                found = summary.summary(setup, self.workload, self.trainer, time.monotonic() - self._started,
                                        self._report.tokens, self._report.by_dataset) | {
                                            "peak_bytes": peak, "computed_tokens_per_second": self._report.usual_rate()}
                traffic = traffic_of(setup, self.workload, self.trainer, self._sent.total, self._sent.steps)
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
        export.save_model(setup, trainer)
        if not setup.evaluates:  # else they came with it
            samples.write(setup, trainer)
        if setup.ranks.is_first and export.merges(setup.options):
            heartbeat.report("merging the adapter")
            whole = lora.merged(setup.options, setup.tokenizer, self.dtype, setup.run.adapter)
            export.put_in_place(setup, whole, setup.run.model, type(whole).save_pretrained)

    def fail(self) -> None:
        """Record in run.json that the training failed, if it had begun."""
        if self._began and self.setup.ranks.is_first:
            self.setup.run.finish("failed", 1)

    def out_of_memory(self) -> str:
        """Return what a person reads when this rank's memory has run out."""
        step = self.trainer.state.global_step if hasattr(self, "trainer") else 0
        setup, workload = getattr(self, "setup", None), getattr(self, "workload", None)
        return memory_report.explained(self._given[1], setup, workload, step)


def stream_of(setup: Setup, capacity: int | None) -> streaming.Stream:
    """Return this rank's stream of sequences, from its beginning or where the checkpoint was."""
    options, ranks, facts = setup.options, setup.ranks, setup.data.info
    source = sources.open_source(options.datasets[0].name, options, list)
    made = streaming.Stream(streaming.StreamSettings(
        source.after, facts.form, setup.tokenizer, setup.sequence_length, frozenset(facts.held_out), ranks.rank,
        ranks.world_size, options.seed), capacity)
    if setup.checkpoint:
        streaming.load(made, setup.checkpoint, ranks.rank)
    return made
