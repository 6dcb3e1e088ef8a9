"""What the trainer gets done, against what people use today: same model, same documents, same machine, in one run.

    python benchmarks/trainer.py                       # 15 minutes
    python benchmarks/trainer.py --rounds 1

Peers: transformers' Trainer on text that is concatenated and cut, as run_clm.py does it; TRL's SFTTrainer with its
defaults for data (a document a row, what is longer cut off, padded to the longest), and so many documents a step that
they have as many tokens; a loop written by hand around deepspeed.initialize, which is given our packed rows. Ours makes
so many optimizer steps, the others train on as many useful tokens, which are those that are trained; each by itself
with
one thread, in turns, another seed each round; float32, AdamW, the same learning rate and clipping. Then the loss of the
same held-out documents is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # Python puts this script's folder there, in which `trainer` is this file

from benchmarks.contenders.training import Clock, by_hand, cut, load, loss_of, ours, trl  # noqa: E402

HELD_OUT = 150  # documents
SHAPE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False}
OURS, OURS_DEEPSPEED = "lanspeed, plain PyTorch", "lanspeed, ZeRO-1"
PEERS = {"Trainer, concatenated and cut": OURS, "TRL SFTTrainer": OURS, "deepspeed.initialize by hand": OURS_DEEPSPEED}


def make_data(folder: Path) -> None:
    """Write documents, tokenizer and a model with random weights for all to begin with."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from trainer.data.python_docs import python_documents
    from trainer.data.tokenizer import own_tokenizer

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


def contend(name: str, folder: Path, steps: int, tokens: int, seed: int) -> None:
    """Train as one contender in this process and print what came of it as JSON."""
    import transformers

    transformers.logging.set_verbosity_error()
    zero1 = ROOT / "trainer" / "configs" / "zero1.json"
    train = {OURS: lambda *words: ours(*words, None), OURS_DEEPSPEED: lambda *words: ours(*words, zero1),
             **dict(zip(PEERS, (cut, trl, by_hand), strict=True))}[name]
    clock = Clock(steps, tokens, seed)
    model = train(folder, clock)
    wall, cpu, step = clock.rates()
    tokenizer, _ = load(folder)
    print("RESULT " + json.dumps({"wall": wall, "cpu": cpu, "step": step, "loss": loss_of(model, tokenizer, folder),
                                  "tokens": sum(clock.tokens[: len(clock.marks)])}), flush=True)
    os._exit(0)


def measured(name: str, folder: Path, steps: int, tokens: int, seed: int) -> dict[str, float]:
    """Run one contender in a process of its own; return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
                   "DS_ACCELERATOR": "cpu", "LANSPEED_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, "--contender", name, "--folder", str(folder), "--steps", str(steps),
               "--tokens", str(tokens), "--seed", str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{name}: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    found: dict[str, float] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def main() -> int:
    """Print useful tokens per CPU second and wall second, ours as a ratio to each peer's, and the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="optimizer steps (60)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that each contender trains (3)")
    for hidden in ("--contender", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--tokens", "--seed"):
        parser.add_argument(hidden, type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        contend(options.contender, Path(options.folder), options.steps, options.tokens, options.seed)
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
            found.setdefault(name, []).append(measured(name, folder, steps, tokens, number))
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
