"""What is checked before the first step, with the engine built: the count of ranks, and packed documents kept apart."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from transformers import TrainerCallback

from trainer.checkpoint import universal
from trainer.distributed import deepspeed_config
from trainer.errors import UserError
from trainer.exchange import start
from trainer.exchange.coalescing import Coalescing
from trainer.model import document_attention, isolation
from trainer.results import model_folder
from trainer.results.setup import Setup
from trainer.steps.gradient_check import GradientCheck
from trainer.training import kernels, memory_report
from trainer.training.causal_trainer import CausalTrainer
from trainer.training.kernels import KernelTrial, compile_layers


class Preflight(TrainerCallback):
    """Before the first step, with the engine built: do ranks agree on their number, and documents stay apart?"""

    def __init__(self, setup: Setup, trainer: Any, with_liger: bool) -> None:
        self._setup, self._trainer, self._with_liger = setup, trainer, with_liger

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Raise a UserError if not; keep the config as DeepSpeed got it; tidy up what it was resumed from."""
        setup, trainer = self._setup, self._trainer
        model_folder.keep_ds_config(setup, trainer)
        if setup.ds_config is not None:
            deepspeed_config.keep_gradient_norm(trainer.model_wrapped)
        if setup.universal:  # loaded by now, on all ranks
            universal.separate_step_counts(trainer.model_wrapped)
            setup.ranks.barrier()
            if setup.checkpoint and setup.writes:
                universal.remove_universal(setup.checkpoint)
        engine_ranks = getattr(trainer.model_wrapped, "dp_world_size", setup.ranks.world_size)
        if setup.hosts:  # each has an engine of its own
            engine_ranks += setup.ranks.world_size - len(setup.hosts.here)
        check_world_sizes(setup.ranks.world_size, trainer.args.world_size, engine_ranks)
        running = f"DPO by TRL {version('trl')}" if setup.pairs else self._check_kernels()
        setup.console.say(running)
        if setup.ranks.is_first:
            setup.run.note(kernels=running)
        self._begin_crossing()
        if not setup.options.no_gradient_check:
            self._check_gradients()
        if memory_report.may_coalesce(setup):  # around the check, which looks at what was reduced
            trainer.coalescing = Coalescing(trainer.model_wrapped)
            setup.console.say("ZeRO-2's gradients cross once a step, not at every micro step: each rank has the memory")

    def _check_kernels(self) -> str:
        """Try the kernels, see that documents stay apart and nothing looks ahead; return what runs."""
        setup, trainer = self._setup, self._trainer
        device, rows = trainer.args.device, setup.options.per_device_train_batch_size
        vocabulary = min(len(setup.tokenizer), trainer.text_config.vocab_size)
        trial = KernelTrial(trainer, vocabulary, setup.precision)
        trial.attention()
        if self._with_liger:
            trial.apply_liger()
        trial.loss()
        isolation.check_causal(trainer.logits, vocabulary, device, rows, setup.precision)
        if not setup.options.no_packing:
            keep_documents_apart(setup, trainer, vocabulary)
        compiled = setup.options.torch_compile
        if compiled:
            compile_layers(trainer.model)
        return kernels.described(trainer, self._with_liger, compiled)

    def _begin_crossing(self) -> None:
        """Have gradients or weights cross between hosts in few bits, and clip as this training does."""
        setup, trainer = self._setup, self._trainer
        engine: Any = trainer.model_wrapped
        if hasattr(getattr(engine, "optimizer", None), "clip_grad"):  # else as the run did that wrote the checkpoint
            engine.optimizer.clip_grad = engine.gradient_clipping()
        if setup.hosts is None:
            return
        if setup.shared_disk and setup.hosts.number:  # every host's engine has the same to save, under the same names
            engine.save_non_zero_checkpoint = engine.save_zero_checkpoint = False
        trainer.crossing = start.crossing_of(engine, setup.hosts, setup.options)
        if setup.checkpoint and (told := trainer.crossing.load(setup.checkpoint, setup.ranks)):
            setup.console.say(told)

    def _check_gradients(self) -> None:
        """Have the first step's gradients checked."""
        setup, trainer = self._setup, self._trainer
        check = GradientCheck(trainer.model, setup.ranks.world_size, setup.precision,
                              trainer.model_wrapped if setup.ds_config is not None else None,
                              trainer.accelerator.scaler, crossing=trainer.crossing)
        trainer.gradients = check
        check.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Say and keep what the check of the gradients has found."""
        check = self._trainer.gradients
        if check is not None and check.error is not None:
            self._trainer.gradients = None
            self._setup.console.say(f"gradients checked against the sum of all ranks' own: {check.error:.0e}")
            if self._setup.ranks.is_first:
                self._setup.run.note(gradient_error=check.error)


def keep_documents_apart(setup: Setup, trainer: CausalTrainer, vocabulary: int) -> None:
    """Find a way to tell the model where documents begin; flash attention that nobody named gives way to another.

    Raises UserError where there is none.
    """
    options = setup.options
    rest = vocabulary, trainer.args.device, options.per_device_train_batch_size, setup.precision
    try:
        isolation.settle(trainer, *rest)
    except UserError:
        if trainer.way != "varlen" or options.attn_implementation:
            raise
        trainer.attend_by(document_attention.USUAL)
        isolation.settle(trainer, *rest)
        setup.console.say("flash attention lets this model's packed documents see each other: training with sdpa")


def check_world_sizes(launcher: int, transformers: int, engine: int) -> None:
    """Raise a UserError unless launcher, transformers and DeepSpeed count the same ranks.

    Otherwise batches are split by one number and gradients averaged by another, without a word.
    """
    if not launcher == transformers == engine:
        raise UserError(f"the launcher started {launcher} ranks, transformers counts {transformers}, DeepSpeed "
                        f"{engine}: ranks would train on the wrong part of the data. "
                        "Start with `invoke train` or `deepspeed`",
                        shared=True)
