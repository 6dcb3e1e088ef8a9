"""Optimizer and scheduler: the class that receives the arguments, and learning rates that never act."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from master.ds_problem import INIT, PARSE, STEP, Config, Fix, Problem, Rules, shown
from master.ds_rules.classes import (
    CODE_SCHEDULERS,
    DEEPSPEED_OPTIMIZERS,
    DEEPSPEED_SCHEDULERS,
    GONE_OPTIMIZERS,
    MUON,
    TORCH_ADAM,
    TORCH_OPTIMIZERS,
    TORCH_SCHEDULERS,
    UNSORTED,
    ZERO_TESTED,
)
from master.ds_schema import node_of

RULES = Rules()
OPTIMIZER, SCHEDULER = ("optimizer", "params"), ("scheduler", "params")
APART = 1.5  # learning rates of optimizer and scheduler that differ by less are a rounding, not a misunderstanding


def fails(code: str, path: tuple[str, ...], message: str, mend: str, fix: Fix | None = None) -> Problem:
    """Return an error of deepspeed.initialize."""
    return Problem(code, "error", path, message, mend, INIT, fix)


def optimizer_name(config: Config) -> str | None:
    """Return the optimizer's name as DeepSpeed reads it: its own in lower case, another as written."""
    name = config.section("optimizer").get("type")
    if not isinstance(name, str):
        return None
    return name.lower() if name.lower() in DEEPSPEED_OPTIMIZERS or name.lower() in UNSORTED else name


@RULES.add
def optimizer_type(config: Config) -> Iterator[Problem]:
    """A name that is no optimizer, or one that ZeRO doesn't take."""
    if isinstance(config.get("optimizer"), dict) and config.get("optimizer", "type") is None:
        yield Problem("missing", "warning", ("optimizer",), "without a type the section is ignored",
                      "give a type, or take the section out")
    name = optimizer_name(config)
    if name is None:
        return
    known = name in DEEPSPEED_OPTIMIZERS or name in UNSORTED
    if not known and name not in TORCH_OPTIMIZERS:
        yield no_such_optimizer(name)
    elif name not in ZERO_TESTED and config.stage > 0 and not config.on("zero_allow_untested_optimizer"):
        yield fails("untested-optimizer", ("optimizer", "type"), f"ZeRO does not take {name} untested",
                    "choose AdamW, or set zero_allow_untested_optimizer to true")
    if name in ("muadam", "muadamw", "musgd"):
        yield Problem("needs-package", "info", ("optimizer", "type"), "needs the package mup on every node",
                      "pip install mup there")


def no_such_optimizer(name: str) -> Problem:
    """Return the finding for a name that nobody has."""
    if name.lower() in GONE_OPTIMIZERS:
        return fails("removed", ("optimizer", "type"), f"{name} was removed from DeepSpeed with the 1-bit optimizers",
                     "choose AdamW; communication_data_type: bf16 halves the traffic")
    right = {known.lower(): known for known in TORCH_OPTIMIZERS}
    right |= {"fusedadam": "Adam", "deepspeedcpuadam": "Adam", "cpuadam": "Adam", "fusedlamb": "Lamb",
              "adamw_torch": "AdamW", "adamw_hf": "AdamW", "fusedadamw": "AdamW", "sparseadam": "SparseAdam"}
    if found := right.get(name.lower()):
        return fails("bad-value", ("optimizer", "type"), f"there is no optimizer {name}", f"it is called {found}",
                     Fix("put", found))
    near = difflib.get_close_matches(name.lower(), [*DEEPSPEED_OPTIMIZERS, *right], 1)
    return fails("bad-value", ("optimizer", "type"), f"there is no optimizer {name}",
                 f"did you mean {near[0]}?" if near else "choose AdamW, Adam, Lion, Muon or a class of torch.optim")


