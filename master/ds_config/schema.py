"""schemas/ds_config.schema.json: what it says of each key of a DeepSpeed config."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from master.core.paths import SCHEMAS
from master.ds_config.json_text import KeyPath

SCHEMA = SCHEMAS / "ds_config.schema.json"
COMMENT = re.compile(r"^(_|//|\$comment|comment)")


@functools.cache
def schema() -> dict[str, Any]:
    """Return the schema."""
    found: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return found


def node_of(path: KeyPath) -> dict[str, Any] | None:
    """Return what the schema says of a path, None if it knows nothing of it."""
    node: Any = schema()
    for step in path:
        inner = node.get("items") if isinstance(step, int) else node.get("properties", {}).get(step)
        if inner is None and isinstance(node.get("additionalProperties"), dict):
            inner = node["additionalProperties"]
        if not isinstance(inner, dict):
            return None
        node = inner
    return node


def section_of(path: KeyPath) -> KeyPath:
    """Return the path of the object that a path's value stands in, lists left out."""
    parent = path[:-1]
    while parent and isinstance(parent[-1], int):
        parent = parent[:-1]
    return parent[:-1] if path and isinstance(path[-1], int) else parent


def is_checked(path: KeyPath) -> bool:
    """Return whether DeepSpeed checks the values in this section."""
    return bool((node_of(path) or {}).get("x-checked"))


def fills_auto(path: KeyPath) -> bool:
    """Return whether the Trainer fills an "auto" here."""
    return bool((node_of(path) or {}).get("x-auto"))
