"""Optimizers: the class that receives the arguments, and what it refuses."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from master.ds_config.problem import INIT, PARSE, STEP, Config, Fix, Problem, Rules, shown
from master.ds_config.rules.classes import (
    DEEPSPEED_OPTIMIZERS,
    GONE_OPTIMIZERS,
    MUON,
    TORCH_ADAM,
    TORCH_OPTIMIZERS,
    UNSORTED,
    ZERO_TESTED,
)

RULES = Rules()
OPTIMIZER = ("optimizer", "params")


def fails(code: str, path: tuple[str, ...], message: str, how_to_fix: str, fix: Fix | None = None) -> Problem:
    """Return an error of deepspeed.initialize."""
    return Problem(code, "error", path, message, how_to_fix, INIT, fix)


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
        yield Problem("needs-package", "info", ("optimizer", "type"), "needs the package mup on every host",
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
    """Return whether torch's Adam is asked for."""
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
    params, phase = config.section(*OPTIMIZER), checked_when(config)
    for key in ("lr", "eps", "weight_decay"):
        value = params.get(key, 0)
        if value != "auto" and (not isinstance(value, (int, float)) or value < 0):
            yield Problem("bad-value", "error", (*OPTIMIZER, key), f"expected a number >= 0, got {shown(value)}",
                          "write a number", phase, number_fix(value))
    if optimizer_name(config) == "LBFGS":
        yield Problem("bad-value", "error", ("optimizer", "type"), "LBFGS steps with a function that no engine "
                      "gives it", "choose another", STEP)
    if optimizer_name(config) == "muon":
        yield from muon(config)
    betas = params.get("betas", [0.9, 0.999])
    if betas != "auto" and not (isinstance(betas, list) and len(betas) == 2
                                and all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas)):
        yield Problem("bad-value", "error", (*OPTIMIZER, "betas"), f"expected two numbers from 0 to below 1, got "
                      f"{shown(betas)}", "write [0.9, 0.999]", phase)
    elif betas != "auto" and phase == INIT and any(isinstance(beta, int) for beta in betas):
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


def number_fix(value: Any) -> Fix | None:
    """Return the fix for a number in quotes."""
    try:
        return Fix("put", float(value)) if isinstance(value, str) else None
    except ValueError:
        return None
