"""What the trainer gets done, against what people use today: same model, same documents, same machine, in one run.

    python benchmarks/trainer.py                       # 20 minutes
    python benchmarks/trainer.py --steps 60 --rounds 1

Peers: transformers' Trainer on text that is concatenated and cut, as run_clm.py does it; TRL's SFTTrainer with its
defaults for data (a document a row, what is longer cut off, padded to the longest), and so many documents a step that
they have as many tokens; a loop written by hand around deepspeed.initialize, which is given our packed rows. Each makes
as many optimizer steps in a process of its own with one thread, in turns; float32, AdamW, the same learning rate and
clipping. Useful tokens are those that carry loss. Then each goes on to as many of them as ours had, and its loss on the
same held-out documents is taken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent
sys.path[0] = str(HOME)  # Python puts this script's folder there, in which `trainer` is this file

ROW = 1024  # tokens, what each peer takes by default
ROWS = 2  # a step
RATE, WARMUP, CLIP = 3e-3, 20, 1.0
HELD_OUT = 150  # documents
UNCOUNTED = 10  # first steps, in which memory is got and caches fill
SHAPE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False}
OURS, OURS_DEEPSPEED = "lanspeed, plain PyTorch", "lanspeed, ZeRO-1"
PEERS = {"Trainer, concatenated and cut": OURS, "TRL SFTTrainer": OURS, "deepspeed.initialize by hand": OURS_DEEPSPEED}


class Enough(Exception):
    """A peer has seen its tokens."""


class Clock:
    """Counts steps: when each ended, the process' CPU seconds by then, and the useful tokens of each."""

    def __init__(self, steps: int, tokens: int) -> None:
        self._steps, self._wanted = steps, tokens
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
        return done >= self._steps and sum(self.tokens[:done]) >= self._wanted

    def rates(self) -> tuple[float, float, float]:
        """Return useful tokens per wall second and per CPU second, and per step."""
        first, last = UNCOUNTED - 1, self._steps - 1
        tokens = sum(self.tokens[UNCOUNTED : self._steps])
        wall, cpu = (self.marks[last][kind] - self.marks[first][kind] for kind in (0, 1))
        return tokens / wall, tokens / cpu, tokens / (last - first)


def make_data(folder: Path) -> None:
    """Write documents, tokenizer and a model with random weights for all to begin with."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from trainer.corpus import python_documents
    from trainer.models import own_tokenizer

    texts = python_documents()
    random.Random(0).shuffle(texts)  # noqa: S311
    for name, part in (("eval", texts[:HELD_OUT]), ("train", texts[HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    tokenizer = own_tokenizer(texts)
    tokenizer.save_pretrained(folder / "model")
    set_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder / "model")


def load(folder: Path) -> tuple[Any, Any]:
    """Return tokenizer and model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (AutoTokenizer.from_pretrained(folder / "model"),
            AutoModelForCausalLM.from_pretrained(folder / "model", use_cache=False))


def texts_of(folder: Path, name: str) -> list[str]:
    """Return the documents of a file."""
    return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def loss_of(model: Any, tokenizer: Any, folder: Path) -> float:
    """Return the loss a token of the held-out documents' first rows, each document by itself."""
    import torch

    model.eval()
    nats, count = 0.0, 0
    with torch.no_grad():
        for text in texts_of(folder, "eval"):
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:ROW]])
            nats += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
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
    from trainer import ds_setup
    from trainer.console import Console
    from trainer.options import parse_options
    from trainer.ranks import Ranks
    from trainer.session import Session

    words = ["--model_name_or_path", str(folder / "model"), "--dataset_path", str(folder / "train.jsonl"),
             "--eval_dataset", str(folder / "eval.jsonl"), "--output_dir", str(folder / f"run-{os.getpid()}"),
             "--cache_dir", str(folder / "cache"), "--sequence_length", str(ROW), "--max_steps", "100000",
             "--per_device_train_batch_size", str(ROWS), "--learning_rate", str(RATE), "--warmup_steps", str(WARMUP),
             "--lr_scheduler_type", "constant_with_warmup", "--max_grad_norm", str(CLIP), "--eval_steps", "0",
             "--save_steps", "0", "--num_samples", "0"]
    options = parse_options([*words, *(["--deepspeed", str(engine)] if engine else [])])
    ranks = Ranks()
    session = Session(options, ranks, Console(ranks), ds_setup.read_config(engine) if engine else None)
    session.prepare()
    session.trainer.data_collator = clock.counting(session.trainer.data_collator)
    session.trainer.add_callback(callback(clock))
    until_enough(session.run_steps)
    return session.trainer.model


def arguments(kind: Any, folder: Path, rows: int = ROWS, **more: Any) -> Any:
    """Return a peer's TrainingArguments."""
    return kind(output_dir=str(folder / f"peer-{os.getpid()}"), max_steps=100000, per_device_train_batch_size=rows,
                learning_rate=RATE, warmup_steps=WARMUP, lr_scheduler_type="constant_with_warmup", max_grad_norm=CLIP,
                save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=42, **more)


