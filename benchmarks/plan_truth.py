"""The plan's tokens a second against runs: subsets of two hosts, one of them slow, over shaped links, in one session.

    sudo .venv/bin/python benchmarks/plan_truth.py

Two machines of the tests' lab with a core each; what competes for the second one's core makes it slow. Each is measured
alone by `invoke plan --measure`, the link by `invoke check --network`; then a Llama of 5 million weights is trained on
each choice of hosts, by ZeRO-0 to 2, and its steady tokens a second stand beside the plan's. The goal is an error of
15 %, and the right order wherever two measurements differ by more than 25 %.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 1024,
         "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 2048,
         "max_position_embeddings": 512}
SEQUENCE, MICRO, STEPS = 128, 8, 14
LINKS = ("100mbit", "1gbit")
WAYS = ((0, 1), (1, 4), (2, 2))  # ZeRO's stage, accumulation
CHOICES = (("gpu1",), ("gpu2",), ("gpu1", "gpu2"))
FAR_APART = 1.25
SSH = ["--host-keys", "accept-new"]


def pin(folder: Path, core: int) -> None:
    """Keep a host's sshd, and all that it starts, on one core."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder / "sshd_config").encode() in (path / "cmdline").read_bytes():
                os.sched_setaffinity(int(path.name), {core})


@contextlib.contextmanager
def competitor(core: int) -> Iterator[None]:
    """Take a core's time, half of it where a rank wants all."""
    job = subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"])
    try:
        yield
    finally:
        job.kill()
        job.wait()


def run(desk: Any, tool: str, *words: str) -> str:
    """Run a tool at the desk; return what it printed to stdout. Raises SystemExit with what it said."""
    command = desk.words()
    at = command.index(str(ROOT / "master" / "launch_training.py"))
    done = subprocess.run([*command[:at], str(ROOT / "master" / tool), *words], capture_output=True, text=True,
                          timeout=300, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{tool}: {done.stderr[-2000:]}")
    return done.stdout


def trained(desk: Any, model: Path, stage: int, accumulation: int, hosts: tuple[str, ...]) -> float:
    """Train; return the tokens a second that the run's record has."""
    shutil.rmtree(desk.folder / "runs", ignore_errors=True)
    run(desk, "launch_training.py", "--model", str(model), "--config", str(ROOT / f"trainer/configs/zero{stage}.json"),
        "--hostfile", "hostfile.txt", "--include", "@".join(hosts), *SSH, "--", "--from_config", "--sequence_length",
        str(SEQUENCE), "--per_device_train_batch_size", str(MICRO), "--gradient_accumulation_steps", str(accumulation),
        "--max_steps", str(STEPS), "--logging_steps", "1", "--eval_fraction", "0", "--num_samples", "0", "--save_steps",
        "0", "--no_gradient_check")
    (record,) = (desk.folder / "runs").glob("*/run.json")
    rate: float = json.loads(record.read_text())["summary"]["computed_tokens_per_second"]
    return rate


def predicted(desk: Any, model: Path, stage: int, accumulation: int, hosts: tuple[str, ...]) -> float:
    """Return the plan's tokens a second."""
    from master.inventory.cluster_file import read_cluster
    from master.inventory.hostfile import Slots
    from master.plan import measuring
    from master.plan.machines import of_cluster
    from master.plan.ways import FULL, Task, Way, estimate
    from trainer.estimate.batch import Batch
    from trainer.estimate.shape import of_config

    cluster = read_cluster(desk.folder / "cluster.json")
    found = measuring.known(cluster, str(model))
    machines, network = of_cluster([Slots(host, 1, (0,), "CPU") for host in hosts], cluster, None)
    shape = of_config(MODEL)
    assert shape
    task = Task(shape, SEQUENCE, MICRO)
    way = Way(FULL, tuple(machines), stage, "", Batch(MICRO, accumulation, False))
    return estimate(task, way, network, measuring.rates_of(task, found)).rate()


def main() -> None:
    """Print each case, the median error, and whether the order is right."""
    from lab.desk import Desk
    from lab.hosts import Lab

    folder = Path(tempfile.mkdtemp(prefix="plan-truth-"))
    (folder / "lab").mkdir()
    lab = Lab(folder / "lab")
    rows = []
    try:
        (texts := folder / "texts").mkdir()
        (model := folder / "model").mkdir()
        (model / "config.json").write_text(json.dumps(MODEL))
        desk = Desk(lab, texts, folder / "cache", {"gpu1": 1, "gpu2": 1})
        for core, host in enumerate(desk.hosts.values()):
            pin(host.folder, core)
        with competitor(1):
            run(desk, "generate_hostfile.py", "--nodes", "gpu1,gpu2", "--cpu-slots", "1", *SSH)
            for link in LINKS:
                for host in desk.hosts.values():
                    host.network(f"tc qdisc replace dev eth0 root tbf rate {link} burst 256kb latency 100ms")
                run(desk, "check_cluster.py", "--network", "--hostfile", "hostfile.txt", *SSH)
                for (stage, accumulation), hosts in itertools.product(WAYS, CHOICES):
                    if len(hosts) == 1 and link != LINKS[0]:
                        continue  # no link in it
                    if hosts == CHOICES[0] or link != LINKS[0]:  # this machine's own speed changes by the minute
                        run(desk, "plan_ds_config.py", "--model", str(model), "--measure", "--full",
                            "--sequence-length", str(SEQUENCE), "--global-batch", str(MICRO), *SSH)
                    plan = predicted(desk, model, stage, accumulation, hosts)
                    real = trained(desk, model, stage, accumulation, hosts)
                    where = f"{' + '.join(hosts)}{f' over {link}' if len(hosts) > 1 else ''}"
                    rows.append((where, f"ZeRO-{stage}, accumulation {accumulation}", plan, real))
                    print(f"{where:<24} {rows[-1][1]:<22} plan {plan:>8,.0f}  run {real:>8,.0f} tokens/s  "
                          f"{plan / real - 1:+.0%}", flush=True)
    finally:
        lab.end()
        shutil.rmtree(folder, ignore_errors=True)
    errors = [abs(plan / real - 1) for _, _, plan, real in rows]
    pairs = [(one, other) for one, other in itertools.combinations(rows, 2) if one[1] == other[1]
             and max(one[3], other[3]) > FAR_APART * min(one[3], other[3])]
    right = sum((one[2] > other[2]) == (one[3] > other[3]) for one, other in pairs)
    print(f"error: median {median(errors):.0%}, most {max(errors):.0%}; order right in {right} of {len(pairs)} pairs "
          f"that differ by more than {FAR_APART - 1:.0%}")


if __name__ == "__main__":
    main()
