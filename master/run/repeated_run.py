"""A training as an earlier run's: its flags for a new run, and what is compared with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from master.run.command_record import flags_of, flags_to_repeat, joined
from master.run.launcher_process import read_object

VARIABLE = "LANSPEED_LIKE"  # by which the trainer gets what it compares
COMPARED = ("data_key", "git_commit", "world_size", "precision", "engine")
MOST = 200  # characters of a value
# The launcher's own names of what the trainer's flags say too.
LAUNCHERS = {"--model_name_or_path": "model", "--dataset_path": "dataset", "--deepspeed_config": "config"}


def take_flags(options: argparse.Namespace, before: Path, typed: Sequence[str]) -> list[str]:
    """Put an earlier run's model, data and config into the launcher's options, where nothing was typed for them; return
    its other flags for the trainer, before those that were `typed`.

    Of a run that this machine didn't start they are shown and asked about. Raises CommandError.
    """
    rest = []
    now = {flag for flag, _ in flags_of(typed)}
    named = [*(["--model_name_or_path", options.model] if options.model else []),
             *(["--dataset_path", *options.dataset] if options.dataset else [])]
    for flag, values in flags_of(flags_to_repeat(before, [*named, *typed], not options.dry_run, "--like")):
        name = LAUNCHERS.get(flag)
        if name == "config":
            options.config = options.config or (Path(values[0]) if values and Path(values[0]).is_file() else None)
        elif name == "dataset":
            options.dataset = options.dataset or values
        elif name == "model":
            options.model = options.model or values[0]
        elif flag != "--deepspeed" and flag not in now:
            rest.append((flag, values))
    return [*joined(iter(rest)), *typed]


def compared_facts(before: Path) -> dict[str, str]:
    """Return the variable that tells the trainer what an earlier run was like; {} where its run.json says nothing."""
    record = read_object(before / "run.json")
    facts: dict[str, Any] = {name: record[name] for name in COMPARED if isinstance(record.get(name), str | int)}
    versions = record.get("versions")
    if isinstance(versions, dict):
        facts["versions"] = {name: value for name, value in versions.items()
                             if isinstance(value, str) and len(name) + len(value) < MOST}
    return {VARIABLE: json.dumps({"run": before.name, **facts})[: 1 << 14]} if facts else {}
