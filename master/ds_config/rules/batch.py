"""Batch sizes against the number of ranks, and "auto": who fills it, and what happens where nobody does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from master.ds_config.problem import INIT, PARSE, STEP, Config, Fix, Problem, Rules, leaves, shown
from master.ds_config.rules.optimizer import checked_when
from master.ds_config.schema import COMMENT, fills_auto, is_checked, node_of

RULES = Rules()
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def solve(batch: Any, micro: Any, steps: Any, ranks: int) -> tuple[Any, Any, Any]:
    """Return all three as DeepSpeed derives them, by floor division (DeepSpeedConfig._set_batch_related_parameters).

    Raises TypeError for texts and ValueError where neither batch nor micro batch is given.
    """
    if batch is None and micro is None:
        raise ValueError
    if batch is None:
        steps = 1 if steps is None else steps
        batch = micro * steps * ranks
    elif micro is None:
        steps = 1 if steps is None else steps
        micro = batch // ranks // steps
    elif steps is None:
        steps = batch // micro // ranks
    return batch, micro, steps


@RULES.add
def batch_arithmetic(config: Config) -> Iterator[Problem]:
    """batch = micro batch x accumulation x ranks, with one of the first two given and all above 0."""
    given = {key: config.get(key) for key in BATCH}
    if "auto" in given.values():
        return  # the Trainer fills them; for plain DeepSpeed, auto_nobody_fills tells
    at: tuple[str, ...] = next(((key,) for key in BATCH if given[key] is not None), (BATCH[1],))
    if given[BATCH[0]] is None and given[BATCH[1]] is None:
        yield Problem("batch-missing", "error", (BATCH[1],), "neither train_batch_size nor "
                      "train_micro_batch_size_per_gpu is given", 'add "train_micro_batch_size_per_gpu": '
                      + ('"auto"' if config.for_trainer else "1"), PARSE)
        return
    for key, value in given.items():
        if isinstance(value, str) and value.isdecimal():
            given[key] = int(value)
            yield Problem("bad-value", "error", (key,), f"expected an integer, got {shown(value)}",
                          "write the number without quotes", PARSE, Fix("put", int(value)))
        elif value is not None and not isinstance(value, (int, float)):
            yield Problem("bad-value", "error", (key,), f"expected an integer, got {shown(value)}", "correct it", PARSE)
            return
    for key, value in given.items():
        if value is not None and not value > 0:
            yield Problem("bad-value", "error", (key,), f"must be above 0, not {shown(value)}", "correct it", PARSE)
            return
    ranks, shared = config.target.world_size, config.get("sequence_parallel_size", default=1)
    if ranks is not None and (not isinstance(shared, int) or shared < 1 or ranks % shared):
        yield Problem("bad-value", "warning", ("sequence_parallel_size",), f"{shown(shared)} ranks can't share a "
                      f"sequence where {ranks} train", "make it a divisor of the number of ranks")
    elif ranks is not None:
        yield from with_ranks(given, at, ranks // shared)
    elif given[BATCH[0]] is not None:
        yield from without_ranks(given)


@RULES.add
def groups_of_ranks(config: Config) -> Iterator[Problem]:
    """Ranks that share a model's layers (AutoTP) or its experts (AutoEP), in groups that must come out even.

    Else init_device_mesh or the groups' set-up fails, on some ranks with an IndexError, while the others wait.
    """
    ranks = config.target.world_size
    for path, on in ((("tensor_parallel", "autotp_size"), True),
                     (("expert_parallel", "autoep_size"), config.on("expert_parallel", "enabled"))):
        size = config.get(*path)
        if ranks and on and isinstance(size, int) and size > 1 and ranks % size:
            yield Problem("bad-value", "error", path, f"{ranks} rank{'s' * (ranks > 1)} can't be split into groups of "
                          f"{size}", "make it a divisor of the number of ranks", INIT)


def with_ranks(given: dict[str, Any], at: tuple[str, ...], ranks: int) -> Iterator[Problem]:
    """The sum for a known number of ranks."""
    try:
        batch, micro, steps = solve(given[BATCH[0]], given[BATCH[1]], given[BATCH[2]], ranks)
    except (ZeroDivisionError, OverflowError):
        batch, micro, steps = 0, 0, 0
    if micro > 0 and steps > 0 and batch == micro * steps * ranks:
        return
    batch, micro, steps = (given[key] for key in BATCH)
    factors = (("micro batch", micro), ("accumulation", steps))
    named = " x ".join(f"{name} {value:g}" for name, value in factors if value)
    what = f"is not {named} x {ranks} ranks" if micro else f"is no multiple of {named} x {ranks} ranks" if steps \
        else f"can't be shared by {ranks} ranks"
    yield Problem("batch-arithmetic", "error", at, f"a batch of {batch:g} {what}",
                  f"leave {BATCH[0]} out" if micro else f"make it a multiple of {ranks * (steps or 1):g}", PARSE)


def without_ranks(given: dict[str, Any]) -> Iterator[Problem]:
    """The sum for an unknown number of ranks: whether any fits, and which."""
    batch, micro, steps = given.values()
    part = (micro or 1) * (steps or 1)
    whole = batch % part == 0 if micro else batch // part >= 1
    if not whole:
        named = " x ".join(f"{value:g}" for value in (micro, steps) if value)
        yield Problem("batch-arithmetic", "error", (BATCH[0],), f"{batch:g} is no multiple of {named} "
                      "(micro batch x accumulation)", f"leave {BATCH[0]} out", PARSE)
    elif micro and steps:
        yield Problem("fixed-world-size", "info", (BATCH[0],), f"all three batch sizes are given: valid on exactly "
                      f"{batch // part:g} ranks", f"leave {BATCH[0]} out, and any number of ranks fits")
    else:
        yield Problem("fixed-world-size", "info", (BATCH[0],), "valid only where the number of ranks divides "
                      f"{batch // part:g}", f"give {BATCH[1]} instead, and any number of ranks fits")


# -- auto --------------------------------------------------------------------------------------------------------------


@RULES.add
def auto_nobody_fills(config: Config) -> Iterator[Problem]:
    """ "auto" for plain DeepSpeed, which knows no such word; and where the Trainer doesn't fill it."""
    for path, value in leaves(config.root):
        if value != "auto" or COMMENT.match(str(path[0])) or (path == ("steps_per_print",) and config.for_trainer):
            continue
        node = node_of(path) or {}
        own = not fills_auto(path) and ("auto" in node.get("enum", []) or node.get("pattern") == "^auto$")
        if config.for_trainer and not fills_auto(path):
            yield Problem("auto-unfilled", "error", path, 'the Trainer does not fill "auto" here, and refuses it',
                          _instead(node), INIT, Fix("remove") if own else None)
        elif not config.for_trainer and not own:
            yield plain_auto(config, path, node)


