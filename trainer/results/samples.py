"""What the model says as it learns: held-out documents continued at each evaluation, in the run's samples/.

    cat runs/*/samples/*     # the model learning; sample.txt is the last of them
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from trainer.checkpoint.verification import write_atomically
from trainer.distributed import heartbeat
from trainer.model import document_attention, loading
from trainer.results.console import clean
from trainer.results.setup import Setup

PROMPT_TOKENS = 16
NEW_TOKENS = 60


class Samples(TrainerCallback):
    """Writes samples/step-<step>.txt at each evaluation."""

    def __init__(self, setup: Setup, trainer: Any) -> None:
        self._setup, self._trainer = setup, trainer

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Have the model speak; it counts as a pause."""
        started = time.monotonic()
        try:
            write(self._setup, self._trainer)
        except OSError as error:  # a full disk ends no training
            self._setup.console.warn(f"samples can't be written ({error.strerror}); the training continues")
        self._setup.ranks.barrier()  # else the others' waiting would count as the network's
        self._trainer.paused_s += time.monotonic() - started


def write(setup: Setup, trainer: Any) -> None:
    """Write the samples of this step, and sample.txt; on ZeRO-3 all ranks generate together."""
    if not setup.options.num_samples or not (setup.ranks.is_first or setup.engine.endswith("ZeRO-3")):
        return
    step = trainer.state.global_step
    heartbeat.report(f"writing samples of step {step}")
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    made = list(continuations(model, setup.tokenizer, prompts(setup), setup.options.seed))
    if setup.ranks.is_first:
        text = clean("\n".join(f"[{number}] {prompt.strip()} >>>{said.rstrip()}\n"
                               for number, (prompt, said) in enumerate(made, 1)))
        setup.run.samples.mkdir(exist_ok=True)
        write_atomically(setup.run.samples / f"step-{step:07d}.txt", f"after {step} steps\n\n{text}\n")
        write_atomically(setup.run.sample, text)


def prompts(setup: Setup) -> list[list[int]]:
    """Return the first tokens of a few held-out documents, or of training documents where none is held out."""
    pieces = setup.data.evaluation if len(setup.data.evaluation) else setup.data.train
    found: list[list[int]] = []
    room = setup.sequence_length // 2  # for what the model says
    for piece in pieces:
        if len(found) == setup.options.num_samples:
            break
        if "prompt_ids" in piece:
            if len(piece["prompt_ids"]) <= room:
                found.append(piece["prompt_ids"])
        elif "loss_mask" in piece:
            asked = piece["loss_mask"].index(1)  # up to where the assistant begins to speak
            if asked <= room:
                found.append(piece["input_ids"][:asked])
        elif piece["length"] >= 2 * PROMPT_TOKENS:
            found.append(piece["input_ids"][:PROMPT_TOKENS])
    first = pieces[0]["prompt_ids" if setup.pairs else "input_ids"][:1]
    return found or [first][: setup.options.num_samples]


def continuations(model: Any, tokenizer: Any, asked: list[list[int]], seed: int) -> Iterator[tuple[str, str]]:
    """Yield (prompt, continuation) for each prompt (token ids), sampled with the seed; training's own is left alone.

    Under ZeRO-3 every rank must take part, with the same prompts.
    """
    limit = loading.position_limit(model.config)
    settings = GenerationConfig(
        do_sample=True, temperature=0.8, top_k=40, use_cache=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    was_training = model.training
    model.eval()
    here = [model.device.index or 0] if model.device.type == "cuda" else []
    eager = torch.compiler.set_stance("force_eager")  # each length would be compiled anew
    with torch.random.fork_rng(here), torch.no_grad(), eager, document_attention.original_attention(model):
        torch.manual_seed(seed)
        for prompt in asked:
            ids = torch.tensor([prompt], device=next(model.parameters()).device)
            settings.max_new_tokens = max(1, min(NEW_TOKENS, limit - len(prompt)))  # no further than it has positions
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings,
                                    synced_gpus=is_deepspeed_zero3_enabled())
            said = tokenizer.decode(output[0, len(prompt):], skip_special_tokens=True)
            yield tokenizer.decode(prompt, skip_special_tokens=True), said
    model.train(was_training)
