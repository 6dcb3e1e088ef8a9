"""The loss of a causal language model: of all trained tokens, divided by their number in all micro batches and ranks.

The same for every model, whatever it does with labels itself; packed documents are kept apart in its inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional

from trainer.model import document_attention
from trainer.model.head_loss import HeadLoss
from trainer.model.isolation import Way, document_mask
from trainer.sequences.packing import IGNORED, Collator, varlen_bounds
from trainer.steps.verified_trainer import VerifiedTrainer

COUNTS = ("tokens", "by_source")  # of a batch, which no model takes


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy in nats, summed over all labels that count: logits [..., n, :] predict label n + 1."""
    following = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]  # of the labels: a copy of the logits is large
    return functional.cross_entropy(logits.float().flatten(0, -2), following.flatten(), ignore_index=IGNORED,
                                    reduction="sum")


class LossTrainer(VerifiedTrainer):
    """A Trainer with one loss for every model, and inputs that tell the model where documents begin."""

    def __init__(self, *, collate: Collator, **others: Any) -> None:
        super().__init__(data_collator=collate, **others)
        self.collate = collate
        self.head_loss: HeadLoss | None = None
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # the Trainer counts, and doesn't divide
        self._note_attention()

    def _note_attention(self) -> None:
        model: Any = self.model
        bounds = any(name in str(model.config._attn_implementation) for name in document_attention.TOLD_BOUNDS)
        self.way = "varlen" if bounds else "positions"

    def attend_by(self, name: str) -> None:
        """Have the model attend by the implementation of this name."""
        model: Any = self.model
        model.set_attn_implementation(name)
        self._note_attention()

    @property
    def way(self) -> Way:
        """How the model is told where documents begin."""
        return self._way

    @way.setter
    def way(self, way: Way) -> None:
        self._way, self.collate.varlen = way, way == "varlen"

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move inputs to the device, and add there the mask of the documents where the model needs one."""
        inputs = super()._prepare_inputs(inputs)
        if self.way == "mask":
            inputs["attention_mask"] = document_mask(inputs["position_ids"])
        return inputs

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: torch.Tensor | int | None = None) -> Any:
        """Return the loss of all trained tokens, divided by their number in all micro batches and ranks."""
        labels = inputs["labels"]
        outputs, summed = self._outputs_and_sum(model, inputs)
        ranks, count = self.accelerator.num_processes, torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self.gradients and self.gradients.pending:
            self.gradients.note_loss(summed, labels)
        loss = summed * ranks / count  # ranks average their gradients
        if (router := getattr(outputs, "aux_loss", None)) is not None:
            weight = getattr(self.text_config, "router_aux_loss_coef", 0.0)
            loss = loss + weight * router / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _outputs_and_sum(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """Return a model's outputs for a micro batch, and the summed loss in nats: its head's own, or of all logits."""
        labels, trained = inputs.pop("labels"), inputs.pop("trained")
        if self.head_loss is None:
            outputs = model(**inputs)
            return outputs, summed_loss(outputs.logits, labels)
        with self.head_loss.of(labels, trained):
            outputs = model(**inputs)
        return outputs, outputs.logits.sum()

    def summed_nats(self, inputs: dict[str, Any]) -> float:
        """Return the summed loss of a batch without gradients; under ZeRO-3 all ranks must call it."""
        self.model_wrapped.eval()
        inputs = self._prepare_inputs({name: each for name, each in inputs.items() if name not in COUNTS})
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            return self._outputs_and_sum(partial(self.model_wrapped, use_cache=False), inputs)[1].item()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Count this rank's tokens, all and those that are trained, while they are still on the CPU."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.read_tokens += sum(int(batch.pop("tokens")) for batch in batches)
        self.own_by_source += sum(batch.pop("by_source", 0) for batch in batches)
        self.own_tokens += sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        return batches, items

    def logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [sequences, width, vocabulary] without gradients; under ZeRO-3 all ranks must call it."""
        self.model_wrapped.eval()
        bounds = varlen_bounds(position_ids.cpu()) if self.way == "varlen" else {}
        inputs = self._prepare_inputs({"input_ids": input_ids, "position_ids": position_ids, **bounds})
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            return self.model_wrapped(**inputs, use_cache=False).logits
