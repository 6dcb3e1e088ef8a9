"""What runs came to: each prediction beside the measurement, in the run's plan.json; later plans use them.

A run counts if nothing disturbed it: it finished, in one go. Of a model on devices of a name, with these versions, the
last five decide.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from master.core.atomic_write import write_atomically
from master.core.json_schema import loads
from master.core.terminal import say
from master.plan.measuring import SPREAD, versions
from master.plan.rates import Rate, measured_rate
from master.plan.ways import FULL, Estimate, Task
from master.run.launcher_process import read_object
from trainer.estimate.speed import work_per_token

LAST = 5  # runs that decide
LIMITS = (0.5, 2.0)  # of a correction: more is another fault than the plan's
NAME = "plan.json"
EARLIER = "earlier run"
MOSTLY_NETWORK = 0.5  # share of a step that a run waits, from which it says little of its devices


@dataclass(frozen=True)
class Outcome:
    """A run's prediction, as it was before a correction, and what it came to, in tokens a second of all ranks.

    `device_flops`: what a device computed a second, by the measurement, None where the network hides it.
    """

    model: str
    kind: str
    device: str
    versions: dict[str, str]
    machines: list[str]
    source: str
    predicted: float
    measured: float
    device_flops: float | None
    read_at: float


def record(run: Path, model: str, task: Task, found: Estimate) -> None:
    """Compare a run that has ended with what was predicted of it: say so, and keep both in its folder."""
    facts = read_object(run / "run.json")
    summary = facts.get("summary")
    rate = summary.get("computed_tokens_per_second") if isinstance(summary, dict) else None
    if facts.get("status") != "finished" or facts.get("resumed_at") or not isinstance(rate, int | float) or rate <= 0:
        return
    waiting = facts.get("waiting")
    share = waiting.get("network", 0.0) if isinstance(waiting, dict) else 0.0
    own = rate / found.way.ranks / (1 - share) if share < MOSTLY_NETWORK else None
    way = found.way
    flops = own and own * work_per_token(task.shape, task.sequence, way.kind != FULL, way.stage, way.batch.checkpoints,
                                         way.machines[0].on_gpu)
    predicted = found.rate() / found.correction if found.known else 0.0
    outcome = Outcome(model, found.way.kind, found.device_name, versions(),
                      [machine.name for machine in found.way.machines], found.source, predicted, float(rate), flops,
                      round(time.time(), 3))
    if predicted:
        say(f"the plan said {found.rate():,.0f} tokens/s, the run made {rate:,.0f} ({rate / found.rate() - 1:+.0%})")
    write_atomically(run / NAME, json.dumps(asdict(outcome), indent=1) + "\n")


def outcomes(model: str, folder: Path = Path("runs")) -> list[Outcome]:
    """Return what runs here of a model came to with these versions, the newest last; what isn't sound is left out."""
    found = []
    for path in sorted(folder.glob(f"*/{NAME}")):
        try:
            each = loads(path.read_text(encoding="utf-8"))
            outcome = Outcome(**each)
        except (OSError, ValueError, TypeError):
            continue
        if outcome.model == model and outcome.versions == versions() and is_sound(each):
            found.append(outcome)
    return sorted(found, key=lambda outcome: outcome.read_at)


def is_sound(each: Mapping[str, Any]) -> bool:
    """Return whether a plan.json's numbers are numbers."""
    return all(isinstance(each[name], int | float) for name in ("predicted", "measured", "read_at")) and (
        each["device_flops"] is None or isinstance(each["device_flops"], int | float))


def rates_of(found: list[Outcome]) -> dict[str, Rate]:
    """Return devices' FLOP/s by earlier runs, the median of the last five."""
    by_device: dict[str, list[float]] = {}
    for each in found:
        if each.device_flops:
            by_device.setdefault(each.device, []).append(each.device_flops)
    return {name: measured_rate(median(values[-LAST:]), SPREAD, EARLIER) for name, values in by_device.items()}


def corrected(rates: Mapping[str, Rate], found: list[Outcome]) -> dict[str, Rate]:
    """Return rates with what runs with these devices, predicted from the same source, were faster or slower by."""
    return {name: replace(rate, correction=correction(found, name, rate.source)) for name, rate in rates.items()}


def correction(found: list[Outcome], device: str, source: str) -> float:
    """Return the median ratio of measurement and prediction, within LIMITS; 1 without any."""
    ratios = [each.measured / each.predicted for each in found
              if each.device == device and each.source == source and each.predicted > 0][-LAST:]
    low, high = LIMITS
    return min(high, max(low, median(ratios))) if ratios else 1.0
