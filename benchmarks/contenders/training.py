"""Ways to train the same model on the same documents, each with a clock: what benchmarks/trainer.py compares."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROW = 1024  # tokens, what each peer takes by default
ROWS = 2  # a step
RATE, WARMUP, CLIP = 3e-3, 20, 1.0
UNCOUNTED = 10  # first steps, in which memory is got and caches fill


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

    def counting(self, collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        """Return a collator that has its labels counted."""
        def counted(rows: Any) -> dict[str, Any]:
            batch = collate(rows)
            self.tokens.append(int((batch["labels"][:, 1:] != -100).sum()))
            return batch

        return counted

    def step(self) -> bool:
        """Note the end of a step; return whether it was the last."""
        self.marks.append((time.perf_counter(), time.process_time()))
        done = len(self.marks)
        return sum(self.tokens[:done]) >= self._wanted if self._wanted else done >= self._steps

    def rates(self) -> tuple[float, float, float]:
        """Return useful tokens per wall second and per CPU second, and per step."""
        first, last = UNCOUNTED - 1, min(self._steps, len(self.marks)) - 1
        tokens = sum(self.tokens[UNCOUNTED : last + 1])
        wall, cpu = (self.marks[last][kind] - self.marks[first][kind] for kind in (0, 1))
        return tokens / wall, tokens / cpu, tokens / (last - first)


def load(folder: Path) -> tuple[Any, Any]:
    """Return tokenizer and model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (AutoTokenizer.from_pretrained(folder / "model"),
            AutoModelForCausalLM.from_pretrained(folder / "model", use_cache=False))


def texts_of(folder: Path, name: str) -> list[str]:
    """Return the documents of a file."""
    return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def loss_of(model: Any, tokenizer: Any, folder: Path) -> float:
    """Return the loss a token of the held-out documents, whole, each by itself; of long ones row by row."""
    import torch

    from trainer.data.tokenization import cut_document

    model.eval()
    nats, count = 0.0, 0
    with torch.no_grad():
        for text in texts_of(folder, "eval"):
            whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            for start, end in cut_document(len(whole), ROW):
                ids = torch.tensor([whole[start:end]])
                nats += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * (end - start - 1)
                count += end - start - 1
    return nats / count


def callback(clock: Clock) -> Any:
    """Return the clock as transformers' Trainer wants it."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
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


def ours(folder: Path, clock: Clock, engine: Path | None) -> Any:
    """Train with trainer/train.py's own course."""
    from trainer.distributed import deepspeed_config
    from trainer.distributed.ranks import Ranks
    from trainer.options import parse_options
    from trainer.results.console import Console
    from trainer.training.session import Session

    words = ["--model_name_or_path", str(folder / "model"), "--dataset_path", str(folder / "train.jsonl"),
             "--eval_dataset", str(folder / "eval.jsonl"), "--output_dir", str(folder / f"run-{os.getpid()}"),
             "--cache_dir", str(folder / "cache"), "--sequence_length", str(ROW), "--max_steps", "100000",
             "--per_device_train_batch_size", str(ROWS), "--learning_rate", str(RATE), "--warmup_steps", str(WARMUP),
             "--lr_scheduler_type", "constant_with_warmup", "--max_grad_norm", str(CLIP), "--eval_steps", "0",
             "--save_steps", "0", "--num_samples", "0", "--seed", str(clock.seed)]
    options = parse_options([*words, *(["--deepspeed", str(engine)] if engine else [])])
    ranks = Ranks()
    session = Session(options, ranks, Console(ranks), deepspeed_config.read_config(engine) if engine else None)
    session.prepare()
    session.trainer.data_collator = clock.counting(session.trainer.data_collator)
    session.trainer.add_callback(callback(clock))
    until_enough(session.run_steps)
    return session.trainer.model


def arguments(kind: Any, folder: Path, clock: Clock, rows: int = ROWS, **more: Any) -> Any:
    """Return a peer's TrainingArguments."""
    return kind(output_dir=str(folder / f"peer-{os.getpid()}"), max_steps=100000, per_device_train_batch_size=rows,
                learning_rate=RATE, warmup_steps=WARMUP, lr_scheduler_type="constant_with_warmup", max_grad_norm=CLIP,
                save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=clock.seed, **more)


def cut(folder: Path, clock: Clock) -> Any:
    """Train as run_clm.py does: all tokens one after the other, cut into rows."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    tokenizer, model = load(folder)
    ids = list(itertools.chain.from_iterable(
        [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts_of(folder, "train")))
    rows = [ids[at : at + ROW] for at in range(0, len(ids) - ROW + 1, ROW)]
    table = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * ROW] * len(rows), "labels": rows})
    trainer = Trainer(model=model, args=arguments(TrainingArguments, folder, clock), train_dataset=table,
                      data_collator=clock.counting(default_data_collator), callbacks=[callback(clock)])
    until_enough(trainer.train)
    return model


def trl(folder: Path, clock: Clock) -> Any:
    """Train with TRL's SFTTrainer; of its defaults only what is the same for all is set otherwise."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer, model = load(folder)
    texts = texts_of(folder, "train")
    mean = statistics.fmean(min(len(ids), ROW) - 1 for ids in tokenizer(texts)["input_ids"])
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_dict({"text": texts}),
        args=arguments(SFTConfig, folder, clock, rows=round(ROWS * ROW / mean), max_length=ROW, bf16=False,
                       gradient_checkpointing=False),
        callbacks=[callback(clock)])
    trainer.data_collator = clock.counting(trainer.data_collator)
    until_enough(trainer.train)
    return model


def by_hand(folder: Path, clock: Clock) -> Any:
    """Train with a loop around deepspeed.initialize, over our packed rows."""
    import deepspeed
    import torch

    from trainer.data.dataset import prepare_dataset
    from trainer.data.packing import Collator, PackedSequences
    from trainer.data.tokenizer import tokenizer_id
    from trainer.distributed import deepspeed_config
    from trainer.distributed.ranks import Ranks
    from trainer.options import parse_options

    Ranks()  # sets RANK and the like
    deepspeed_config.skip_shared_memory_operator()
    tokenizer, model = load(folder)
    torch.manual_seed(clock.seed)
    options = parse_options(["--model_name_or_path", "x", "--dataset_path", str(folder / "train.jsonl"),
                             "--eval_dataset", str(folder / "eval.jsonl"), "--cache_dir", str(folder / "cache")])
    rows = PackedSequences(prepare_dataset(options, tokenizer_id(tokenizer), lambda _: tokenizer, ROW,
                                           say=lambda _: None).train,
                           ROW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True, weight_decay=0.0)
    config = {"train_micro_batch_size_per_gpu": ROWS, "gradient_clipping": CLIP, "zero_optimization": {"stage": 1},
              "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
              "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": RATE, "warmup_num_steps": WARMUP,
                                                           "warmup_type": "linear"}}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=True)
    batches = torch.utils.data.DataLoader(rows, ROWS, shuffle=True, drop_last=True,
                                          collate_fn=clock.counting(Collator(tokenizer.pad_token_id, ROW)))
    engine.train()
    for batch in forever(batches):
        loss = engine(**batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        if clock.step():
            break
    return engine.module


def forever(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches, epoch after epoch."""
    while True:
        yield from batches
