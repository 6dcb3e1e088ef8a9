"""What a hostile host says: made from the schemas that the readers themselves use, so that no kind is left out.

`wrong` gives values that a schema refuses, each for one reason; `extreme` gives one that it takes, as bad as can be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
# Clears the screen, writes the clipboard, begins a line of its own, is a link in rich's markup and ends a tag that
# isn't there, turns the direction of writing, and is no character at all.
ESCAPES = "\x1b[2J\x1b]52;c;QUFB\x07\r\n12:00:00 [0] forged [link=https://evil]x[/link][/] \u202e\u2028\ud800\x9b31m"
# A text for each pattern and format that schemas have, as odd as it allows.
PATTERNS = {
    r"^/[^\u0000-\u001f\u007f]*$": "/[bold]$(id);\u202e/..", r"^[A-Za-z0-9_.+:-]+$": "x86_64:+",
    "^[0-9a-f]{16}$": "0" * 16, "^[A-Za-z]$": "T",
    r"^[A-Za-z0-9_.-]+$": "..", r"^[0-9]+\.[0-9]+(\.[0-9]+)?[0-9A-Za-z.+-]*$": "99999.0",
    r"^(sm_[0-9]{1,5}|(?!sm_)[A-Za-z0-9_.:-]+)$": "gfx:..", r"^(?!.*\.\.)\w[\w./-]*$": "a/./-"}
FORMATS = {"ip-address": "fe80::1", "ip-interface": "10.0.0.1/0"}
VALUES: dict[str, Any] = {"null": None, "boolean": True, "integer": 1, "number": 1.5, "string": "x", "array": [],
                          "object": {}}
KNOWN = {"type", "description", "required", "additionalProperties", "properties", "maxLength", "pattern", "format",
         "minimum", "maximum", "enum", "const", "items", "maxItems", "minItems", "maxProperties", "propertyNames",
         "dependentRequired"}


def kinds_of(schema: Schema) -> list[str]:
    """The JSON types that a schema takes; fails for what this file has no cases for."""
    assert set(schema) <= KNOWN, f"no cases for {set(schema) - KNOWN}"
    named = schema.get("type", [])
    return [named] if isinstance(named, str) else list(named)


def text_of(schema: Schema) -> str:
    """The oddest text that a schema takes, as long as may be."""
    if "pattern" in schema:
        return PATTERNS[schema["pattern"]][: schema.get("maxLength")]
    if "format" in schema:
        return FORMATS[schema["format"]]
    return (ESCAPES * (schema["maxLength"] // len(ESCAPES) + 1))[: schema["maxLength"]]


def extreme(schema: Schema, high: bool) -> Any:
    """A value that a schema takes: with the largest numbers and oddest texts, or the smallest, empty, unknown."""
    kinds = kinds_of(schema)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][-1 if high else 0]
    if not kinds:
        return ESCAPES if high else None
    if not high and "null" in kinds:
        return None
    kind = next(one for one in kinds if one != "null")
    if kind == "object":
        names = schema.get("properties", {}) if high else schema.get("required", ())
        found = {name: extreme(schema["properties"][name], high) for name in names}
        if high and isinstance(more := schema.get("additionalProperties"), Mapping):
            found[text_of({"maxLength": 60, **schema["propertyNames"]})] = extreme(more, high)
        return found
    if kind == "array":
        return [extreme(schema["items"], high)] * max(2 if high else 0, schema.get("minItems", 0))
    if kind == "string":
        return text_of(schema) if high or {"pattern", "format"} & set(schema) else ""
    return {"boolean": high, "integer": schema.get("maximum" if high else "minimum"),
            "number": schema.get("maximum" if high else "minimum")}[kind]


def wrong(schema: Schema, good: Any) -> Iterator[Any]:
    """Values that a schema refuses, made of one that it takes."""
    kinds = kinds_of(schema)
    if "const" in schema or "enum" in schema:
        yield from ("nothing known", 5, [], {})
        return
    if not kinds:  # anything goes
        return
    for kind, value in VALUES.items():
        if kind not in kinds and not (kind == "integer" and "number" in kinds):
            yield value
    if {"integer", "number"} & set(kinds):
        yield from (schema["minimum"] - 1, schema["maximum"] * 2 + 1, 10**400, float("nan"), float("inf"))
    if "string" in kinds:
        yield "x" * (schema.get("maxLength", 1000) + 1)
        if {"pattern", "format"} & set(schema):
            yield ESCAPES
    if "array" in kinds:
        yield [extreme(schema["items"], True)] * (schema["maxItems"] + 1) if schema["maxItems"] < 1000 else [object]
        for each in wrong(schema["items"], good[0] if good else None):
            yield [each, *([each] * (schema.get("minItems", 1) - 1))]
    if "object" in kinds:
        yield from wrong_objects(schema, good or {})


def wrong_objects(schema: Schema, good: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Objects with one wrong value, without a name that must be there, with one that nobody knows."""
    for name, part in schema.get("properties", {}).items():
        for value in wrong(part, good.get(name)):
            if name != "event":  # by which the kind is told
                yield {**good, name: value}
        if name in schema.get("required", ()) and name != "event":
            yield {other: value for other, value in good.items() if other != name}
    if schema.get("additionalProperties") is False:
        yield {**good, "nobody knows it": 1}
    elif isinstance(more := schema.get("additionalProperties"), Mapping):
        for value in wrong(more, None):
            yield {"a": value}
        pattern = schema["propertyNames"].get("pattern")
        yield {"x" * (schema["propertyNames"]["maxLength"] + 1): extreme(more, True)}
        if pattern and not re.search(pattern, ESCAPES):
            yield {ESCAPES: extreme(more, True)}
