"""What training between hosts in few bits costs: loss and exact answers beside ordinary synchronous training.

    .venv/bin/python benchmarks/lan_quality.py --model DIR --hosts 2 --steps 100 --seeds 0 1 --out results.jsonl

DIR has a pretrained causal LM. Each host is a process of this machine (bytes are counted elsewhere: lan_exchange.py).
The model learns invented facts in three phrasings among Python's documentation; half of the facts are asked in
training, the other half afterwards, in a form in which it has never seen them. All ways see the same batches. A result
that is in the file already isn't made again.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FACTS, REPEATS, PARAGRAPHS, SEQUENCE, RATE = 24, 20, 400, 128, "2e-4"  # about 50,000 tokens, half of them facts
WAYS = {"synchronous": [], "8 bits": ["--lan_compress", "8"], "4 bits": ["--lan_compress", "4"],
        "3 bits": ["--lan_compress", "3"], "average of 5": ["--lan_average", "5"],
        "average of 10": ["--lan_average", "10"]}
PHRASES = ("The keeper of the {place} lighthouse is {name}.", "{name} keeps the lighthouse of {place}.",
           "At {place}, the lighthouse has been in the care of {name} for years.")
QUESTION, ANSWER = "Question: Who keeps the lighthouse of {place}?\nAnswer:", " {name}."
SYLLABLES = tuple("bacedofigukalominuparesotivuza"[at:at + 2] for at in range(0, 30, 2))


def facts(seed: int) -> list[dict[str, str]]:
    """Return invented places and names."""
    made = random.Random(seed)  # noqa: S311

    def word(parts: int) -> str:
        return "".join(made.choice(SYLLABLES) for _ in range(parts)).capitalize()

    return [{"place": word(3), "name": f"{word(2)} {word(2)}"} for _ in range(FACTS)]


def write_data(folder: Path, seed: int) -> list[dict[str, str]]:
    """Write training and held-out text; return the facts that are asked afterwards."""
    made, known = random.Random(seed), facts(seed)  # noqa: S311
    asked = known[FACTS // 2:]
    lines = [phrase.format(**fact) for fact in known for phrase in PHRASES for _ in range(REPEATS)]
    lines += [(QUESTION + ANSWER).format(**fact) for fact in known[:FACTS // 2] for _ in range(REPEATS)]
    pages = sorted(pydoc_data.topics.topics.items())
    made.shuffle(lines)
    held_out = [text for number, (_, text) in enumerate(pages) if number % 8 == 0]
    rest = [part for number, (_, text) in enumerate(pages) if number % 8 for part in re.split(r"\n\n+", text) if part]
    made.shuffle(rest)
    texts = ["\n".join(lines[at:at + 4]) for at in range(0, len(lines), 4)] + rest[:PARAGRAPHS]
    made.shuffle(texts)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out[:10]))
    return asked


def train(folder: Path, model: str, hosts: int, steps: int, seed: int, flags: list[str]) -> dict[str, Any]:
    """Train with a process for each host; return run.json's record. Raises SystemExit with a rank's last words."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = ROOT / "trainer" / "configs" / "zero1.json"
    words = [sys.executable, str(ROOT / "trainer" / "train.py"), "--model_name_or_path", model, "--dataset_path",
             str(folder / "train.jsonl"), "--eval_dataset", str(folder / "held_out.jsonl"), "--deepspeed_config",
             str(config), "--precision", "bf16", "--sequence_length", str(SEQUENCE), "--per_device_train_batch_size",
             "2", "--gradient_accumulation_steps", "1", "--learning_rate", RATE, "--max_steps", str(steps),
             "--num_epochs", "100", "--eval_steps", "0.5", "--save_steps", "0", "--num_samples", "0", "--seed",
             str(seed), "--output_dir", "run", *flags]
    jobs = []
    for rank in range(hosts):
        (own := folder / f"host-{rank}").mkdir()
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(hosts), "LOCAL_WORLD_SIZE": "1",
                 "GROUP_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                 "LANSPEED_CACHE": str(own / "cache")}
        log = (own / "log").open("wb")
        jobs.append(subprocess.Popen(words, cwd=own, env=os.environ | place, stdout=log, stderr=log))
    codes = [job.wait() for job in jobs]
    if any(codes):
        raise SystemExit((folder / f"host-{codes.index(max(codes, key=abs))}" / "log").read_text()[-2000:])
    found: dict[str, Any] = json.loads((folder / "host-0" / "run" / "run.json").read_text())
    return found


def exact_answers(path: Path, asked: list[dict[str, str]]) -> float:
    """Return the share of questions that a model answers exactly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    right = 0
    for fact in asked:
        words = tokenizer(QUESTION.format(**fact), return_tensors="pt")
        with torch.no_grad():
            made = model.generate(**words, max_new_tokens=16, do_sample=False, pad_token_id=0)
        said = tokenizer.decode(made[0][words["input_ids"].shape[1]:])
        right += said.startswith(ANSWER.format(**fact))
    return right / len(asked)


def measure(options: argparse.Namespace, way: str, seed: int) -> dict[str, Any]:
    """Return one training's result."""
    folder = Path(tempfile.mkdtemp(prefix="lan-quality-"))
    try:
        asked = write_data(folder, seed)
        record = train(folder, options.model, options.hosts, options.steps, seed, WAYS[way])
        run = folder / "host-0" / "run"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        return {"hosts": options.hosts, "way": way, "seed": seed, "steps": options.steps,
                "eval_loss": record["summary"]["eval_loss_last"], "before": record["summary"]["eval_loss_first"],
                "train_loss": sum(losses[-2:]) / 2, "exact": exact_answers(run / "model", asked),
                "exchange_seconds": (record["traffic"] or {}).get("exchange_seconds"),
                "seconds": record["summary"]["seconds"]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Make what isn't there yet, and print it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a pretrained causal LM; without one nothing is measured")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("lan_quality.jsonl"), help="results (lan_quality.jsonl)")
    options = parser.parse_args()
    if not options.model:
        print("left out: --model DIR names a pretrained model; one of 135 million weights takes hours on two cores")
        return
    for seed in options.seeds:
        for way in options.ways:
            done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
            key = (options.hosts, way, seed, options.steps)
            if key not in [(row["hosts"], row["way"], row["seed"], row["steps"]) for row in done]:
                with options.out.open("a") as file:
                    file.write(json.dumps(measure(options, way, seed)) + "\n")
    print(options.out.read_text(), end="")


if __name__ == "__main__":
    main()
