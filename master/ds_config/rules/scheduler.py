"""Schedulers: the class that receives the arguments, its numbers of steps, and learning rates that never act."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from master.ds_config.problem import Config, Fix, Problem, Rules, shown
from master.ds_config.rules.classes import CODE_SCHEDULERS, DEEPSPEED_SCHEDULERS, TORCH_SCHEDULERS
from master.ds_config.rules.optimizer import OPTIMIZER, fails, number_fix
from master.ds_config.schema import node_of

RULES = Rules()
SCHEDULER = ("scheduler", "params")
APART = 1.5  # learning rates of optimizer and scheduler that differ by less are a rounding, not a misunderstanding


@RULES.add
def scheduler_type(config: Config) -> Iterator[Problem]:
    """A name that is no scheduler, missing and unknown arguments."""
    section = config.section("scheduler")
    name, params = section.get("type"), section.get("params")
    if config.has("scheduler") and not config.has("optimizer") and not config.for_trainer:
        yield Problem("no-effect", "info", ("scheduler",), "without an optimizer in the config or the program it is "
                      "dropped", "give an optimizer too, or take it out")
    if name is not None and not isinstance(name, str):
        yield fails("bad-value", ("scheduler", "type"), f"expected a name, got {shown(name)}", "write a name")
    if not isinstance(name, str):
        if isinstance(config.get("scheduler"), dict) and name is None:
            yield Problem("missing", "warning", ("scheduler",), "without a type the section is ignored",
                          "give a type, or take the section out")
        return
    found = {**DEEPSPEED_SCHEDULERS, **TORCH_SCHEDULERS}.get(name)
    if found is None:
        yield no_such_scheduler(name)
        return
    if not isinstance(params, dict):
        yield fails("missing", SCHEDULER, f"{name} is built from params, and there are none",
                    'write "params": {}' if not found[0] else f"give {', '.join(sorted(found[0]))}",
                    Fix("put", {}) if params is None and "params" in section and not found[0] else None)
        return
    sixteen = config.on("bf16", "enabled") or config.on("fp16", "enabled")
    if name in TORCH_SCHEDULERS and (config.stage or sixteen) and (config.has("optimizer") or config.for_trainer):
        yield fails("bad-combination", ("scheduler", "type"), f"torch's {name} can't drive ZeRO's optimizer, nor a "
                    "16-bit one", f"choose one of {', '.join(DEEPSPEED_SCHEDULERS)}")
    for key in sorted(found[0] - set(params)):
        yield fails("missing", (*SCHEDULER, key), f"{name} needs {key}", "give it" +
                    (' ("auto": the Trainer fills it)' if key == "total_num_steps" and config.for_trainer else ""))
    for key in params:
        if key not in found[0] | found[1]:
            near = difflib.get_close_matches(key, found[0] | found[1], 1)
            yield fails("unknown-argument", (*SCHEDULER, key), f"{name} takes no {key}",
                        f"did you mean {near[0]}?" if near else "take it out")


def no_such_scheduler(name: str) -> Problem:
    """Return the finding for a scheduler that nobody has, or that JSON can't describe."""
    path = ("scheduler", "type")
    if name in CODE_SCHEDULERS:
        return fails("not-in-json", path, f"{name} takes Python objects, which no config holds", "choose another")
    known = {known.lower(): known for known in (*DEEPSPEED_SCHEDULERS, *TORCH_SCHEDULERS)}
    if found := known.get(name.lower()):
        return fails("bad-value", path, f"there is no scheduler {name}", f"it is called {found}", Fix("put", found))
    near = difflib.get_close_matches(name.lower(), known, 1)
    return fails("bad-value", path, f"there is no scheduler {name}",
                 f"did you mean {known[near[0]]}?" if near else f"choose one of {', '.join(DEEPSPEED_SCHEDULERS)}")


@RULES.add
def scheduler_steps(config: Config) -> Iterator[Problem]:
    """Numbers of steps that the class refuses (lr_schedules.py), and a warm-up longer than the training."""
    name, params = str(config.section("scheduler").get("type")), config.section(*SCHEDULER)
    if name not in DEEPSPEED_SCHEDULERS:
        return
    for key, least in (("warmup_num_steps", 1), ("lr_range_test_step_size", 1), ("cycle_first_step_size", 1),
                       ("cycle_second_step_size", 0)):
        value: Any = params.get(key, "auto")
        if value == "auto" or (value is None and key == "cycle_second_step_size"):
            continue
        steps = value if isinstance(value, int) else -1
        if isinstance(value, float) and key.startswith("cycle"):
            steps = int(value)  # the only ones that take fractions
        if steps < least:
            whole = isinstance(value, float) and value.is_integer() and value >= least
            yield fails("bad-value", (*SCHEDULER, key), f"{name} takes integers from {least}, not {shown(value)}",
                        "correct it", Fix("put", int(value)) if whole else None)
    for key, value in params.items():
        node = node_of((*SCHEDULER, key)) or {}
        types = node.get("type", ())
        types = {types} if isinstance(types, str) else set(types)
        wrong = (isinstance(value, str) and value != "auto") or (value is None and "null" not in types)
        if wrong and types & {"number", "integer"}:
            yield fails("bad-value", (*SCHEDULER, key), f"expected a number, got {shown(value)}", "write a number",
                        number_fix(value) if "steps" not in key else None)
    warmup, total = params.get("warmup_num_steps"), params.get("total_num_steps")
    if isinstance(warmup, (int, float)) and isinstance(total, (int, float)) and total < warmup:
        yield Problem("bad-combination", "warning", (*SCHEDULER, "total_num_steps"),
                      f"{total:g} steps in all are less than the {warmup:g} of the warm-up", "correct one")


@RULES.add
def learning_rate_overridden(config: Config) -> Iterator[Problem]:
    """The optimizer's lr beside a scheduler that sets its own."""
    name, params = config.section("scheduler").get("type"), config.section(*SCHEDULER)
    keys = {"WarmupLR": "warmup_max_lr", "WarmupDecayLR": "warmup_max_lr", "OneCycle": "cycle_max_lr",
            "LRRangeTest": "lr_range_test_min_lr"}
    peak = params.get(keys.get(str(name), ""))
    rate = config.get(*OPTIMIZER, "lr")
    if not (isinstance(peak, (int, float)) and isinstance(rate, (int, float)) and peak > 0 and rate > 0):
        return
    if peak == rate:
        return
    far = str(name).startswith("Warmup") and max(peak / rate, rate / peak) >= APART
    yield Problem("lr-overridden", "warning" if far else "info", (*OPTIMIZER, "lr"), f"{name} sets the rate to "
                  f"{keys[str(name)]} {peak:g}: lr {rate:g} is never used", "make them equal")