def plain_auto(config: Config, path: tuple[Any, ...], node: dict[str, Any]) -> Problem:
    """Return what plain DeepSpeed does with an "auto"."""
    if path[0] in ("steps_per_print", "gradient_clipping", "optimizer"):
        phase = checked_when(config) if path[0] == "optimizer" else STEP
        return Problem("auto-plain", "error", path, '"auto" stays a text, where a number is needed', _instead(node),
                       phase)
    if path[0] in BATCH:
        return Problem("auto-plain", "error", path, 'plain DeepSpeed knows no "auto"', _instead(node), PARSE)
    if is_checked(path[:-1]):
        default = node.get("default")
        level, phase = ("warning", "") if config.target.trainer is None else ("error", INIT)
        return Problem("auto-plain", level, path, f'plain DeepSpeed drops "auto" and takes {shown(default)}',
                       _instead(node), phase)
    return Problem("auto-plain", "error", path, 'plain DeepSpeed knows no "auto"', _instead(node), INIT)


def _instead(node: dict[str, Any]) -> str:
    if node.get("default") in (None, "auto"):
        return "write a value, or leave it out"
    return f"write a value, or leave it out ({shown(node['default'])})"


@RULES.add
def trainer_wants(config: Config) -> Iterator[Problem]:
    """What the Trainer asks for and DeepSpeed doesn't."""
    if config.has("zero_optimization") or config.target.completed or config.target.trainer is False:
        return
    level, phase = ("error", INIT) if config.for_trainer else ("info", "")
    yield Problem("trainer-needs-zero", level, ("zero_optimization",), "the Trainer refuses a config without it",
                  'add "zero_optimization": {"stage": 0}', phase)


@RULES.add
def null_for_the_trainer(config: Config) -> Iterator[Problem]:
    """null where DeepSpeed takes it for absent, and the Trainer or Accelerate looks into it."""
    for path in (("bf16",), *((key,) for key in BATCH)):
        if config.for_trainer and config.get(*path, default=1) is None:
            yield Problem("bad-value", "error", path, "the Trainer can't read null here", "take it out", INIT,
                          Fix("remove"))


@RULES.add
def old_bfloat16(config: Config) -> Iterator[Problem]:
    """The old name of bf16."""
    if not config.has("bfloat16"):
        return
    if config.get("bf16") is not None:
        yield Problem("renamed", "warning", ("bfloat16",), "not read where bf16 is given too", "take it out",
                      fix=Fix("remove"))
    elif config.for_trainer:
        yield Problem("renamed", "warning", ("bfloat16",), "the Trainer looks only at bf16", "call it bf16",
                      fix=Fix("rename", "bf16"))
    else:
        yield Problem("renamed", "info", ("bfloat16",), "the old name of bf16", "call it bf16",
                      fix=Fix("rename", "bf16"))


@RULES.add
def log_level(config: Config) -> Iterator[Problem]:
    """A level that DeepSpeed's logger doesn't know (it asks when the engine is built)."""
    level = config.get("log_level")
    names = (node_of(("log_level",)) or {})["enum"]
    if level is not None and level != "auto" and str(level).lower() not in names:
        yield Problem("bad-value", "error", ("log_level",), f"expected one of {', '.join(filter(None, names))}, got "
                      f"{shown(level)}", "correct it", INIT)


@RULES.add
def steps_and_clipping(config: Config) -> Iterator[Problem]:
    """Values that nothing checks until the first step."""
    every = config.get("steps_per_print", default=10)
    if not config.for_trainer and every not in (None, "auto") and (not isinstance(every, (int, float)) or every == 0):
        yield Problem("bad-value", "error", ("steps_per_print",), f"expected an integer above 0, got {shown(every)}",
                      "write null to print nothing", STEP)
    factor = config.get("gradient_predivide_factor", default=1.0)
    if factor != "auto" and not isinstance(factor, (int, float)):
        yield Problem("bad-value", "error", ("gradient_predivide_factor",), f"expected a number, got {shown(factor)}",
                      "write a number", STEP)
    step = config.get("flops_profiler", "profile_step", default=1)
    if config.get("flops_profiler", "enabled") and not isinstance(step, (int, float)) and step != "auto":
        yield Problem("bad-value", "error", ("flops_profiler", "profile_step"), f"expected an integer, got "
                      f"{shown(step)}", "write a number", STEP)
    clip = config.get("gradient_clipping", default=1.0)
    if clip != "auto" and not isinstance(clip, (int, float)):
        yield Problem("bad-value", "error", ("gradient_clipping",), f"expected a number, got {shown(clip)}",
                      "write 0 to switch it off" if clip is None else "write a number", STEP)
