"""transformers' Trainer with verified checkpoints on every machine, and a loss that must stay a number.

Whatever is trained: `training/causal_trainer.py` on text, `preference/preference_trainer.py` on pairs of answers.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from trainer.checkpoint import copies, verification
from trainer.checkpoint.noted_faults import Faults, noted_faults, noting
from trainer.checkpoint.verification import Layout
from trainer.distributed import heartbeat
from trainer.distributed.ranks import Ranks
from trainer.distributed.signals import ASKING
from trainer.exchange.coalescing import Coalescing
from trainer.exchange.crossing import Crossing
from trainer.model import lora, weights
from trainer.steps.finite import FiniteCheck, local_parts
from trainer.steps.gradient_check import GradientCheck


class VerifiedTrainer(Trainer):
    """A Trainer whose checkpoints are verified, and whose losses and gradients are finite.

    `layout` is what a checkpoint must share with the training that continues it, `keep` the number of good checkpoints
    to keep, `copies` that of other hosts that get a copy of each host's part; `warn` tells what went wrong.
    """

    def __init__(self, *, ranks: Ranks, finite: FiniteCheck, layout: Layout, keep: int, copies: int,
                 warn: Callable[[str], None], **others: Any) -> None:
        self._ranks, self.finite, self._layout = ranks, finite, layout
        self._keep, self._copies, self._warn = keep, copies, warn
        self._checkpoint_bytes = 0
        self._faults: Faults = []  # what this rank could not write of the checkpoint at hand
        self.saved_step = 0  # of the last checkpoint that all ranks have whole
        self.paused_s = 0.0  # spent on evaluations and checkpoints
        self.own_tokens = self.read_tokens = 0  # trained, and all that aren't padding
        self.own_by_source: torch.Tensor | int = 0  # of several datasets, of each
        self.measure: Callable[[], dict[str, Any]] = dict
        self.gradients: GradientCheck | None = None
        self.coalescing: Coalescing | None = None
        self.crossing: Crossing | None = None  # between hosts, in few bits
        super().__init__(**others)
        model: Any = self.model
        self.text_config = model.config.get_text_config()
        if self.accelerator.num_processes == 1 and not self.is_deepspeed_enabled:
            # else one rank, too, would be wrapped in DistributedDataParallel, whose buckets copy all gradients
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _build_accelerator_args(self, **more: Any) -> dict[str, Any]:
        """Return accelerate's arguments; gradients are views of the all-reduce's buckets, not copied into them."""
        found: dict[str, Any] = super()._build_accelerator_args(**more)
        for handler in found["kwargs_handlers"]:
            handler.gradient_as_bucket_view = True
        return found

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches, whose workers leave signals to the rank."""
        loader: Any = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(begin_data_worker, inner.worker_init_fn)
        return loader

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was measured since the last time, for whoever logs. Raises UserError if the loss isn't finite."""
        if "loss" in logs:
            self.check_finite()
            logs.update(self.measure())
        super().log(logs, start_time)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
                      ) -> torch.Tensor:
        """Do a micro step; note whether its loss is finite."""
        if self.coalescing:
            self.coalescing.begin()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.gradients and self.gradients.engine is None and self.accelerator.sync_gradients:
            self.gradients.compare()
        self.finite.note_loss(loss, self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradients' norm; note whether it is finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        skipped = self.is_deepspeed_enabled and self.accelerator.optimizer_step_was_skipped
        self.finite.note_gradients(norm, skipped, self.state.global_step + 1)
        return norm

    def check_finite(self, weights: bool = False) -> None:
        """Raise a UserError on all ranks if a loss so far, or one of the `weights` now, isn't finite."""
        model: Any = self.model
        self.finite.check(Path(str(self.args.output_dir)), local_parts(model) if weights else ())

    def settle(self) -> None:
        """Make all hosts' weights the same, where each trains by itself between two averages."""
        if self.crossing:
            self.crossing.settle()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights of a checkpoint; the ranks that don't write hold no copy of them."""
        state = self.to_save(self.args.should_save)
        noting(self._faults, self._save)(output_dir, state_dict=state)

    def to_save(self, writes: bool) -> dict[str, Any] | None:
        """Return the weights that this rank writes, None where it writes nothing; all ranks call it."""
        return weights.to_save(self.model_wrapped, self.accelerator.unwrap_model(self.model), writes)

    def idle_share(self) -> float:
        """Return the share of its time in which a rank that has some of the layers waits for others."""
        return 0.0

    def write_adapter(self, model: Any, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Write an adapter as it is loaded again."""
        lora.save_adapter(model, folder, state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, seal and rotate. Where that fails it is told; the training continues, and older checkpoints stay."""
        started = time.monotonic()
        self.settle()
        self.check_finite(weights=True)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        heartbeat.report(f"saving {folder.name}")
        fault = self._agree(folder, "room", self._lacking_room(folder)) or self._write(folder, model, trial)
        if fault:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            good = f"checkpoint-{self.saved_step} is intact" if self.saved_step else "there is no checkpoint yet"
            self._warn(f"{folder.name} could not be saved ({fault}); {good}; the training continues")
        else:
            self.saved_step = self.state.global_step
        heartbeat.report(f"{'lost' if fault else 'saved'} {folder.name}")
        self.paused_s += time.monotonic() - started

    def _write(self, folder: Path, model: Any, trial: Any) -> str | None:
        """Write a checkpoint on all ranks, and seal it if all could; return what was wrong anywhere."""
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # left half-written by an earlier run
        with noted_faults(self.model_wrapped) as self._faults:
            noting(self._faults, super()._save_checkpoint)(model, trial)
            self.save_more(folder)
            if self.crossing:
                noting(self._faults, self.crossing.save)(folder)
        self._ranks.barrier()
        if fault := self._agree(folder, "written", self._faults[0] if self._faults else None):
            return fault
        if self._copies and not self._layout.shards:  # else each host has all of the optimizer's states
            copies.spread(folder, self._ranks, self._copies, self._faults)
            self._ranks.barrier()
        if self.args.should_save and not self._faults:
            noting(self._faults, self._seal)(folder)
        fault = self._agree(folder, "sealed", self._faults[0] if self._faults else None)
        if self.args.should_save and not fault:
            rotate = noting(self._faults, verification.rotate)  # what can't be deleted stays
            rotate(folder.parent, self._keep, self.state.best_global_step)
        return fault

    def _agree(self, folder: Path, what: str, fault: str | None) -> str | None:
        """Return the first fault that any rank has, with its host; every rank calls it at the same place."""
        told = f"{self._ranks.host}: {folder.parent}: {fault}" if fault else None
        return next(filter(None, self._ranks.all_gather_json(f"{what}/{self.state.global_step}", told)), None)

    def _seal(self, folder: Path) -> None:
        self._name_latest(folder)
        verification.write_manifest(folder, self._layout)
        self._checkpoint_bytes = verification.folder_bytes(folder)

    def _name_latest(self, folder: Path) -> None:
        """Write the file by which DeepSpeed finds its part of a checkpoint."""
        tag = f"global_step{self.state.global_step}"
        if (folder / tag).is_dir() and not (folder / "latest").exists():
            verification.write_atomically(folder / "latest", tag)

    def _lacking_room(self, folder: Path) -> str | None:
        """Return why the disk here hasn't the room for another checkpoint, None if it has."""
        free = verification.free_bytes(folder)
        if not self.args.should_save or free >= self._checkpoint_bytes:
            return None
        return f"it takes {self._checkpoint_bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"

    def save_more(self, folder: Path) -> None:
        """Write what a checkpoint has beside weights, optimizer and exchange; `_faults` notes what can't be written."""


def begin_data_worker(seed: Callable[[int], None], number: int) -> None:
    """Leave requests to stop to the rank, which still wants batches then, and ends its workers itself."""
    for each in ASKING:
        signal.signal(each, signal.SIG_IGN)
    seed(number)