def cut(folder: Path, clock: Clock) -> Any:
    """Train as run_clm.py does: all tokens one after the other, cut into rows."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    tokenizer, model = load(folder)
    ids = list(itertools.chain.from_iterable(
        [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts_of(folder, "train")))
    rows = [ids[at : at + ROW] for at in range(0, len(ids) - ROW + 1, ROW)]
    table = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * ROW] * len(rows), "labels": rows})
    trainer = Trainer(model=model, args=arguments(TrainingArguments, folder), train_dataset=table,
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
        args=arguments(SFTConfig, folder, rows=round(ROWS * ROW / mean), max_length=ROW, bf16=False,
                       gradient_checkpointing=False),
        callbacks=[callback(clock)])
    trainer.data_collator = clock.counting(trainer.data_collator)
    until_enough(trainer.train)
    return model


def by_hand(folder: Path, clock: Clock) -> Any:
    """Train with a loop around deepspeed.initialize, over our packed rows."""
    import deepspeed
    import torch

    from trainer import ds_setup
    from trainer.data import prepare_dataset
    from trainer.models import tokenizer_id
    from trainer.options import parse_options
    from trainer.packing import Collator, Rows
    from trainer.ranks import Ranks

    Ranks()  # sets RANK and the like
    ds_setup.skip_shared_memory_operator()
    tokenizer, model = load(folder)
    options = parse_options(["--model_name_or_path", "x", "--dataset_path", str(folder / "train.jsonl"),
                             "--eval_dataset", str(folder / "eval.jsonl"), "--cache_dir", str(folder / "cache")])
    rows = Rows(prepare_dataset(options, tokenizer_id(tokenizer), lambda _: tokenizer, ROW, say=lambda _: None).train,
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


def contend(name: str, folder: Path, steps: int, tokens: int) -> None:
    """Train as one contender in this process and print what came of it as JSON."""
    import transformers

    transformers.logging.set_verbosity_error()
    zero1 = HOME / "trainer" / "configs" / "zero1.json"
    train = {OURS: lambda *words: ours(*words, None), OURS_DEEPSPEED: lambda *words: ours(*words, zero1),
             **dict(zip(PEERS, (cut, trl, by_hand), strict=True))}[name]
    clock = Clock(steps, tokens)
    model = train(folder, clock)
    wall, cpu, step = clock.rates()
    tokenizer, _ = load(folder)
    print("RESULT " + json.dumps({"wall": wall, "cpu": cpu, "step": step, "loss": loss_of(model, tokenizer, folder),
                                  "tokens": sum(clock.tokens[: len(clock.marks)])}), flush=True)
    os._exit(0)


def measured(name: str, folder: Path, steps: int, tokens: int = 0) -> dict[str, float]:
    """Run one contender in a process of its own; return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
                   "DS_ACCELERATOR": "cpu", "LANSPEED_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, "--contender", name, "--folder", str(folder), "--steps", str(steps),
               "--tokens", str(tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{name}: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    found: dict[str, float] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def main() -> int:
    """Print useful tokens per CPU second and wall second, ours as a ratio to each peer's, and the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="optimizer steps (100)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that each contender trains (3)")
    for hidden in ("--contender", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        contend(options.contender, Path(options.folder), options.steps, options.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        compare(Path(scratch), options.steps, options.rounds)
    return 0


def compare(folder: Path, steps: int, rounds: int) -> None:
    """Have all train in turns, and print the table."""
    from importlib.util import find_spec

    make_data(folder)
    peers = dict(PEERS)
    if find_spec("trl") is None:
        peers.pop("TRL SFTTrainer")
        print("without TRL: pip install -e '.[bench]' -c constraints.txt")
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        tokens = 0
        for name in (OURS, *peers, OURS_DEEPSPEED):
            found.setdefault(name, []).append(measured(name, folder, steps, tokens))
            tokens = tokens or int(found[name][-1]["tokens"])
            print(f"round {number + 1} of {rounds}: {name} {found[name][-1]}", file=sys.stderr)
    print(f"{'':30} {'tokens/CPU s':>13} {'tokens/s':>9} {'a step':>7} {'loss':>6}   ours: per CPU s, per s")
    for name, runs in found.items():
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        line = f"{name:30} {row['cpu']:13,.0f} {row['wall']:9,.0f} {row['step']:7,.0f} {row['loss']:6.3f}"
        if name in peers:
            ratios = [statistics.median(mine[key] / theirs[key] for mine, theirs in
                                        zip(found[peers[name]], runs, strict=True)) for key in ("cpu", "wall")]
            line += "   " + ", ".join(f"{ratio:.2f}x" for ratio in ratios)
        print(line)


if __name__ == "__main__":
    raise SystemExit(main())
