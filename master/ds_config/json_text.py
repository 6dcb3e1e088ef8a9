"""JSON as people write it: its keys with their places, its slips told, and rewritten without touching the rest.

DeepSpeed reads configs by Hjson (comments, trailing commas, bare words), the Trainer by strict JSON. This knows what
both make of a text. `master/validate_ds_config.py` uses it.
"""

from __future__ import annotations

import bisect
import json
import re
from typing import Any

from master.ds_config.hjson_reader import KeyPath, Member, Reader, Slip, TextError

__all__ = ["Document", "KeyPath", "TextError", "put", "remove", "rename", "strict_error"]


class Document:
    """A text that was read. Raises TextError for one that even Hjson refuses."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.slips: list[Slip] = []
        self.duplicates: list[tuple[KeyPath, int]] = []
        self._lines = [0, *(match.end() for match in re.finditer("\n", text))]
        self.root = Reader(text, self.slips, self.duplicates).document()

    @property
    def value(self) -> Any:
        """The root's value; of a duplicate key, the last."""
        return self.root.value

    def line(self, at: int) -> tuple[int, int]:
        """Return the line and the column of an offset, from 1."""
        number = bisect.bisect_right(self._lines, at)
        return number, at - self._lines[number - 1] + 1

    def member(self, path: KeyPath) -> Member | None:
        """Return the last key of a path, or None if it isn't written."""
        found, node = None, self.root
        for step in path:
            if isinstance(step, int):
                if step >= len(node.items):
                    return None
                node = node.items[step]
                continue
            found = next((member for member in reversed(node.members) if member.key == step), None)
            if found is None:
                return None
            node = found.node
        return found

    def place(self, path: KeyPath) -> int:
        """Return the offset of a path's key, or of the nearest one above that is written."""
        for length in range(len(path), 0, -1):
            if member := self.member(path[:length]):
                return member.start
        return self.root.start

    def strict(self) -> str:
        """Return the same as strict JSON: comments and spare commas gone, everything else as it was."""
        text = self.text
        for slip in sorted(self.slips, key=lambda slip: slip.at, reverse=True):
            start, end = slip.at, slip.end
            if slip.what == "a comment":
                before = text[: start].rstrip(" \t")
                newline = next((mark for mark in ("\r\n", "\n") if text.startswith(mark, end)), "")
                alone = before.endswith("\n") and newline
                start, end = len(before), end + (len(newline) if alone else 0)
            text = text[:start] + slip.instead + text[end:]
        return text


# -- edits -------------------------------------------------------------------------------------------------------------


def rename(document: Document, path: KeyPath, key: str) -> str:
    """Return the text with a key's name changed."""
    member = _must(document, path)
    return document.text[: member.start] + json.dumps(key) + document.text[member.end :]


def put(document: Document, path: KeyPath, value: Any) -> str:
    """Return the text with a key's value changed."""
    node = _must(document, path).node
    return document.text[: node.start] + json.dumps(value) + document.text[node.end :]


def remove(document: Document, path: KeyPath, first: bool = False) -> str:
    """Return the text without a key, its value and one comma. `first`: of duplicates, the first one."""
    parent = _must(document, path[:-1]).node if path[:-1] else document.root
    numbers = [number for number, member in enumerate(parent.members) if member.key == path[-1]]
    number = numbers[0 if first else -1]
    member, text = parent.members[number], document.text
    if number + 1 < len(parent.members):
        return text[: member.start] + text[parent.members[number + 1].start :]
    if number:
        return text[: parent.members[number - 1].node.end] + text[member.node.end :]
    return text[: parent.start + 1] + text[parent.end - 1 :]


def _must(document: Document, path: KeyPath) -> Member:
    member = document.member(path)
    if member is None:
        raise KeyError(path)
    return member


def strict_error(text: str) -> tuple[str, int] | None:
    """Return what strict JSON, as the Trainer reads it, refuses, and where; None if nothing."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg, error.pos
    except RecursionError:
        return "nested too deeply", 0
    return None
