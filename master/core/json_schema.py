"""The first error of a JSON value against one of schemas/*.schema.json (draft 2020-12), and JSON that is only JSON."""

from __future__ import annotations

import functools
import ipaddress
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MOST_ERRORS = 20  # of which the first by its path is told; a value made up by somebody may have millions


@functools.lru_cache(maxsize=64)
def validator(schema: Path, definition: str = "") -> Any:
    """Return the validator of a schema, or of one of its $defs; jsonschema is loaded when the first value is checked.

    1.0 is no integer, as it is none in Python, and NaN no number. Raises KeyError for a definition that isn't there.
    """
    import jsonschema

    base = jsonschema.Draft202012Validator
    kinds = base.TYPE_CHECKER.redefine_many({
        "integer": lambda _, value: type(value) is int,
        "number": lambda _, value: type(value) is int or (type(value) is float and math.isfinite(value))})
    formats = jsonschema.FormatChecker(())
    for name, read in (("ip-address", ipaddress.ip_address), ("ip-interface", ipaddress.ip_interface)):
        formats.checks(name, ValueError)(accepts(read))
    whole = json.loads(schema.read_text(encoding="utf-8"))
    found = {**whole["$defs"][definition], "$defs": whole["$defs"]} if definition else whole
    return jsonschema.validators.extend(base, type_checker=kinds)(found, format_checker=formats)


def accepts(read: Callable[[str], object]) -> Callable[[object], bool]:
    """Return the check of a format by a function that raises ValueError for what isn't in it."""
    return lambda value: not isinstance(value, str) or bool(read(value.partition("%")[0]))


def definitions(schema: Path) -> list[str]:
    """Return the names of a schema's $defs."""
    return list(json.loads(schema.read_text(encoding="utf-8"))["$defs"])


def first_error(schema: Path, value: Any, definition: str = "") -> str | None:
    """Return the path and message of the first error, as in '$.hosts[0].name: 3 is not of type string', or None."""
    some = itertools.islice(validator(schema, definition).iter_errors(value), MOST_ERRORS)
    errors = sorted(some, key=lambda error: [str(part) for part in error.absolute_path])
    return f"{errors[0].json_path}: {errors[0].message[:200]}" if errors else None


def loads(text: str | bytes) -> Any:
    """Return a JSON value; NaN and Infinity, which JSON doesn't have, are refused. Raises ValueError."""
    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None
