"""One training from start to end, as `trainer/train.py` runs it: prepare, make the steps, finish.

The order matters: ranks meet, data is tokenized while nothing can time out, then the process group starts, then
the model is built; DeepSpeed's config must be known to transformers before a big model's weights are loaded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from trainer.checkpoint import verification
from trainer.checkpoint.verification import Layout
from trainer.data import dataset, python_docs
from trainer.data import streaming as streams
from trainer.data.packing import Collator, Rows
from trainer.distributed import deepspeed_config, devices, heartbeat
from trainer.distributed.communication_time import Waiting
from trainer.distributed.ranks import PREPARING_LIMIT_S, Ranks
from trainer.errors import Fault
from trainer.model import document_attention, from_config, loading, lora
from trainer.options import fill_defaults
from trainer.results import summary
from trainer.results.console import Console, quieten
from trainer.results.run_folder import RunFolder, find_run
from trainer.results.samples import Samples
from trainer.training.arguments import check_packages, compile_model, training_arguments
from trainer.training.causal_trainer import CausalTrainer, Stop
from trainer.training.preflight import FirstLook, check_world_sizes
from trainer.training.progress_report import Report
from trainer.training.resume import choose_checkpoint, fit_ranks

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Session:
    """The parts of one rank's training, in the order in which they come to be."""

    def __init__(
        self, options: argparse.Namespace, ranks: Ranks, console: Console, ds_config: dict[str, Any] | None
    ) -> None:
        self.options, self.ranks, self.console, self.ds_config = options, ranks, console, ds_config
        self.started = time.monotonic()
        self.began = False
        self.resume_step: int | None = None
        self.universal = False  # the checkpoint is in DeepSpeed's universal form

    # -- preparing ---------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Do everything up to the first step."""
        check_packages(self.options, self.ranks.is_first)
        lora.check(self.options, self.ds_config)
        self._meet()
        self.config = loading.load_config(self.options)
        if self.options.config_overrides:
            self.config = from_config.overridden(self.config, self.options.config_overrides)
        self._make_data(loading.choose_sequence_length(self.options, self.config))
        self._start_engine_libraries()
        self._open_run()
        self._build_trainer()
        self._check_room()
        summary.describe(self)

    def _meet(self) -> None:
        """Meet the other ranks; settle device, precision and batch sizes with them."""
        quieten()
        heartbeat.tell("meeting the other ranks")
        self.ranks.meet()
        facts = self.ranks.exchange("device", devices.device_facts())
        self.device = devices.common_device(facts, self.ranks.hosts)
        if self.device != "cpu":
            torch.accelerator.set_device_index(self.ranks.local_rank)
        deepspeed_config.set_environment(self.device == "cpu", self.ranks.local_world_size)
        if self.ds_config is not None:
            deepspeed_config.adopt_values(self.options, self.ds_config, self.ranks.world_size)
        fill_defaults(self.options)
        self.precision = devices.choose_precision(self.options.precision, facts)
        self.peak = devices.peak_flops(facts, self.precision)
        self.spare_devices = facts[self.ranks.rank]["count"] - self.ranks.local_world_size

    def _make_data(self, sequence_length: int) -> None:
        """Tokenize once a host; open the result on every rank; make sure that all hosts have the same."""
        options, ranks = self.options, self.ranks
        self.sequence_length = sequence_length
        if vocabulary := from_config.own_vocabulary(options, self.config):
            own = options.chat_template
            template = loading.read_template(Path(own)) if own else loading.TINY_TEMPLATE
            make: Callable[[Any], Any] = partial(loading.own_tokenizer, template=template, vocabulary=vocabulary)
            name = f"own {vocabulary} {template}"
        else:
            tokenizer = loading.load_tokenizer(options)
            name, make = loading.tokenizer_id(tokenizer), lambda texts: tokenizer
        if ranks.is_first_here:
            made = dataset.prepare_dataset(options, name, make, sequence_length, self._built_in, self.console.say)
            ranks.publish(f"data/{ranks.node}", str(made.folder))
        self.data = dataset.load_prepared(Path(ranks.ask(f"data/{ranks.node}")))
        self.tokenizer = loading.load_tokenizer(options, self.data.folder / "tokenizer")
        keys = ranks.exchange("data-key", self.data.facts.key, PREPARING_LIMIT_S)  # another host may be slower
        if len(set(keys)) > 1:
            odd = sorted({host for host, key in zip(ranks.hosts, keys, strict=True) if key != keys[0]})
            raise Fault(f"the dataset or tokenizer on {', '.join(odd)} differs from that on {ranks.hosts[0]}: "
                        "copy the same to every host", shared=True)

    def _built_in(self) -> list[str]:
        """Return Python's documentation as rank 0 has it: it differs between Python releases."""
        if self.ranks.is_first:
            texts = python_docs.python_documents()
            if not self.ranks.on_one_machine:
                self.ranks.publish("built-in", texts)
            return texts
        return self.ranks.ask("built-in")

    def _start_engine_libraries(self) -> None:
        """Start the process group, and keep DeepSpeed from compiling what this run doesn't need."""
        if self.ds_config is not None:
            operators = deepspeed_config.complete_config(self.ds_config, self.device == "cpu")
            for warning in deepspeed_config.check_compilation(operators) if self.ranks.is_first_here else ():
                self.console.warn(warning)
            if self.device == "cpu":
                deepspeed_config.skip_shared_memory_operator()
        heartbeat.tell("the first sum over all ranks")
        self.ranks.start_process_group(self.device)
        self.waiting = Waiting(self.device)
        if self.ds_config is not None:  # without DeepSpeed gradients go by another way
            self.waiting.install()
            deepspeed_config.adopt_process_group()

    def _open_run(self) -> None:
        """Agree on the run folder and on the checkpoint to continue from."""
        path = Path(self.ranks.exchange("run", str(find_run(self.options)))[0])
        self.run = RunFolder(path)
        self.engine = deepspeed_config.engine_name(self.ds_config)
        kind = "QLoRA" if self.options.qlora else "LoRA"
        adapter = f", {kind} of rank {self.options.lora}" if self.options.lora else ""
        self.layout = Layout(self.data.facts.key, self.ranks.world_size, self.engine + adapter, self.rows_a_step)
        self.checkpoint = choose_checkpoint(self.options, self.run, self.ranks, self.layout, self.console)
        self.resume_step = verification.step_of(self.checkpoint) if self.checkpoint else None
        self.console.keep_log(path / "logs")
        self.shared_disk = self._is_shared(path)
        if self.checkpoint:
            self.universal = fit_ranks(self.checkpoint, self.options, self.ds_config, self.ranks, self.console,
                                       self.writes)
            self.layout.batch = self.rows_a_step

    @property
    def rows_a_step(self) -> int:
        """Rows of all ranks in an optimizer step."""
        o = self.options
        return o.per_device_train_batch_size * o.gradient_accumulation_steps * self.ranks.world_size

    @property
    def writes(self) -> bool:
        """True for the rank that writes checkpoints' common files: one of each disk."""
        return self.ranks.is_first if self.shared_disk else self.ranks.is_first_here

    def _is_shared(self, path: Path) -> bool:
        """Tell whether all hosts see the same run folder: rank 0 leaves a file there, the others look for it."""
        mark = path / ".shared"
        if self.ranks.is_first:
            mark.touch()
        self.ranks.barrier()
        seen = self.ranks.total(mark.exists())[0] == self.ranks.world_size
        if self.ranks.is_first:
            mark.unlink()
        return seen

    def _build_trainer(self) -> None:
        """Make rows, arguments, model and Trainer; stop if the Trainer and DeepSpeed count different ranks."""
        options, ranks = self.options, self.ranks
        heartbeat.tell("loading the model")
        tiny = options.model_name_or_path == loading.TINY
        # A tiny model is built before transformers knows of ZeRO-3, so that its weights hang on the seed alone.
        model = loading.build_tiny(self.tokenizer, options.seed) if tiny else None
        arguments = training_arguments(self)
        check_world_sizes(ranks.world_size, arguments.world_size, engine=ranks.world_size)
        keep_16_bits = self.ds_config is not None  # DeepSpeed keeps 32-bit weights itself; plain PyTorch doesn't
        self.dtype = DTYPES[self.precision] if keep_16_bits else "float32"
        if options.from_config:
            model = from_config.build_model(options, self.config, self.tokenizer, self.dtype)
        elif model is None:
            here = "cpu" if self.device == "cpu" else f"{self.device}:{ranks.local_rank}"
            model = loading.load_model(options, DTYPES[self.precision], here) if options.qlora else \
                loading.load_model(options, self.dtype)
        self.model_config = model.config.get_text_config()
        self.parameters = model.num_parameters() if options.qlora else lora.trained(model)
        if document_attention.suits(model, options, self.device, self.sequence_length):
            document_attention.switch(model, document_attention.NAME)
        if options.lora:
            transformers.set_seed(options.seed)
            model = lora.add_adapter(model, options)
        self.trained = lora.trained(model)
        if options.torch_compile:
            compile_model(model, self.device, one_shape=not options.no_packing)
        capacity = None if options.no_packing else self.sequence_length
        self.rows = Rows(self.data.train, capacity, multiple_of=self.rows_a_step)
        eval_rows = Rows(self.data.evaluation, capacity)
        source = streams.open_stream(self, capacity) if options.streaming else self.rows
        self.stop = Stop(ranks)
        self.report = Report(ranks, self.run, self.console, summary.flops_per_token(self), self.peak)
        self.trainer = CausalTrainer(
            ranks=ranks, eval_rows=eval_rows, eval_bytes=self.data.facts.eval_bytes, layout=self.layout,
            keep=options.save_total_limit, collate=Collator(self.tokenizer.pad_token_id, capacity),
            model=model, args=arguments, train_dataset=source, processing_class=self.tokenizer,
            callbacks=[self.stop, self.report, self.waiting, FirstLook(self), Samples(self)])
        for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
            self.trainer.remove_callback(callback)
        micro_steps = len(self.rows) // (options.per_device_train_batch_size * ranks.world_size)
        epoch_steps = micro_steps // options.gradient_accumulation_steps
        self.steps = options.max_steps if options.max_steps > 0 else epoch_steps * options.num_epochs

    def _check_room(self) -> None:
        """Raise a Fault if a machine lacks the room for the checkpoints that will be there at once."""
        interval = self.options.save_steps or self.steps
        saves = self.steps / (interval if interval >= 1 else max(interval * self.steps, 1))
        together = min(self.options.save_total_limit + 1, int(saves) + 1)
        weight = 4 if self.precision == "fp32" or self.ds_config is None else 2
        one = verification.expected_bytes(self.trained, weight, self.ranks.local_world_size, self.ranks.world_size)
        needed, free = together * one + weight * self.parameters, verification.free_bytes(self.run.path)
        short = (f"{self.ranks.host}: {self.run.path} needs about {needed / 1e9:.1f} GB for {together} verification and "
                 f"the model, and {free / 1e9:.1f} GB are free: --save_total_limit 1, or another --output_dir")
        found = [text for text in self.ranks.exchange("room", short if free < needed else None) if text]
        if found:
            raise Fault(found[0], shared=True)

    # -- training and after --------------------------------------------------------------------------------------

    def run_steps(self) -> None:
        """Train."""
        self.began = True
        if self.ranks.is_first:
            self.run.start(summary.run_facts(self), self.resume_step)
        tokens = [row.get("tokens", 0) for row in self.run.read_metrics()] if self.resume_step else [0]
        self.report.watch(self.trainer, max(tokens, default=0))
        try:
            self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        finally:
            self.console.stop_bar()

    def finish(self) -> int:
        """Save the model, or after a request to stop say how to go on; return the exit code."""
        return summary.finish(self)

    def fail(self) -> None:
        """Say in run.json that the training failed, if it had begun."""
        if self.ranks.is_first and self.began:
            self.run.finish("failed", 1)
