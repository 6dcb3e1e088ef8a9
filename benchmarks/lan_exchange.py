"""Gradients between hosts in few bits against DeepSpeed's ZeRO and torch's DDP: bytes and seconds a step, in one run.

    sudo .venv/bin/python benchmarks/lan_exchange.py               2 and 4 hosts, links of 1 Gbit/s and 100 Mbit/s
    sudo .venv/bin/python benchmarks/lan_exchange.py --model DIR   whole trainings of a pretrained model instead

Machines of the tests' lab with shaped links. An exchange takes what a step takes beyond one without any. Goals: with 4
bits at most 0.19 times the bytes of bf16 ZeRO-1, and at 100 Mbit/s at most 0.25 times the time.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SCRIPT = ROOT / "benchmarks" / "contenders" / "lan_steps.py"
LAYERS, STEPS = 80, 5  # 21 million weights
LINKS = ("1gbit", "100mbit")
PEER, OURS, NOTHING = "ZeRO-1, bf16", "--lan_compress 4", "no exchange"


def steps(desk: Any) -> dict[str, dict[str, Any]]:
    """Return what each way takes on the desk's hosts. Raises SystemExit with what was said."""
    done = subprocess.run(desk.script_words(SCRIPT, str(LAYERS), str(STEPS)), capture_output=True, text=True,
                          timeout=600, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    rows = [json.loads(line.partition("@@ ")[2]) for line in done.stdout.splitlines() if "@@ " in line]
    return {row["way"]: row for row in rows}


def show(where: str, found: dict[str, dict[str, Any]]) -> None:
    """Print each way, and the ratios that are the goals."""
    alone = found[NOTHING]["seconds"]
    exchange = {name: row["seconds"] - alone for name, row in found.items() if "seconds" in row}
    print(f"{where}; a step without exchange {alone:.2f} s")
    for name, row in found.items():
        if "fault" in row:
            print(f"  {name:<18} doesn't run: {row['fault']}")
        elif name != NOTHING:
            print(f"  {name:<18} {row['bytes'] / row['weights']:.3f} bytes a weight  exchange {exchange[name]:6.2f} s  "
                  f"{1 / row['seconds']:.2f} steps/s")
    print(f"  ours : ZeRO-1      bytes {found[OURS]['bytes'] / found[PEER]['bytes']:.3f}   "
          f"time of the exchange {exchange[OURS] / exchange[PEER]:.2f}", flush=True)


def training(desk: Any, model: Path, flags: list[str]) -> tuple[float, dict[str, Any]]:
    """Train a model in bf16 for some steps; return the usual seconds of a step, and run.json's traffic."""
    shutil.rmtree(desk.folder / "runs", ignore_errors=True)
    words = ["--config", str(ROOT / "trainer" / "configs" / "zero1.json"), "--", "--precision", "bf16",
             "--sequence_length", "128", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
             "--max_steps", str(STEPS + 1), "--logging_steps", "1", "--eval_fraction", "0",
             "--num_samples", "0", "--save_steps", "0", "--no_gradient_check", *flags]
    command = [str(model) if word == "tiny" else word for word in desk.words(*words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    record = json.loads(next((desk.folder / "runs").glob("*/run.json")).read_text())
    tokens = 2 * 128 * len(desk.hosts)
    return tokens / record["summary"]["computed_tokens_per_second"], record["traffic"]


def show_trainings(where: str, desk: Any, model: Path) -> None:
    """Print what a step takes and sends in whole trainings."""
    for name, flags in ((PEER, []), (OURS, ["--lan_compress"]), ("--lan_average 5", ["--lan_average", "5"])):
        seconds, traffic = training(desk, model, flags)
        print(f"{where}  {name:<16} {seconds:6.1f} s a step   {traffic['counted'] / 1e6:,.0f} MB a step from each host"
              f"   exchange {traffic['exchange_seconds'] or 0:.1f} s", flush=True)


def main() -> None:
    """Print each number of hosts and each link."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a pretrained causal LM: train it")
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    from lab.desk import Desk
    from lab.hosts import Lab

    for count in options.hosts:
        folder = Path(tempfile.mkdtemp(prefix="lan-exchange-"))
        (folder / "lab").mkdir()
        (texts := folder / "texts").mkdir()
        lab = Lab(folder / "lab")
        try:
            for number in range(20):
                (texts / f"{number}.md").write_text("\n".join(pydoc_data.topics.topics.values()))
            desk = Desk(lab, texts, folder / "cache", {f"gpu{number}": 1 for number in range(1, count + 1)})
            for link in LINKS:
                for host in desk.hosts.values():
                    host.network(f"tc qdisc replace dev eth0 root tbf rate {link} burst 256kb latency 100ms")
                if options.model:
                    show_trainings(f"{count} hosts, {link}", desk, options.model)
                else:
                    show(f"{count} hosts, {link}", steps(desk))
        finally:
            lab.end()
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
