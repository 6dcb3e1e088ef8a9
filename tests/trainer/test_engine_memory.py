"""The estimate of what ZeRO's stages hold, against real DeepSpeed engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.estimate.memory import MemoryInputs, host_bytes, resting_bytes, weights_bytes

PROGRAM = Path(__file__).with_name("engine_states.py")
LARGEST = 256 * 1024  # numbers of one of its weights


def load(weights: float, stage: int, number: int, offloads: bool, ranks: int) -> MemoryInputs:
    return MemoryInputs(weights=weights, trained=weights, layers=4, hidden=256, intermediate=1024, keys=256,
                        vocabulary=1, sequence=1, micro=1, accumulation=2, ranks=ranks, stage=stage, number=number,
                        offloads=offloads, largest=LARGEST)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_states_are_what_engines_hold(ranks: int, environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
               "--rdzv-endpoint=127.0.0.1:0", str(PROGRAM)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    found = [json.loads(line.partition("@@ ")[2]) for line in done.stdout.splitlines() if "@@ " in line]
    assert len(found) == 14, done.stderr[-2000:]
    for stage, number, offloads, held, weights in found:
        expected = resting_bytes(load(weights, stage, number, offloads, ranks))
        assert expected == pytest.approx(held, rel=0.02), (stage, number, offloads, held / weights, expected / weights)


def test_what_is_offloaded_is_on_the_host_and_no_more() -> None:
    """7 billion weights on 4 ranks: 12 bytes of states, 4 + 2 of gradients, a quarter of them each."""
    inputs = load(7e9, 2, 2, True, 4)
    host = host_bytes(inputs)
    assert host["optimizer states"] == 12 * 7e9 / 4
    assert host["gradients"] == pytest.approx((4 + 2 * 2) * 7e9 / 4, rel=0.001)  # ZeRO-2 accumulates in one more
    assert host["weights"] == 0
    assert host_bytes(load(7e9, 2, 2, False, 4)) == {}


def test_gathered_weights_are_on_the_device() -> None:
    """DeepSpeed keeps up to a billion of them gathered; of a smaller model that is all."""
    assert weights_bytes(load(7e9, 3, 2, False, 4)) == 2 * 7e9 / 4 + 2 * 1e9
    assert weights_bytes(load(5e8, 3, 2, False, 4)) == 2 * 5e8 / 4 + 2 * 5e8
    assert weights_bytes(load(7e9, 3, 2, False, 1)) == 2 * 7e9
