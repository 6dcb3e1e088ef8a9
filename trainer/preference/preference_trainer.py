"""DPO by TRL's trainer, with this trainer's checkpoints, checks and counts (Rafailov et al., arXiv 2305.18290).

The model that training begins with is the reference: what it thinks of each answer is computed once, before step 1.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from trl import DPOTrainer
from trl.models.utils import prepare_deepspeed

from trainer.distributed import heartbeat
from trainer.errors import UserError
from trainer.steps.verified_trainer import VerifiedTrainer


class PreferenceTrainer(VerifiedTrainer, DPOTrainer):
    """TRL's DPOTrainer over several machines without a common disk."""

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)
        model: Any = self.model
        if "ref" in getattr(model, "peft_config", {}):  # TRL's copy of an adapter, which has served by now
            model.delete_adapter("ref")
        self._precompute_engine = None  # a second engine, which has served too

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Return a dataset as it is: its pairs are tokenized already."""
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: run.json says what was trained."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Return a dataset with the reference's log-probabilities of each answer, in every rank's memory.

        TRL keeps them in a file of rank 0, which other hosts don't see.
        """
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=self.data_collator))
        model: Any = self.model
        if self.is_deepspeed_enabled:
            self._precompute_engine = model = self._precompute_engine or prepare_deepspeed(model, self.accelerator)
        found: dict[str, list[torch.Tensor]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
        for number, batch in enumerate(loader, 1):
            heartbeat.report(f"reference log-probabilities ({name}), batch {number}/{len(loader)}", often=True)
            both = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch))
            for parts, values in zip(found.values(), both, strict=True):
                parts.append(values.float().cpu())
        for column, parts in found.items():
            dataset = dataset.add_column(column, np.asarray(torch.cat(parts)))
        return dataset

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: torch.Tensor | int | None = None) -> Any:
        """Return the mean loss of a micro batch's pairs; the first step's are noted for the check of gradients."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (self.gradients and self.gradients.pending and loss.requires_grad):  # an evaluation has none
            return loss
        pairs = torch.zeros(len(inputs["input_ids"]) // 2, dtype=torch.int64, device=loss.device)
        summed = loss * len(pairs)
        self.gradients.note_loss(summed, pairs)
        return summed / len(pairs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Count this rank's tokens, all and those of the answers."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.read_tokens += sum(int(batch["attention_mask"].sum()) for batch in batches)
        self.own_tokens += sum(int(batch["completion_mask"].sum()) for batch in batches)
        return batches, items

    def prediction_step(self, *arguments: Any, **more: Any) -> Any:
        """Do a batch of an evaluation."""
        heartbeat.report("evaluation", often=True)
        return super().prediction_step(*arguments, **more)

    def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
        """Return and log eval_loss, and of the rewards eval_rewards/accuracies, margins and others."""
        started, paused = time.monotonic(), self.paused_s
        self.check_finite()
        metrics: dict[str, float] = super().evaluate(*arguments, **more)
        if not math.isfinite(metrics["eval_loss"]):
            raise UserError(self.finite.explained("the evaluation loss", self.state.global_step,
                                                  Path(str(self.args.output_dir))), shared=True)
        self.paused_s = paused + time.monotonic() - started  # with the samples that came with it
        return metrics
