"""What the schema finds in a config: unknown keys, wrong values, removed and renamed names.

DeepSpeed checks only some sections (x-checked: pydantic, in its lax mode); there a wrong value is refused, and "2" for
2 is taken. In the others nothing is checked, and an unknown key is ignored silently.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from master.ds_config.json_text import KeyPath
from master.ds_config.problem import PARSE, Fix, Problem, shown
from master.ds_config.schema import COMMENT, is_checked, schema, section_of
from master.ds_config.unknown_keys import unknown

TRUE, FALSE = {"1", "on", "t", "true", "y", "yes"}, {"0", "off", "f", "false", "n", "no"}
NOUNS = {"integer": "an integer", "number": "a number", "string": "a text", "boolean": "true or false",
         "array": "a list", "object": "an object {...}", "null": "null"}


def findings(root: dict[str, Any]) -> Iterator[Problem]:
    """Yield what the schema has against a config."""
    import jsonschema  # here: it takes a tenth of a second to load

    for error in jsonschema.Draft7Validator(schema()).iter_errors(root):
        path = tuple(error.absolute_path)
        if path[:1] == ("bfloat16",) and root.get("bf16") is not None:
            continue  # not read: rules/batch.py tells
        if error.validator == "additionalProperties":
            known = error.schema.get("properties", {})
            for key in error.instance:
                if key not in known and not (COMMENT.match(key) and "patternProperties" in error.schema):
                    yield unknown((*path, key), error.instance)
        elif error.validator == "not":
            # rules/optimizer.py knows more of max_grad_norm; an "auto" is dropped before its type is looked at
            dropped = error.instance == "auto" and "x-removed" not in error.schema
            if path[0] != "optimizer" and not dropped:
                yield not_settable(path, error.instance, error.schema)
        else:
            yield from value_breach(path, error.instance, error.schema)


def not_settable(path: KeyPath, value: Any, node: dict[str, Any]) -> Problem:
    """Return the finding for a key that DeepSpeed refuses whatever its value."""
    if "x-removed" not in node:
        return Problem("not-in-json", "error", path, node["description"], "leave it out", PARSE, Fix("remove"))
    off = not value or (isinstance(value, dict) and value.get("enabled", True) is False)
    return Problem("removed", "error", path, "removed from DeepSpeed, which refuses it even if it is off",
                   f"take it out ({node['x-removed']})", PARSE, Fix("remove") if off else None)


# -- values ------------------------------------------------------------------------------------------------------------


def value_breach(path: KeyPath, value: Any, node: dict[str, Any]) -> Iterator[Problem]:
    """Yield the finding for a value that the schema doesn't have."""
    if value == "auto" and isinstance(path[-1], str):
        return  # dropped by DeepSpeed, filled or refused by the Trainer: rules/batch.py
    wanted = expected(node)
    if not is_checked(section_of(path)):
        any_case = isinstance(value, str) and value.lower() in [str(word).lower() for word in node.get("enum", ())]
        if not any_case and (value is not None or "default" not in node):
            yield Problem("bad-value", "warning", path, f"expected {wanted}, got {shown(value)}; DeepSpeed does not "
                          "check this section", "correct it")
        return
    try:
        taken = coerce(node, value)
    except ValueError:
        level, phase = ("warning", "") if "x-open" in node and isinstance(value, str) else ("error", PARSE)
        yield Problem("bad-value", level, path, f"expected {wanted}, got {shown(value)}", _closest(node, value),
                      phase, _case_fix(node, value))
        return
    yield Problem("loose-type", "info", path, f"{shown(value)} is taken as {shown(taken)}", f"write {shown(taken)}",
                  fix=Fix("put", taken))


def expected(node: dict[str, Any]) -> str:
    """Return in words what a value may be."""
    if "enum" in node:
        values = list(dict.fromkeys(str(value).lower() for value in node["enum"] if value is not None))
        return "one of " + ", ".join(values)
    words = [NOUNS[name] for name in _types(node)] + (['"auto"'] if node.get("pattern") == "^auto$" else [])
    text = " or ".join(words)
    for key, symbol in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<")):
        text += f" {symbol} {node[key]:g}" if key in node else ""
    return text


def _types(node: dict[str, Any]) -> list[str]:
    types = node.get("type", [])
    types = [types] if isinstance(types, str) else list(types)
    return [name for name in types if name != "string"] if node.get("pattern") == "^auto$" else types


def _closest(node: dict[str, Any], value: Any) -> str:
    words = [word for word in node.get("enum", []) if isinstance(word, str)]
    near = difflib.get_close_matches(str(value).lower(), words, 1)
    return f'did you mean "{near[0]}"?' if near else "correct it"


def _case_fix(node: dict[str, Any], value: Any) -> Fix | None:
    if isinstance(value, str) and value.lower() in node.get("enum", []):
        return Fix("put", value.lower())
    if value is False and "object" in _types(node) and "null" in _types(node):
        return Fix("remove")
    return None


def coerce(node: dict[str, Any], value: Any) -> Any:
    """Return a value as DeepSpeed's lax models (pydantic 2) take it; raise ValueError where they refuse it."""
    types = _types(node)
    if not types:
        return value
    if node.get("pattern") == "^auto$" and isinstance(value, str) and "x-auto" not in node:
        raise ValueError  # a Union of text and integer: the text must be "auto"
    for name in types:
        try:
            taken = _as(name, value)
            _within(node, taken)
            return taken
        except (ValueError, OverflowError):
            continue
    raise ValueError


def _as(name: str, value: Any) -> Any:
    """Return the value as a JSON type, by pydantic's rules for Python values."""
    if name == "integer":
        return _integer(value)
    if name == "number" and (number := _number(value)) is not None:
        return number
    if name == "boolean":
        if isinstance(value, bool):
            return value
        word = value.lower() if isinstance(value, str) else str(int(value)) if value in (0, 1) else ""
        if word in TRUE | FALSE:
            return word in TRUE
    exact: dict[str, type] = {"string": str, "array": list, "object": dict, "null": type(None)}
    if name in exact and isinstance(value, exact[name]):
        return value
    raise ValueError


def _integer(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+(_\d+)*(\.0*)?\s*", value):
        return int(value.strip().partition(".")[0])
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise ValueError


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        value = value.strip()
        return float(value) if re.fullmatch(r"[-+]?(\d[\d_]*)?\.?\d*([eE][-+]?\d+)?|[-+]?(inf|infinity|nan)", value,
                                            re.IGNORECASE) and value else None
    return float(value) if isinstance(value, (int, float)) else None


def _within(node: dict[str, Any], value: Any) -> None:
    """Raise ValueError for a value outside the node's bounds."""
    if "enum" in node and value not in node["enum"]:
        raise ValueError
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        above = value >= node.get("minimum", -math.inf) and value > node.get("exclusiveMinimum", -math.inf)
        below = value <= node.get("maximum", math.inf) and value < node.get("exclusiveMaximum", math.inf)
        if not (above and below):
            raise ValueError
    if isinstance(value, list) and "items" in node:
        for item in value:
            coerce(node["items"], item)
