"""transformers' Trainer, made right for causal LMs over several machines.

It differs in this: the loss is that of all tokens divided by their number, over all ranks, in training
(`loss_trainer.py`) and evaluation; checkpoints are verified and rotated on every machine; SIGTERM stops all ranks at
the same step.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.checkpoint import copies, verification
from trainer.checkpoint.noted_faults import Faults, noted_faults, noting
from trainer.checkpoint.verification import Layout
from trainer.distributed import heartbeat
from trainer.distributed.ranks import Ranks
from trainer.distributed.shared_flag import SharedFlag
from trainer.distributed.signals import ASKING
from trainer.errors import UserError
from trainer.exchange.crossing import Crossing
from trainer.model import weights
from trainer.sequences import streaming
from trainer.sequences.packing import FILLER, PackedSequences
from trainer.sequences.streaming import Stream
from trainer.training.loss_trainer import LossTrainer


class CausalTrainer(LossTrainer):
    """A Trainer whose batches are `packing.PackedSequences`, evaluated by tokens, with verified checkpoints.

    `eval_sequences` are evaluated each time; `layout` is what a checkpoint must share with the training that continues
    it, `keep` the number of good checkpoints to keep, `copies` that of other hosts that get a copy of each host's part;
    `warn` tells what went wrong.
    """

    def __init__(
        self, *, ranks: Ranks, eval_sequences: PackedSequences, layout: Layout, keep: int, copies: int,
        warn: Callable[[str], None], **others: Any,
    ) -> None:
        super().__init__(eval_dataset=eval_sequences, **others)
        self._eval_sequences = eval_sequences
        self._ranks = ranks
        self._eval_bytes = eval_sequences.text_bytes()
        self._layout = layout
        self._keep, self._copies = keep, copies
        self._checkpoint_bytes = 0
        self._warn = warn
        self._faults: Faults = []  # what this rank could not write of the checkpoint at hand
        self.saved_step = 0  # of the last checkpoint that all ranks have whole
        self.paused_s = 0.0  # spent on evaluations and checkpoints
        self.measure: Callable[[], dict[str, float]] = dict
        self.crossing: Crossing | None = None  # between hosts, in few bits

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches of sequences; a stream is this rank's own already, and not to be shared out again."""
        if not isinstance(self.train_dataset, Stream):
            loader: Any = super().get_train_dataloader()
            inner = getattr(loader, "base_dataloader", loader)
            inner.worker_init_fn = partial(begin_data_worker, inner.worker_init_fn)
            return loader
        return DataLoader(self.train_dataset, self.args.per_device_train_batch_size, collate_fn=self.data_collator,
                          pin_memory=self.args.dataloader_pin_memory)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was measured since the last time, for whoever logs. Raises UserError if the loss isn't finite."""
        if "loss" in logs:
            self.check_finite()
            logs.update(self.measure())
        super().log(logs, start_time)

    def token_loss(self, sequences: PackedSequences) -> tuple[float, int]:
        """Return the summed loss in nats and the number of tokens that count, over all sequences and ranks.

        Every rank does as many batches of the same size as the others: ZeRO-3 gathers at each.
        """
        world, rank, done = self._ranks.world_size, self._ranks.rank, 0
        nats, tokens = 0.0, 0
        while done < len(sequences):
            heartbeat.report(f"evaluation, sequence {done + 1}/{len(sequences)}", often=True)
            size = min(self.args.per_device_train_batch_size, -(-(len(sequences) - done) // world))
            first = done + rank * size
            done += world * size
            chosen = [sequences[number] if number < len(sequences) else FILLER for number in range(first, first + size)]
            inputs = self.collate(chosen)
            tokens += len(inputs["trained"])
            nats += self.summed_nats(inputs)
        total_nats, total_tokens = self._ranks.all_reduce_sum(nats, tokens)
        return total_nats, int(total_tokens)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return and log eval_loss (nats per token), eval_perplexity and, where sizes are known, bits per byte."""
        started = time.monotonic()
        self.check_finite()
        self.settle()
        nats, tokens = self.token_loss(self._eval_sequences)
        self.paused_s += time.monotonic() - started
        loss = nats / max(tokens, 1)
        if not math.isfinite(loss):
            raise UserError(self.finite.explained("the evaluation loss", self.state.global_step,
                                                  Path(str(self.args.output_dir))), shared=True)
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700)), "eval_tokens": tokens}
        if self._eval_bytes:
            metrics["eval_bits_per_byte"] = nats / math.log(2) / self._eval_bytes
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def settle(self) -> None:
        """Make all hosts' weights the same, where each trains by itself between two averages."""
        if self.crossing:
            self.crossing.settle()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights of a checkpoint; the ranks that don't write hold no copy of them."""
        model = self.accelerator.unwrap_model(self.model)
        state = weights.to_save(self.model_wrapped, model, self.args.should_save)
        noting(self._faults, self._save)(output_dir, state_dict=state)

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
            if isinstance(self.train_dataset, Stream):
                a_step = self.args.gradient_accumulation_steps * self.args.per_device_train_batch_size
                read = self.state.global_step * a_step
                noting(self._faults, streaming.save)(self.train_dataset, read, folder, self._ranks.rank)
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


def begin_data_worker(seed: Callable[[int], None], number: int) -> None:
    """Leave requests to stop to the rank, which still wants batches then, and ends its workers itself."""
    for each in ASKING:
        signal.signal(each, signal.SIG_IGN)
    seed(number)


class StopOnSignal(TrainerCallback):
    """Save and stop all ranks at the same step once any of them was asked to."""

    def __init__(self, ranks: Ranks) -> None:
        self.flag = SharedFlag(ranks)
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Look at the shared flag once a step."""
        if self.flag.check() and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Finish the last reduction."""
        self.flag.close()
