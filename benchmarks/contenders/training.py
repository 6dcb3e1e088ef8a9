"""A course, the same model and documents for all, with a clock; ours on it. The peers are in peers.py."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLIP = 1.0
UNCOUNTED = 5  # first steps of the steady rate, in which memory is got and caches fill


@dataclass(frozen=True)
class Course:
    """What all train: the model and the documents of a folder, so many rows of so many tokens a step, on a device."""

    folder: Path
    row: int = 1024
    rows: int = 2
    rate: float = 3e-3
    warmup: int = 20
    device: str = "cpu"


class Enough(Exception):
    """A peer has seen its tokens."""


class Clock:
    """Counts steps: when each ended, the process' CPU seconds by then, and the useful tokens of each.

    It ends after `tokens`, or, where those are 0, after `steps`; rates are of so many steps at most.
    """

    def __init__(self, steps: int, tokens: int, seed: int) -> None:
        self._steps, self._wanted, self.seed = steps, tokens, seed
        self.tokens: list[int] = []  # of each batch that was made; one may be ahead of the steps
        self.marks: list[tuple[float, float]] = []
        self.began: tuple[float, float] | None = None  # when the first step did

    def begin(self) -> None:
        """Note the beginning of a step."""
        self.began = self.began or self.now()

    def now(self) -> tuple[float, float]:
        """Return the time, and the process' CPU seconds; what the device was given is done by then."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def counting(self, collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        """Return a collator that has its labels counted."""
        def counted(rows: Any) -> dict[str, Any]:
            batch = collate(rows)
            self.tokens.append(int((batch["labels"][:, 1:] != -100).sum()))
            return batch

        return counted

    def step(self) -> bool:
        """Note the end of a step; return whether it was the last."""
        self.marks.append(self.now())
        done = len(self.marks)
        return sum(self.tokens[:done]) >= self._wanted if self._wanted else done >= self._steps

    def rates(self) -> dict[str, float]:
        """Return useful tokens per second of the steady steps (wall, cpu), CPU seconds before the first step (startup),
        useful tokens per CPU second of all of it (whole), and tokens per step (step).
        """
        first, last = UNCOUNTED - 1, min(self._steps, len(self.marks)) - 1
        tokens = sum(self.tokens[UNCOUNTED : last + 1])
        wall, cpu = (self.marks[last][kind] - self.marks[first][kind] for kind in (0, 1))
        return {"wall": tokens / wall, "cpu": tokens / cpu, "startup": (self.began or self.marks[0])[1],
                "whole": sum(self.tokens[: last + 1]) / self.marks[last][1], "step": tokens / (last - first)}


def load(course: Course, **more: Any) -> tuple[Any, Any]:
    """Return tokenizer and model, its weights in 32 bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (AutoTokenizer.from_pretrained(course.folder / "model"),
            AutoModelForCausalLM.from_pretrained(course.folder / "model", use_cache=False, dtype=torch.float32, **more))


def texts_of(folder: Path, name: str) -> list[str]:
    """Return the documents of a file."""
    return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def loss_of(model: Any, course: Course) -> float:
    """Return the loss a token of the held-out documents, whole, each by itself; of long ones row by row."""
    import torch
    from transformers import AutoTokenizer

    from trainer.data.tokenization import cut_document

    tokenizer = AutoTokenizer.from_pretrained(course.folder / "model")
    model.eval()
    nats, count = 0.0, 0
    with torch.no_grad(), torch.autocast(course.device, torch.bfloat16, enabled=course.device != "cpu"):
        for text in texts_of(course.folder, "eval"):
            whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            for start, end in cut_document(len(whole), course.row):
                ids = torch.tensor([whole[start:end]], device=course.device)
                positions = torch.arange(end - start, device=course.device)[None]
                logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, :-1]
                nats += torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
                count += end - start - 1
    return nats / count


def callback(clock: Clock) -> Any:
    """Return the clock as transformers' Trainer wants it."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if clock.step():
                control.should_training_stop = True
                raise Enough

    return Steps()


def until_enough(train: Callable[[], Any]) -> None:
    """Train until the clock says so."""
    try:
        train()
    except Enough:
        return


def ours(course: Course, clock: Clock, *flags: str) -> Any:
    """Train with trainer/train.py's own course, its defaults and these flags."""
    from trainer.distributed import deepspeed_config
    from trainer.distributed.ranks import Ranks
    from trainer.options import parse_options
    from trainer.results.console import Console
    from trainer.train import load_session

    folder = course.folder
    options = parse_options([
        "--model_name_or_path", str(folder / "model"), "--dataset_path", str(folder / "train.jsonl"),
        "--eval_dataset", str(folder / "eval.jsonl"), "--output_dir", str(folder / f"run-{os.getpid()}"),
        "--cache_dir", str(folder / "cache"), "--sequence_length", str(course.row), "--max_steps", "100000",
        "--per_device_train_batch_size", str(course.rows), "--learning_rate", str(course.rate),
        "--warmup_steps", str(course.warmup), "--lr_scheduler_type", "constant_with_warmup",
        "--max_grad_norm", str(CLIP), "--eval_steps", "0", "--save_steps", "0", "--num_samples", "0",
        "--seed", str(clock.seed), *flags])
    ranks = Ranks()
    engine = deepspeed_config.read_config(options.deepspeed) if options.deepspeed else None
    session = load_session()(options, ranks, Console(ranks), engine)
    session.prepare()
    session.trainer.data_collator = clock.counting(session.trainer.data_collator)
    session.trainer.add_callback(callback(clock))
    until_enough(session.run_steps)
    return session.trainer.model
