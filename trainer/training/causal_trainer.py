"""transformers' Trainer, made right for causal LMs over several machines.

It differs in this: the loss is that of all tokens divided by their number, over all ranks, in training
(`loss_trainer.py`) and evaluation; checkpoints are verified and rotated on every machine
(`steps/verified_trainer.py`); SIGTERM stops all ranks at the same step.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.checkpoint.noted_faults import noting
from trainer.distributed import heartbeat
from trainer.distributed.ranks import Ranks
from trainer.distributed.shared_flag import SharedFlag
from trainer.errors import UserError
from trainer.sequences import streaming
from trainer.sequences.packing import FILLER, PackedSequences
from trainer.sequences.streaming import Stream
from trainer.training.loss_trainer import LossTrainer


class CausalTrainer(LossTrainer):
    """A Trainer whose batches are `packing.PackedSequences`, evaluated by tokens, `eval_sequences` each time."""

    def __init__(self, *, eval_sequences: PackedSequences, **others: Any) -> None:
        super().__init__(eval_dataset=eval_sequences, **others)
        self._eval_sequences = eval_sequences
        self._eval_bytes = eval_sequences.text_bytes()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches of sequences; a stream is this rank's own already, and not to be shared out again."""
        if not isinstance(self.train_dataset, Stream):
            return super().get_train_dataloader()
        return DataLoader(self.train_dataset, self.args.per_device_train_batch_size, collate_fn=self.data_collator,
                          pin_memory=self.args.dataloader_pin_memory)

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

    def save_more(self, folder: Path) -> None:
        """Write where this rank is in its stream."""
        if isinstance(self.train_dataset, Stream):
            a_step = self.args.gradient_accumulation_steps * self.args.per_device_train_batch_size
            read = self.state.global_step * a_step
            noting(self._faults, streaming.save)(self.train_dataset, read, folder, self._ranks.rank)


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
