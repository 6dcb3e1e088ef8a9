"""Single values of a row: texts, tool definitions, tool calls. What can't be read without guessing is refused."""

from __future__ import annotations

import json
import math
from typing import Any

from trainer.errors import UserError


def object_or_json(value: Any) -> Any:
    """Return a value, or what a text holds that is a JSON list or object."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def plain_text(value: Any, where: str, name: str) -> str:
    """Return a value as text: a text, or a number or truth value as JSON writes it.

    Raises UserError for anything else: null, not a number, lists, objects.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    what = "null" if value is None else "not a number" if isinstance(value, float) else f"a {type(value).__name__}"
    raise UserError(f"{where}: {name} is {what}, not text")


def content_text(value: Any, where: str) -> str:
    """Return a message's content as text: one text, or the texts of its parts joined. Raises UserError for pictures."""
    if not isinstance(value, list):
        return plain_text(value, where, "its content")
    for part in value:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{where}: its content has a part that is no text: {kind}")
    return "".join(part["text"] for part in value)


def tool_definitions(value: Any, where: str) -> list[Any]:
    """Return what a column `tools` defines, each as {"type": "function", "function": {...}}; [] for none."""
    value = object_or_json(value)
    if value in (None, "", []):
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise UserError(f"{where}: column 'tools' is no list of objects")
    return [one if "function" in one or "name" not in one else {"type": "function", "function": one} for one in value]


def tool_call(value: Any, where: str) -> dict[str, Any]:
    """Return a tool call as {"type": "function", "function": {"name", "arguments": {...}}, ...}.

    Arguments that are a JSON object in a text become that object, which is what most chat templates write out.
    """
    value = object_or_json(value)
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call without the name of a function")
    arguments = object_or_json(function.get("arguments"))
    call = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    more = {name: one for name, one in value.items() if name != "function"} if function is not value else {}
    return {"type": "function", **more, "function": call}


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a table's row without the nulls inside its values: Arrow gives each object the keys of all others."""
    return {name: without_nulls(value) for name, value in row.items()}


def without_nulls(value: Any) -> Any:
    """Return a value without the nulls in its objects."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value
