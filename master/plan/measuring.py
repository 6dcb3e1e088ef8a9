"""--measure: some real steps of a model on each host alone, by the trainer itself; cluster.json keeps how fast."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from master.core.json_schema import loads
from master.core.paths import ROOT
from master.core.run_cli import UserError
from master.inventory.cluster_file import update_cluster
from master.inventory.hostfile import Slots, include_filter
from master.plan.machines import Machine, Network
from master.plan.presets import ON_CPU, PRESETS, way_of
from master.plan.rates import Rate, measured_rate
from master.plan.ways import FULL, QLORA, Estimate, Task, all_estimates
from trainer.estimate.flops import flops_per_token
from trainer.estimate.peaks import device_peak
from trainer.estimate.speed import EFFICIENCY, work_per_token

MARK = "@@STEPS "
STEPS, LEAST_STEPS = 10, 3  # real ones, the first of which doesn't count
STEPS_S = 60.0  # that they should take
GUESSED = {"CPU": 3e10, "": 1e13}  # FLOP/s of a device that nothing is known of, for that alone
LIMIT_S = 600.0  # of a host, loading and all
SPREAD = 0.1  # of what was measured, by which a later run may differ
VERSIONS = ("torch", "deepspeed", "transformers")


@dataclass(frozen=True)
class Measured:
    """How fast a host alone made steps of a model: tokens a second of all its ranks, with which batch, when.

    `device`: the name of its devices; `peak_bytes`: the most that a rank held.
    """

    host: str
    model: str
    kind: str
    device: str
    versions: dict[str, str]
    ranks: int
    sequence: int
    micro: int
    accumulation: int
    checkpoints: bool
    zero_stage: int
    offload: str
    tokens_per_second: float
    peak_bytes: int
    read_at: float


@cache
def versions() -> dict[str, str]:
    """Return the versions here of what a training's speed depends on; they are looked for once."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure(task: Task, model: str, slots: Sequence[Slots], machines: Sequence[Machine], hostfile: Path | None,
            flags: Sequence[str], password: Mapping[str, str], say: Callable[[str], None]) -> list[Measured]:
    """Return what each host did; one that can't is told and left out. `flags`: of ssh, `password`: its variable."""
    found = []
    for host, machine in zip(slots, machines, strict=True):
        best = purest(task, machine, has_weights(model))
        if best is None:
            say(f"{machine.name}: {model} doesn't fit there alone: not measured")
            continue
        steps = steps_for(task, machine, best)
        say(f"{machine.name}: measuring {steps} steps")
        began = time.monotonic()
        result = steps_on(task, model, host, best, steps, hostfile, flags, password)
        if isinstance(result, str):
            say(f"{machine.name}: not measured: {result}")
            continue
        config = ROOT / preset_of(host, best)
        found.append(Measured(
            machine.name, model, best.way.kind, " + ".join(sorted(set(machine.devices))), versions(),
            int(result["ranks"]), int(result["sequence"]), int(result["micro"]), int(result["accumulation"]),
            bool(result["checkpoints"]), *way_of(config), float(result["tokens_per_second"]),
            int(result["peak_bytes"]), round(time.time(), 3)))
        say(f"{machine.name}: {found[-1].tokens_per_second:,.0f} tokens/s with micro batch {found[-1].micro}, "
            f"{time.monotonic() - began:.0f} s")
    return found


def purest(task: Task, machine: Machine, weights: bool) -> Estimate | None:
    """Return the way whose speed says most of a machine's devices: without offload or recomputing, of all weights.

    `weights`: they are here, without which none can be kept in 4 bits. None where nothing fits.
    """
    kinds = [kind for kind in task.kinds if weights or kind != QLORA]
    fitting = [each for each in all_estimates(replace(task, kinds=tuple(kinds)), [(machine,)], Network({}, {}), {})
               if each.fits and (each.way.stage, each.way.offload) in PRESETS]
    return min(fitting, default=None, key=lambda each: (
        bool(each.way.offload), each.way.batch.checkpoints, kinds.index(each.way.kind), each.way.stage))


def preset_of(host: Slots, best: Estimate) -> str:
    """Return the config that a host is measured with."""
    return ON_CPU if host.vendor == "CPU" else PRESETS[best.way.stage, best.way.offload]


