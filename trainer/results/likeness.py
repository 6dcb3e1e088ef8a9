"""A run that is to be like an earlier one: in what it differs, said before its first step."""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "LANSPEED_LIKE"
NAMES = {"data_key": "the data, or how they are prepared", "git_commit": "lanspeed's commit",
         "world_size": "the number of ranks", "precision": "the precision", "engine": "the engine"}
ONLY_SAME = ("data_key",)  # a hash says nothing by itself


def differences(facts: dict[str, Any]) -> list[str]:
    """Return in what this run's facts differ from those of the run that it is to be like, [] where it is to be none."""
    try:
        earlier = json.loads(os.environ.get(VARIABLE, "{}"))
    except ValueError:
        return []
    if not isinstance(earlier, dict) or not earlier:
        return []
    found = []
    for name, what in NAMES.items():
        then, now = earlier.get(name), facts.get(name)
        if then is not None and then != now:
            found.append(f"{what} differ" if name in ONLY_SAME else f"{what}: {then} then, {now} now")
    then, now = earlier.get("versions"), facts.get("versions")
    if isinstance(then, dict) and isinstance(now, dict):
        found += [f"{name}: {then.get(name) or 'none'} then, {now.get(name) or 'none'} now"
                  for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    head = f"like {str(earlier.get('run'))[:100]}"
    return [f"{head}, but {line}" for line in found] or [f"{head} in data, versions and machines"]
