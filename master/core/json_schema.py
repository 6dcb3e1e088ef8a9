"""The first error of a JSON value against one of schemas/*.schema.json (draft 2020-12)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any


@functools.lru_cache(maxsize=8)
def validator(schema: Path) -> Any:
    """Return a schema's validator; jsonschema is loaded when the first value is checked."""
    import jsonschema

    return jsonschema.Draft202012Validator(json.loads(schema.read_text(encoding="utf-8")))


def first_error(schema: Path, value: Any) -> str | None:
    """Return the path and message of the first error, as in '$.hosts[0].name: 3 is not of type string', or None."""
    errors = sorted(validator(schema).iter_errors(value), key=lambda error: [str(part) for part in error.absolute_path])
    return f"{errors[0].json_path}: {errors[0].message[:200]}" if errors else None
