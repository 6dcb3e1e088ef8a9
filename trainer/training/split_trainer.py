"""The Trainer of a model whose layers are split over the ranks: one batch for all, gradients and states by stage.

Everything around a step is the Trainer's: schedule, clipping, logs, evaluations, stops. Checkpoints have the whole
model's names, so that any cuts, and any number of ranks, continue from them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file
from transformers.trainer import SCHEDULER_NAME

from trainer.checkpoint.noted_faults import noting
from trainer.distributed import heartbeat
from trainer.model import lora
from trainer.model.isolation import Way
from trainer.sequences.packing import FILLER, IGNORED, PackedSequences
from trainer.split import stage_files
from trainer.split.pipeline import Pipeline, Wire
from trainer.split.sharing import Named, gathered
from trainer.split.stage import Cut, Stage
from trainer.split.stage_files import Part
from trainer.training.causal_trainer import CausalTrainer
from trainer.training.loss_trainer import summed_loss


class SplitTrainer(CausalTrainer):
    """A CausalTrainer whose model is a stage. `micro_batches`: that a batch is cut into; `way`: how documents are told
    apart; `wire`: the dtypes of what is sent; `own`: what this stage saves of a model that is trained whole, None with
    an adapter.
    """

    def __init__(self, *, cut: Cut, micro_batches: int, way: Way, wire: Wire, own: Collection[str] | None,
                 **others: Any) -> None:
        self._cut, self._micro_batches, self._wire, self._own = cut, micro_batches, wire, own
        super().__init__(**others)
        self.way = way
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)  # no DDP
        self.accelerator.prepare_data_loader = self._prepare_data_loader
        self._pipeline: Pipeline | None = None
        self.steps_s = 0.0  # in passes forward and backward, with waiting
        if own is None:
            self._name_all_targets()

    def _name_all_targets(self) -> None:
        """Have the adapter's configuration name the layers of all stages, as it is saved."""
        model: Any = self.model
        for config in model.peft_config.values():
            told = self._ranks.all_gather_json("targets", sorted(config.target_modules))
            config.target_modules = {name for names in told for name in names}

    def _prepare_data_loader(self, loader: Any, *_: Any, **__: Any) -> Any:
        """Return batches as one process has them: every rank sees all of them."""
        of = self.accelerator
        return prepare_data_loader(loader, of.device, num_processes=1, process_index=0, put_on_device=True,
                                   rng_types=of.rng_types.copy(), even_batches=of.even_batches,
                                   use_seedable_sampler=of.use_seedable_sampler,
                                   data_seed=of.dataloader_config.data_seed)

    @property
    def pipeline(self) -> Pipeline:
        """The schedule, made at its first use: the Trainer has prepared the model by then."""
        if self._pipeline is None:
            self._pipeline = Pipeline(Stage(self.model, self._cut), self._summed, self._ranks.rank,
                                      self._ranks.world_size, self.args.device, self._micro_batches, self._wire)
        return self._pipeline

    def _summed(self, stage: Stage, hidden: torch.Tensor | None, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the summed loss of a micro batch, on the last rank."""
        labels = inputs.pop("labels")
        if self.head_loss is None:
            return summed_loss(stage(hidden, **inputs).logits, labels)
        trained = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero().flatten()
        with self.head_loss.of(labels, trained):
            return stage(hidden, **inputs).logits.sum()

    def _batch(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return what goes through the stages: tensors that are cut by rows."""
        prepared = self._prepare_inputs(inputs)
        return {name: prepared[name] for name in ("input_ids", "position_ids", "labels", "attention_mask")
                if name in prepared}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Count the tokens of a batch, which all ranks see, once."""
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._ranks.is_first:
            self.read_tokens = self.own_tokens = 0
            self.own_by_source = 0 * self.own_by_source
        return found

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Do a step's forward and backward passes; return its loss, on every rank."""
        model.train()
        batch, started = self._batch(inputs), time.monotonic()
        count = (batch["labels"] != IGNORED).sum().clamp(min=1)
        with self.compute_loss_context_manager():
            loss = self.pipeline.train(batch, count)
        dist.all_reduce(loss)
        self.steps_s += time.monotonic() - started
        self.finite.note_loss(loss, self.state.global_step + 1)
        return loss

    def token_loss(self, sequences: PackedSequences) -> tuple[float, int]:
        """Return the summed loss in nats and the number of tokens that count, over all sequences."""
        size, nats, tokens = self.args.per_device_train_batch_size, 0.0, 0
        self.model_wrapped.eval()
        for first in range(0, len(sequences), size):
            heartbeat.report(f"evaluation, sequence {first + 1}/{len(sequences)}", often=True)
            chosen = [sequences[number] if number < len(sequences) else FILLER for number in range(first, first + size)]
            batch = self._batch(self.collate(chosen))
            tokens += int((batch["labels"] != IGNORED).sum())
            with self.compute_loss_context_manager():
                nats += self.pipeline.evaluate(batch).item()
        return self._ranks.all_reduce_sum(nats)[0], tokens

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """Clip by the norm of all stages' gradients; return it."""
        parts = [weight.grad for weight in model.parameters() if weight.grad is not None]
        norms = torch._foreach_norm(parts)
        square = torch.stack([norm.double() for norm in norms]).square().sum()
        dist.all_reduce(square)
        total = square.sqrt().float()
        torch._foreach_mul_(parts, (self.args.max_grad_norm / (total + 1e-6)).clamp(max=1.0))
        return total

    def idle_share(self) -> float:
        """Return the share of the passes' time in which this rank computed nothing."""
        busy = self.pipeline.busy.seconds()
        return max(0.0, 1 - busy / self.steps_s) if self.steps_s else 0.0

    # -- what is saved: of an adapter all, by every host; of a whole model what the stage has ------------------------

    def trained(self) -> Named:
        """Return the weights of this stage that are trained, by the whole model's names."""
        return {name: weight for name, weight in self.accelerator.unwrap_model(self.model).named_parameters()
                if weight.requires_grad}

    def own_weights(self) -> Named:
        """Return what this stage saves of a model that is trained whole."""
        state = self.accelerator.unwrap_model(self.model).state_dict()
        return {name: value for name, value in state.items() if name in (self._own or ())}

    def weights_of(self, checkpoint: Path | None) -> Named:
        """Return what this stage has of a checkpoint's weights, None: as they are now; all ranks call it."""
        own = self.own_weights()
        return stage_files.fetched(checkpoint, stage_files.MODEL, own, self._ranks) if checkpoint else own

    def to_save(self, writes: bool) -> Named | None:
        """Return all stages' trained weights, None on ranks that write nothing; all ranks call it."""
        found = gathered(self.trained(), self._ranks, self.args.device)
        return found if writes else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint's weights, and what is read with them."""
        if self._own is None:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(str(output_dir))
        parts = stage_files.write_own(folder, stage_files.MODEL, self.own_weights(), self._ranks, self._faults)
        if self.args.should_save:
            noting(self._faults, self._write_about)(folder, parts)

    def _write_about(self, folder: Path, parts: Sequence[Part]) -> None:
        """Write the index of all stages' files, the configuration and the tokenizer."""
        stage_files.write_index(folder, parts)
        self.accelerator.unwrap_model(self.model).config.save_pretrained(folder)
        processing: Any = self.processing_class
        processing.save_pretrained(folder)

    def _save(self, output_dir: str | None = None, state_dict: Named | None = None) -> None:
        """Write what a checkpoint has of the model, with the adapter of all stages."""
        super()._save(output_dir, state_dict)
        if output_dir and state_dict:
            stage_files.write_adapter(Path(output_dir), state_dict)

    def write_adapter(self, model: Any, folder: Path, state_dict: Named | None) -> None:
        """Write the adapter of all stages as it is loaded again."""
        super().write_adapter(model, folder, state_dict)
        if state_dict:
            stage_files.write_adapter(folder, state_dict)

    @property
    def _states(self) -> Any:
        optimizer: Any = self.optimizer
        return optimizer.state

    @property
    def _groups(self) -> Any:
        optimizer: Any = self.optimizer
        return optimizer.param_groups

    @property
    def _scheduler(self) -> Any:
        return self.lr_scheduler

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the optimizer's states by the names of their weights, and the scheduler."""
        names, folder = {id(weight): name for name, weight in self.trained().items()}, Path(output_dir)
        own = {f"{names[id(weight)]}/{key}": torch.as_tensor(value)
               for weight, state in self._states.items() for key, value in state.items()}
        if self._own is not None:
            stage_files.write_own(folder, stage_files.OPTIMIZER, own, self._ranks, self._faults)
        else:
            found = gathered(own, self._ranks, self.args.device)
            if self.args.should_save:
                noting(self._faults, stage_files.write)(folder / f"{stage_files.OPTIMIZER}.safetensors", found)
        if self.args.should_save:
            noting(self._faults, torch.save)(self._scheduler.state_dict(), str(folder / SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read the states of this stage's weights, and the scheduler."""
        if checkpoint is None:
            return
        trained = self.trained()
        for name, value in stage_files.fetched(Path(checkpoint), stage_files.OPTIMIZER, trained, self._ranks).items():
            weight, _, key = name.rpartition("/")
            is_count = value.dim() == 0  # of steps: a number, or a tensor that torch keeps on the CPU
            self._states[trained[weight]][key] = value.to(trained[weight].device) if not is_count else \
                value if value.is_floating_point() else value.item()
        self._scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(self._groups, self._scheduler.get_last_lr(), strict=True):  # which the states don't say
            group["lr"] = rate

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read this stage's part of the model, or of an adapter."""
        folder = Path(resume_from_checkpoint)
        if self._own is None:
            found, weights = load_file(str(folder / lora.WEIGHTS)), self.trained()
            new = {name: found[stage_files.name_in_file(name)] for name in weights}
        else:
            new, weights = self.weights_of(folder), self.own_weights()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(new[name])