def steps_for(task: Task, machine: Machine, best: Estimate) -> int:
    """Return how many steps to make, so that they take about a minute."""
    name = machine.devices[0]
    speed = (device_peak(name) or 0.0) * 1e12 * EFFICIENCY[1] or GUESSED.get(name, GUESSED[""])
    step = flops_per_token(task.shape, task.sequence, best.way.kind != FULL) * task.sequence * best.way.batch.micro
    return min(STEPS, max(LEAST_STEPS, int(STEPS_S * speed / step)))


def steps_on(task: Task, model: str, host: Slots, best: Estimate, steps: int, hostfile: Path | None,
             flags: Sequence[str], password: Mapping[str, str]) -> dict[str, Any] | str:
    """Return what the trainer told of its steps on one host, or why there were none."""
    way = best.way
    path = Path(model).expanduser()
    where = ["--hostfile", str(hostfile.absolute()), "--include", include_filter([host]) or host.host] \
        if hostfile else ["--slots", str(len(host.use))]
    words = [sys.executable, str(ROOT / "master" / "launch_training.py"), "--model",
             str(path.absolute()) if path.exists() else model, "--config", str(ROOT / preset_of(host, best)), *where,
             *flags, "--", "--measure", str(steps), "--sequence_length", str(task.sequence),
             "--global_batch_size", str(way.ranks * way.batch.micro)]
    words += [f"--{way.kind}", str(task.rank)] if way.kind != FULL else []
    words += ["--from_config"] if model != "tiny" and not has_weights(model) else []
    with tempfile.TemporaryDirectory(prefix="lanspeed-") as folder:  # where the run's folder goes
        try:
            done = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                  env={**os.environ, **password}, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"longer than {LIMIT_S:.0f} s"
    for line in done.stdout.splitlines():
        if MARK in line:
            try:
                result = loads(line[line.index(MARK) + len(MARK):])
            except ValueError:
                break
            if is_sound(result):
                return dict(result)
    said = [line for line in done.stderr.splitlines() if "error: " in line] or done.stderr.splitlines() or ["no output"]
    return f"{said[-1].strip()[:300]} ({shlex.join(words[1:6])} ... shows all)"


def is_sound(result: Any) -> bool:
    """Return whether a worker's line says what it should: it may be anybody's."""
    counts = ("ranks", "sequence", "micro", "accumulation", "peak_bytes")
    return isinstance(result, dict) and isinstance(result.get("checkpoints"), bool) and isinstance(
        result.get("tokens_per_second"), int | float) and 0 < result["tokens_per_second"] < 1e12 and all(
        isinstance(result.get(name), int) and 0 < result[name] < 1 << 50 for name in counts)


def has_weights(model: str) -> bool:
    """Return whether a model's weights are on this machine's disk; those of tiny never are."""
    path = Path(model).expanduser()
    if path.is_dir() or model == "tiny":
        return any(path.glob("*.safetensors"))
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(model, name), str) for name in names)


def keep(path: Path, measured: Sequence[Measured]) -> None:
    """Write what was measured into cluster.json, in place of what was before of the same host and model."""
    def change(cluster: dict[str, Any]) -> dict[str, Any]:
        new = {(each.host, each.model, each.kind): asdict(each) for each in measured}
        old = {(each["host"], each["model"], each["kind"]): each for each in cluster.get("measured", [])}
        return {**cluster, "measured": list((old | new).values())}

    try:
        update_cluster(path, change)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def known(cluster: Mapping[str, Any], model: str) -> list[Measured]:
    """Return what cluster.json has of a model with the versions that are here."""
    found = [Measured(**each) for each in cluster.get("measured", []) if each["model"] == model]
    return [each for each in found if each.versions == versions()]


def rates_of(task: Task, measured: Sequence[Measured]) -> dict[str, Rate]:
    """Return devices' FLOP/s by what was measured: on each host ("RTX 3090 on gpu1"), and the median of their name.

    What offloading took is in it: a host that needs offloading is measured with it.
    """
    by_device: dict[str, list[float]] = {}
    for each in measured:
        own = each.tokens_per_second / each.ranks * work_per_token(
            task.shape, each.sequence, each.kind != FULL, each.zero_stage, each.checkpoints, each.device != "CPU")
        for name in each.device.split(" + "):
            by_device.setdefault(name, []).append(own)
            by_device[f"{name} on {each.host}"] = [own]
    return {name: measured_rate(median(values), SPREAD, "measured") for name, values in by_device.items()}
