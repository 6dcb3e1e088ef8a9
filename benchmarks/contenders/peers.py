"""What people train with today: transformers' Trainer, TRL, a loop around DeepSpeed; on a course, with a clock."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.contenders.training import CLIP, Clock, Course, callback, load, texts_of, until_enough


def arguments(kind: Any, course: Course, clock: Clock, rows: int | None = None, **more: Any) -> Any:
    """Return a peer's TrainingArguments."""
    return kind(output_dir=str(course.folder / f"peer-{os.getpid()}"), max_steps=100000,
                per_device_train_batch_size=rows or course.rows, learning_rate=course.rate, warmup_steps=course.warmup,
                lr_scheduler_type="constant_with_warmup", max_grad_norm=CLIP, save_strategy="no", report_to="none",
                disable_tqdm=True, use_cpu=course.device == "cpu", bf16=course.device != "cpu", seed=clock.seed, **more)


def cut(course: Course, clock: Clock, **more: Any) -> Any:
    """Train as run_clm.py does: all tokens one after the other, cut into rows."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    tokenizer, model = load(course)
    ids = list(itertools.chain.from_iterable(
        [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts_of(course.folder, "train")))
    rows = [ids[at : at + course.row] for at in range(0, len(ids) - course.row + 1, course.row)]
    table = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * course.row] * len(rows), "labels": rows})
    trainer = Trainer(model=model, args=arguments(TrainingArguments, course, clock, **more), train_dataset=table,
                      data_collator=clock.counting(default_data_collator), callbacks=[callback(clock)])
    until_enough(trainer.train)
    return model


def trl(course: Course, clock: Clock, attention: str | None = None, **more: Any) -> Any:
    """Train with TRL's SFTTrainer; of its defaults only what is the same for all, and `more`, is set otherwise.

    Where it doesn't pack, it takes so many documents a step that they have as many tokens.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer, model = load(course, **({"attn_implementation": attention} if attention else {}))
    texts = texts_of(course.folder, "train")
    documents = [[*ids[: course.row - 1], tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    mean = statistics.fmean(len(ids) - 1 for ids in documents)
    rows = course.rows if more.get("packing") else max(1, round(course.rows * course.row / mean))
    cuts = not more.get("padding_free")  # which wants rows that are cut already
    table = Dataset.from_dict({"text": texts} if cuts else {"input_ids": documents})
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=table, callbacks=[callback(clock)],
        args=arguments(SFTConfig, course, clock, rows=rows, max_length=course.row if cuts else None,
                       gradient_checkpointing=False, **more))
    trainer.data_collator = clock.counting(trainer.data_collator)
    until_enough(trainer.train)
    return model


def by_hand(course: Course, clock: Clock) -> Any:
    """Train with a loop around deepspeed.initialize, over our packed rows."""
    import deepspeed
    import torch

    from trainer.data.dataset import prepare_dataset
    from trainer.data.tokenizer import tokenizer_id
    from trainer.distributed import deepspeed_config
    from trainer.distributed.ranks import Ranks
    from trainer.options import parse_options
    from trainer.sequences.packing import Collator, PackedSequences

    Ranks()  # sets RANK and the like
    deepspeed_config.skip_shared_memory_operator()
    tokenizer, model = load(course)
    torch.manual_seed(clock.seed)
    options = parse_options(["--model_name_or_path", "x", "--dataset_path", str(course.folder / "train.jsonl"),
                             "--eval_dataset", str(course.folder / "eval.jsonl"),
                             "--cache_dir", str(course.folder / "cache")])
    rows = PackedSequences(prepare_dataset(options, tokenizer_id(tokenizer), lambda _: tokenizer, course.row,
                                           say=lambda _: None).train, course.row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.rate, fused=True, weight_decay=0.0)
    config = {"train_micro_batch_size_per_gpu": course.rows, "gradient_clipping": CLIP,
              "zero_optimization": {"stage": 1}, "zero_force_ds_cpu_optimizer": False,
              "zero_allow_untested_optimizer": True,
              "scheduler": {"type": "WarmupLR", "params": {
                  "warmup_max_lr": course.rate, "warmup_num_steps": course.warmup, "warmup_type": "linear"}}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=True)
    collate = Collator(tokenizer.pad_token_id, course.row)
    batches = torch.utils.data.DataLoader(rows, course.rows, shuffle=True, drop_last=True,
                                          collate_fn=clock.counting(collate))
    engine.train()
    for batch in forever(batches):
        clock.begin()
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
        engine.backward(engine(**inputs, use_cache=False).loss)
        engine.step()
        if clock.step():
            break
    return engine.module


def forever(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches, epoch after epoch."""
    while True:
        yield from batches
