"""Which kernels a training runs on: attention, fused element-wise work, the loss. Chosen before the engine is built,
tried with it, and told before the first step."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils.other import is_repeated_blocks

from trainer.errors import UserError
from trainer.model import document_attention, isolation, liger
from trainer.model.head_loss import HeadLoss, liger_kernel
from trainer.results.setup import Setup
from trainer.sequences.packing import Collator, PackedSequence
from trainer.training.causal_trainer import CausalTrainer

WORDS = {document_attention.DOCUMENTS: "document by document", document_attention.VARLEN: "torch's varlen kernel",
         document_attention.USUAL: "sdpa with a mask"}


def choose(model: Any, setup: Setup) -> bool:
    """Set the attention to try; return whether Liger's kernels will be used. All ranks choose the same.

    Raises UserError where --liger was given and can't be.
    """
    o, ranks = setup.options, setup.ranks
    own = document_attention.choose(model, o, setup.device, setup.precision, setup.flash, setup.sequence_length)
    if set(ranks.all_gather_json("attention", own)) == {own} != {None}:
        model.set_attn_implementation(own)
    # Measured in 16 bits on a card that is fast at them; elsewhere --liger asks for them.
    wanted = o.liger if o.liger is not None else setup.flash and setup.precision != "fp32"
    if not wanted:
        return False
    here = torch.device("cpu" if setup.device == "cpu" else f"{setup.device}:{ranks.local_rank}")
    problems = ranks.all_gather_json("liger", liger.problem(model, here))
    found = next((f"{host}: {text}" for host, text in zip(ranks.hosts, problems, strict=True) if text), None)
    if found and o.liger:
        raise UserError(f"--liger: {found}", shared=True)
    if found:
        setup.console.say(f"not the fastest way: {found}; --torch_compile fuses what it can")
    return found is None


class KernelTrial:
    """Tries the chosen kernels on the engine as it was built; all ranks must call the same, since ZeRO-3 gathers."""

    def __init__(self, trainer: CausalTrainer, vocabulary: int, precision: str) -> None:
        self._trainer, self._vocabulary, self._precision = trainer, vocabulary, precision

    def attention(self) -> None:
        """Go back to the usual attention if the chosen one gives other logits."""
        trainer = self._trainer
        document_attention.fall_back_unless_equal(trainer.model, trainer.attend_by, trainer.logits, self._vocabulary,
                                                  trainer.args.device, self._precision)

    def apply_liger(self) -> None:
        """Put Liger's kernels into the model. Raises UserError if its logits differ with them."""
        trainer: Any = self._trainer
        ids = isolation.samples(self._vocabulary, 2)[0].to(trainer.args.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        before = trainer.logits(ids, positions).float()
        liger.apply(getattr(trainer.model, "get_base_model", lambda: trainer.model)())
        change = isolation.difference(before, trainer.logits(ids, positions).float())
        if not change <= isolation.ALONE * isolation.TOLERANCE[self._precision]:
            raise UserError(f"Liger's kernels change this model's logits by {change:.1%}: train with --no_liger",
                            shared=True)
        if trainer.head_loss is not None:
            trainer.head_loss.kernel = liger_kernel()

    def loss(self) -> None:
        """Have the model make all logits if its loss at the head isn't that of them: where it changes them there."""
        trainer = self._trainer
        if trainer.head_loss is None:
            return
        documents = [each.numpy() for each in isolation.samples(self._vocabulary, 1).flatten(0, 1)]
        collate = Collator(0, None)  # rows as short as they can be
        collate.varlen = trainer.collate.varlen
        inputs = collate([PackedSequence(documents[:2]), PackedSequence(documents[2:])])
        try:
            found = trainer.summed_nats(inputs)
        except (ValueError, TypeError, RuntimeError):
            found = math.nan
        at_head, trainer.head_loss = trainer.head_loss, None
        expected = trainer.summed_nats(inputs)
        if abs(found - expected) <= isolation.TOLERANCE[self._precision] * abs(expected):
            trainer.head_loss = at_head
        else:
            at_head.remove()


def keep_residual(model: Any, setup: Setup) -> None:
    """With --bf16_residual have the embedding give bf16, which every layer then adds to.

    Raises UserError where nothing is computed in bf16.
    """
    if not setup.options.bf16_residual:
        return
    if setup.precision != "bf16":
        raise UserError(f"--bf16_residual: this training computes in {setup.precision}: --precision bf16", exit_code=2,
                        shared=True)
    model.get_input_embeddings().register_forward_hook(lambda module, given, found: found.to(torch.bfloat16))


def compile_layers(model: Any) -> None:
    """Have torch compile each layer of a model at its first step: equal layers are compiled once, in seconds."""
    repeated = is_repeated_blocks(model)
    for part in model.children():
        if repeated:
            part.compile()
        else:
            compile_layers(part)


def head_loss_of(model: Any) -> HeadLoss | None:
    """Return the loss at a model's head, None for a head that is no plain linear layer."""
    head = model.get_output_embeddings()
    return HeadLoss(head) if type(head) is torch.nn.Linear else None


def described(trainer: CausalTrainer, with_liger: bool, compiled: bool) -> str:
    """Return what runs, for a person: 'attention document by document, loss in chunks'."""
    model: Any = trainer.model
    attention = str(model.config._attn_implementation)
    loss = "of all logits" if trainer.head_loss is None else "by Liger's kernel" if with_liger else "in chunks"
    return f"attention {WORDS.get(attention, attention)}, loss {loss}" + (
        ", Liger's norms and layers" if with_liger else "") + (", layers compiled" if compiled else "")
