"""Layers split over hosts: our schedule against torch's, and the idle share of whole trainings beside the plan's.

    sudo .venv/bin/python benchmarks/split_layers.py                schedules, then whole trainings
    sudo .venv/bin/python benchmarks/split_layers.py --trainings    these alone

Machines of the tests' lab with shaped links. Schedules: stages that compute by sleeping, in the proportion of 7 billion
weights over 1 Gbit/s between two cards of 35 TFLOP/s: a transfer takes an eighth of a micro batch's work.
"""

from __future__ import annotations

import contextlib
import json
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.plan_truth import SSH, competitor, pin, run  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "contenders" / "split_steps.py"
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 9, "num_attention_heads": 6,
         "num_key_value_heads": 6, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
         "pad_token_id": 1}
TOKENS = 256
SIZE, FORWARD, STEPS = 512 << 10, 0.12, 3  # bytes at a cut, seconds
LINK = "100mbit"


def schedules(desk: Any, count: int) -> dict[str, float]:
    """Return the seconds of a step with each schedule. Raises SystemExit with what was said."""
    done = subprocess.run(desk.script_words(SCRIPT, str(SIZE), str(FORWARD), str(count), str(STEPS)), text=True,
                          capture_output=True, timeout=600, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    rows = [json.loads(line.partition("@@ ")[2]) for line in done.stdout.splitlines() if "@@ " in line]
    return {row["way"]: row["seconds"] for row in rows}


def model_of(folder: Path, texts: Path) -> Path:
    """Write a Llama of 13 million weights in nine layers; return its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.data.tokenizer import own_tokenizer

    tokenizer = own_tokenizer([path.read_text() for path in texts.iterdir()], vocabulary=1024)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **SHAPE)
    made: Any = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def training(desk: Any, model: Path, count: int) -> str:
    """Measure each host, train as the launcher plans it, and return what came of it beside the plan."""
    flags = ["--sequence_length", str(TOKENS), "--lora", "8", "--gradient_accumulation_steps", str(count),
             "--max_steps", "6", "--logging_steps", "1", "--eval_fraction", "0", "--save_steps", "0",
             "--precision", "fp32"]
    run(desk, "plan_ds_config.py", "--model", str(model), "--measure", "--lora", "8", "--sequence-length", str(TOKENS),
        "--global-batch", "4", *SSH)
    shutil.rmtree(desk.folder / "runs", ignore_errors=True)
    run(desk, "launch_training.py", "--model", str(model), "--dataset", str(desk.texts), "--hostfile", "hostfile.txt",
        *SSH, "--split-layers", "--", *flags)
    (plan,), (record,) = ([json.loads(path.read_text()) for path in (desk.folder / "runs").glob(f"*/{name}.json")]
                          for name in ("plan", "run"))
    split = plan["split"]
    seconds = count * TOKENS / record["summary"]["computed_tokens_per_second"]
    idle = ", ".join(f"{found:.0%} (plan {planned:.0%})" for found, planned in
                     zip(plan["idle"], split["idle"], strict=True))
    return (f"{' + '.join(split['machines'])}: {' + '.join(map(str, split['layers']))} layers, {count} micro batches: "
            f"{seconds:.2f} s a step (plan {split['step_s'][1]:.2f}), idle {idle}")


def trainings(lab: Any, folder: Path) -> None:
    """Print whole trainings on two hosts with a core each, the second one's shared with another program."""
    from lab.desk import Desk

    (texts := folder / "texts").mkdir()
    (texts / "topics.md").write_text("\n".join(pydoc_data.topics.topics.values()))
    desk = Desk(lab, texts, folder / "cache", {"gpu1": 1, "gpu2": 1})
    for core, host in enumerate(desk.hosts.values()):
        pin(host.folder, core)
        host.network(f"tc qdisc replace dev eth0 root tbf rate {LINK} burst 64kb latency 100ms")
    model = model_of(folder, texts)
    with competitor(1):
        run(desk, "generate_hostfile.py", "--nodes", "gpu1,gpu2", "--cpu-slots", "1", *SSH)
        run(desk, "check_cluster.py", "--network", "--hostfile", "hostfile.txt", *SSH)
        for count in (8, 16):
            print(training(desk, model, count), flush=True)


@contextlib.contextmanager
def lab_in(folder: Path) -> Iterator[Any]:
    """Switch a lab on, in a folder that goes with it."""
    from lab.hosts import Lab

    (folder / "lab").mkdir()
    lab = Lab(folder / "lab")
    try:
        yield lab
    finally:
        lab.end()
        shutil.rmtree(folder, ignore_errors=True)


def show_schedules(hosts: int) -> None:
    """Print both schedules for 4 and 16 micro batches."""
    from lab.desk import Desk

    with lab_in(folder := Path(tempfile.mkdtemp(prefix="split-layers-"))) as lab:
        desk = Desk(lab, folder, folder / "cache", {f"gpu{number}": 1 for number in range(1, hosts + 1)})
        for host in desk.hosts.values():
            host.network(f"tc qdisc replace dev eth0 root tbf rate {LINK} burst 64kb latency 100ms")
        for count in (4, 16):
            found = schedules(desk, count)
            torchs, ours = found["Schedule1F1B"], found["EarlyReceives"]
            work = 3 * FORWARD * count
            print(f"{hosts} hosts, {count:2} micro batches  torch {torchs:6.2f} s (idle {1 - work / torchs:.0%})   "
                  f"ours {ours:6.2f} s (idle {1 - work / ours:.0%})   bubble "
                  f"{(hosts - 1) / (count + hosts - 1):.0%}   torch : ours {torchs / ours:.2f}", flush=True)


def main() -> None:
    """Print schedules on 2 and 3 hosts, then whole trainings beside their plans."""
    if "--trainings" not in sys.argv:
        for hosts in (2, 3):
            show_schedules(hosts)
    with lab_in(folder := Path(tempfile.mkdtemp(prefix="split-layers-"))) as lab:
        trainings(lab, folder)


if __name__ == "__main__":
    main()
