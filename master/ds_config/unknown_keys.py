"""Keys that DeepSpeed doesn't know: what was meant by them, and where it belongs."""

from __future__ import annotations

import difflib
import functools
from typing import Any

from master.ds_config.json_text import KeyPath
from master.ds_config.problem import PARSE, Fix, Problem
from master.ds_config.schema import COMMENT, is_checked, node_of, schema

# Names under which things are looked for in vain: printouts, other releases, other programs' spelling.
KNOWN_AS: dict[KeyPath, KeyPath] = {
    ("aio", "thread_count"): ("aio", "intra_op_parallelism"),
    ("activation_checkpointing", "partitioned_activations"): ("activation_checkpointing", "partition_activations"),
    ("activation_checkpointing", "num_checkpoints"): ("activation_checkpointing", "number_checkpoints"),
    ("bf16", "check_overflow"): ("bf16", "check_grad_overflow"),
    ("zero_optimization", "cpu_offload_params"): ("zero_optimization", "offload_param"),
    ("gradient_accumulation_dtype",): ("data_types", "grad_accum_dtype"),
    ("grad_accum_dtype",): ("data_types", "grad_accum_dtype"),
    ("monitor_config",): ("tensorboard (or wandb, csv_monitor, comet)",),
    ("comms_config",): ("comms_logger",),
    ("zero",): ("zero_optimization",),
    ("optimizer", "name"): ("optimizer", "type"),
    ("scheduler", "name"): ("scheduler", "type"),
    ("micro_batch_size",): ("train_micro_batch_size_per_gpu",),
}
# What Apex's and older releases' fp16 sections held; DeepSpeed's fp16 has no place for it.
DEAD: set[KeyPath] = {("fp16", "opt_level"), ("fp16", "fp16_scale_tolerance"), ("compile", "disable")}
SURE = 0.9  # likeness from which a name is a slip of the fingers, so that --fix may correct it


def unknown(path: KeyPath, section: dict[str, Any]) -> Problem:
    """Return the finding for a key that the schema lacks: an error where DeepSpeed refuses it, else a warning."""
    parent, key = path[:-1], str(path[-1])
    refused = is_checked(parent) and section[key] != "auto"
    level, phase = ("error", PARSE) if refused else ("warning", "")
    place = "in " + ".".join(map(str, parent)) if parent else "at the top level"
    what = "refused" if refused else "ignored silently"
    if COMMENT.match(key):
        return Problem("comment-key", level, path, f"no comments {place}: an unknown key is {what}",
                       "move it to the top level, or take it out", phase, Fix("remove"))
    how_to_fix, fix = suggestion(path, section)
    if path in DEAD:
        fix = Fix("remove")
    return Problem("unknown-key", level, path, f"no such key {place}: it is {what}", how_to_fix, phase, fix)


def suggestion(path: KeyPath, section: dict[str, Any]) -> tuple[str, Fix | None]:
    """Return how to fix an unknown key, and the fix itself if there is no doubt."""
    parent, key = path[:-1], str(path[-1])
    if known := KNOWN_AS.get(path):
        if known[:-1] == parent:
            return f"it is called {known[-1]}", _rename(parent, section, key, str(known[-1]))
        return f"write {'.'.join(map(str, known))}", None
    plain = key.lower().replace("-", "_")
    names = [name for name, node in (node_of(parent) or {}).get("properties", {}).items()
             if "x-removed" not in node and not node.get("deprecated")]
    near = [plain] if plain in names else difflib.get_close_matches(plain, names, 1, 0.75)
    if near:
        likeness = difflib.SequenceMatcher(None, plain, near[0]).ratio()
        return f"did you mean {near[0]}?", _rename(parent, section, key, near[0]) if likeness >= SURE else None
    if homes := _homes().get(plain):
        return f"it belongs in {' or '.join(homes[:3])}", None
    return "take it out", None


def _rename(parent: KeyPath, section: dict[str, Any], key: str, new: str) -> Fix | None:
    """Return the fix that renames a key, if the new name is free and its value fits there."""
    import jsonschema

    node = node_of((*parent, new))
    fits = node is not None and jsonschema.Draft7Validator(node).is_valid(section[key])
    return Fix("rename", new) if fits and new not in section else None


@functools.cache
def _homes() -> dict[str, list[str]]:
    """Return where each key of the schema stands."""
    found: dict[str, list[str]] = {}
    waiting: list[tuple[str, dict[str, Any]]] = [("", schema())]
    while waiting:
        place, node = waiting.pop(0)
        for name, inner in node.get("properties", {}).items():
            if not inner.get("doNotSuggest"):
                found.setdefault(name, []).append(place or "the top level")
                waiting.append((f"{place}.{name}".lstrip("."), inner))
    return found
