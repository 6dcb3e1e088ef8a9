"""Gradients between hosts in few bits against DeepSpeed's ZeRO and torch's DDP: bytes and seconds a step, in one run.

    sudo .venv/bin/python benchmarks/lan_exchange.py            2 and 4 hosts, links of 1 Gbit/s and 100 Mbit/s

Machines of the tests' lab with shaped links. An exchange takes what a step takes beyond one without any. Goals: with 4
bits at most 0.19 times the bytes of bf16 ZeRO-1, and at 100 Mbit/s at most 0.25 times the time.
"""

from __future__ import annotations

import json
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
    words = [word for word in desk.words() if word not in ("--model", "tiny", "--dataset", str(desk.texts))]
    done = subprocess.run([*words, "--script", str(SCRIPT), "--", str(LAYERS), str(STEPS)], capture_output=True,
                          text=True, timeout=600, stdin=subprocess.DEVNULL)
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


def main() -> None:
    """Print each number of hosts and each link."""
    from lab.desk import Desk
    from lab.hosts import Lab

    for count in (2, 4):
        folder = Path(tempfile.mkdtemp(prefix="lan-exchange-"))
        (folder / "lab").mkdir()
        (texts := folder / "texts").mkdir()
        lab = Lab(folder / "lab")
        try:
            desk = Desk(lab, texts, folder / "cache", {f"gpu{number}": 1 for number in range(1, count + 1)})
            for link in LINKS:
                for host in desk.hosts.values():
                    host.network(f"tc qdisc replace dev eth0 root tbf rate {link} burst 256kb latency 100ms")
                show(f"{count} hosts, {link}", steps(desk))
        finally:
            lab.end()
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