@RULES.add
def optimizer_arguments(config: Config) -> Iterator[Problem]:
    """Arguments that the class doesn't know; amsgrad where it is refused; max_grad_norm."""
    name, params = optimizer_name(config), config.section(*OPTIMIZER)
    if name is None:
        return
    if "max_grad_norm" in params:
        number = isinstance(params["max_grad_norm"], (int, float))
        yield Problem("removed", "error", (*OPTIMIZER, "max_grad_norm"), "no argument of DeepSpeed's optimizers",
                      "write gradient_clipping at the top level", INIT if number else PARSE)
    takes = arguments_of(name, config)
    for key in params if takes is not None else ():
        if key not in takes and key != "max_grad_norm":  # type: ignore[operator]
            near = ["lr"] if key == "learning_rate" else difflib.get_close_matches(key, takes or (), 1)
            yield fails("unknown-argument", (*OPTIMIZER, key), f"{config.get('optimizer', 'type')} takes no {key}",
                        f"did you mean {near[0]}?" if near else "take it out")
    offloaded = config.device("offload_optimizer") != "none"
    if config.on(*OPTIMIZER, "amsgrad") and not torch_adam(config) and name in ("adam", "adamw", "lamb") \
            and not (offloaded and name != "lamb"):
        yield fails("bad-value", (*OPTIMIZER, "amsgrad"), "DeepSpeed's fused optimizer has no AMSGrad",
                    "take it out, or set torch_adam to true")


def torch_adam(config: Config) -> bool:
    """Tell whether torch's Adam is asked for."""
    return bool(config.get(*OPTIMIZER, "torch_adam"))


def arguments_of(name: str, config: Config) -> set[str] | None:
    """Return the arguments that an optimizer takes under this config, None if that can't be said."""
    if name in ("adam", "adamw") and (torch_adam(config) or config.target.completed):
        return TORCH_ADAM | (DEEPSPEED_OPTIMIZERS["adam"][0] if not torch_adam(config) else set())
    if name in DEEPSPEED_OPTIMIZERS:
        return DEEPSPEED_OPTIMIZERS[name][config.device("offload_optimizer") != "none"]
    return TORCH_OPTIMIZERS.get(name)


@RULES.add
def optimizer_values(config: Config) -> Iterator[Problem]:
    """Numbers in quotes and the like."""
    params, strikes = config.section(*OPTIMIZER), checked_when(config)
    for key in ("lr", "eps", "weight_decay"):
        value = params.get(key, 0)
        if value != "auto" and (not isinstance(value, (int, float)) or value < 0):
            yield Problem("bad-value", "error", (*OPTIMIZER, key), f"expected a number >= 0, got {shown(value)}",
                          "write a number", strikes, _number_fix(value))
    if optimizer_name(config) == "LBFGS":
        yield Problem("bad-value", "error", ("optimizer", "type"), "LBFGS steps with a function that no engine "
                      "gives it", "choose another", STEP)
    if optimizer_name(config) == "muon":
        yield from muon(config)
    betas = params.get("betas", [0.9, 0.999])
    if betas != "auto" and not (isinstance(betas, list) and len(betas) == 2
                                and all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas)):
        yield Problem("bad-value", "error", (*OPTIMIZER, "betas"), f"expected two numbers from 0 to below 1, got "
                      f"{shown(betas)}", "write [0.9, 0.999]", strikes)
    elif betas != "auto" and strikes == INIT and any(isinstance(beta, int) for beta in betas):
        hjson = " (1e-9: 0.0 is read as 0)" if config.target.trainer is False else ""
        yield Problem("bad-value", "error", (*OPTIMIZER, "betas"), "torch's Adam takes fractions only, not 0",
                      f"write 0.0{hjson}", INIT)


def muon(config: Config) -> Iterator[Problem]:
    """Muon at stage 3 (stage3.py:361), and arguments that it passes over."""
    if config.stage == 3 and config.get("zero_optimization", "reduce_scatter", default=True) in (True, 1, "auto"):
        yield fails("bad-combination", ("optimizer", "type"), "at stage 3 Muon does not go with reduce_scatter",
                    "set zero_optimization.reduce_scatter to false")
    for key in config.section(*OPTIMIZER):
        if key not in MUON and key != "max_grad_norm":
            near = difflib.get_close_matches(key, MUON, 1)
            yield Problem("unknown-argument", "warning", (*OPTIMIZER, key), f"Muon passes over {key}",
                          f"did you mean {near[0]}?" if near else "take it out")


def checked_when(config: Config) -> str:
    """Return when numbers are looked at: torch's classes check them at once, DeepSpeed's kernels fail at the step."""
    own = optimizer_name(config) in TORCH_OPTIMIZERS or torch_adam(config) or config.target.completed
    return INIT if own else STEP


def _number_fix(value: Any) -> Fix | None:
    try:
        return Fix("put", float(value)) if isinstance(value, str) else None
    except ValueError:
        return None


# -- scheduler ---------------------------------------------------------------------------------------------------------


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
                        _number_fix(value) if "steps" not in key else None)
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
