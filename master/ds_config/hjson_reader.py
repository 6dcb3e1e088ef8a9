"""Hjson as configs use it, read with places: `ds_config/json_text.py` makes a document of it.

Comments, trailing and missing commas, bare words and single quotes are taken as DeepSpeed's loader takes them, and
noted as slips, since strict JSON has none of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

KeyPath = tuple[str | int, ...]
BLANK = re.compile(r"[ \t\r\n]*")
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?[ \t]*$")
STRING = re.compile(r"""(["'])((?:\\.|(?!\1)[^\\])*)\1""", re.DOTALL)
BARE_KEY = re.compile(r"[^\s,:\[\]{}]+")
PYTHON = re.compile(r"(True|False|None)(?=[ \t]*([,}\]\r\n]|//|#|\Z))")
DIGITS = 300  # fewer than a float can hold
WORDS = {"true": True, "false": False, "null": None}
DEPTH = 64  # deeper than any config; Python's own stack is the reason for a bound


class TextError(ValueError):
    """The text is no config in any reading; `at` is the offset."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


@dataclass(frozen=True)
class Slip:
    """Something that strict JSON refuses, with the piece of text that would fix it."""

    what: str
    at: int
    end: int
    instead: str


@dataclass
class Node:
    """A value and its place: text[start:end]."""

    value: Any
    start: int
    end: int
    members: list[Member] = field(default_factory=list)
    items: list[Node] = field(default_factory=list)


@dataclass
class Member:
    """A key of an object, its place (with the quotes), and its value."""

    key: str
    start: int
    end: int
    node: Node


class Reader:
    """One pass over the text; Hjson's rules, as far as configs use them."""

    def __init__(self, text: str, slips: list[Slip], duplicates: list[tuple[KeyPath, int]]) -> None:
        self.text, self.slips, self.duplicates = text, slips, duplicates
        self.at, self.path = 0, []  # type: int, list[str | int]

    def document(self) -> Node:
        if self.text.startswith("\ufeff"):
            self.slip("a byte order mark", 0, 1)
            self.at = 1
        self.blank()
        if not self.peek():
            raise TextError("the file is empty", 0)
        if self.peek() in "{[":
            node = self.value()
        else:
            node = self.scalar()
            if self.slips and ":" in self.text[node.start : node.end + 1]:
                raise TextError("an object begins with {", node.start)
        self.blank()
        if self.at < len(self.text):
            raise TextError(f"text after the end: {self.text[self.at : self.at + 20].strip()!a}", self.at)
        return node

    def slip(self, what: str, start: int, end: int, instead: str = "") -> None:
        self.slips.append(Slip(what, start, end, instead))

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def blank(self) -> None:
        """Skip white space and comments."""
        while True:
            self.at = BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            start = self.at
            if self.text.startswith("/*", start):
                end = self.text.find("*/", start + 2)
                if end < 0:
                    raise TextError("a comment that never ends", start)
                self.at = end + 2
            elif self.text.startswith(("#", "//"), start):
                ends = [place for mark in "\r\n" if (place := self.text.find(mark, start)) >= 0]
                self.at = min(ends, default=len(self.text))
            else:
                return
            self.slip("a comment", start, self.at)

    def value(self) -> Node:
        if len(self.path) > DEPTH:
            raise TextError(f"nested deeper than {DEPTH} levels", self.at)
        if self.peek() == "{":
            return self.object()
        if self.peek() == "[":
            return self.array()
        return self.scalar()

    def object(self) -> Node:
        node = Node({}, self.at, 0)
        for start in self.entries("}"):
            key = self.key()
            end = self.at
            self.blank()
            if self.peek() != ":":
                raise TextError(f"expected : after the key {key!r}", self.at)
            self.at += 1
            self.blank()
            self.path.append(key)
            if key in node.value:
                self.duplicates.append((tuple(self.path), start))
            member = Member(key, start, end, self.value())
            self.path.pop()
            node.members.append(member)
            node.value[key] = member.node.value
        node.end = self.at
        return node

    def array(self) -> Node:
        node = Node([], self.at, 0)
        for _ in self.entries("]"):
            self.path.append(len(node.items))
            node.items.append(self.value())
            self.path.pop()
            node.value.append(node.items[-1].value)
        node.end = self.at
        return node

    def entries(self, closing: str) -> Iterator[int]:
        """Walk over the commas; the caller reads an entry at each offset that this yields."""
        opened = self.at
        self.at += 1
        comma, last = -1, -1
        while True:
            self.blank()
            if not self.peek():
                raise TextError(f"no {closing} for the {self.text[opened]} of line "
                                f"{self.text.count(chr(10), 0, opened) + 1}", len(self.text))
            if self.peek() == closing:
                if comma >= 0:
                    self.slip("a comma before the closing bracket", comma, comma + 1)
                self.at += 1
                return
            if last >= 0 and comma < 0:
                self.slip("no comma after this", last, last, ",")
            yield self.at
            last = self.at
            self.blank()
            comma = self.at if self.peek() == "," else -1
            self.at += comma >= 0

    def key(self) -> str:
        if self.peek() in "\"'":
            return self.string()
        match = BARE_KEY.match(self.text, self.at)
        if not match:
            raise TextError(f"expected a key, found {self.peek()!r}", self.at)
        self.slip("a key without quotes", self.at, match.end(), json.dumps(match.group()))
        self.at = match.end()
        return match.group()

    def scalar(self) -> Node:
        start = self.at
        if self.peek() in "\"'":
            if self.text.startswith("'''", start):
                raise TextError("a text in ''' is not for configs", start)
            return Node(self.string(), start, self.at)
        if self.peek() in ",:[]{}":
            raise TextError(f"expected a value, found {self.peek()!r}", start)
        if python := PYTHON.match(self.text, start):
            self.at = python.end()
            literal = {"True": "true", "False": "false", "None": "null"}[python.group()]
            self.slip(f"Python's {python.group()}", start, self.at, literal)
            return Node(WORDS[literal], start, self.at)
        for end in self.stops():
            word = self.text[start:end].rstrip(" \t")
            self.at = start + len(word)
            if word in WORDS:
                return Node(WORDS[word], start, self.at)
            if NUMBER.match(word):
                if len(word) > DIGITS or math.isinf(float(word)):
                    raise TextError(f"a number that is out of range: {word[:20]}", start)
                value: int | float = float(word) if re.search("[.eE]", word) else int(word)
                return Node(value, start, self.at)
        self.slip("a word without quotes: it is text up to the end of the line", start, self.at, json.dumps(word))
        return Node(word, start, self.at)

    def stops(self) -> Iterator[int]:
        """Yield where a bare word may end, the end of the line last."""
        for match in re.compile(r"[,}\]#\r\n]|//|/\*|\Z").finditer(self.text, self.at):
            yield match.start()
            if match.group() in ("\r", "\n", ""):
                return

    def string(self) -> str:
        match = STRING.match(self.text, self.at)
        if not match:
            raise TextError("a text without its closing quote", self.at)
        if re.search(r"[\x00-\x1f]", match[2]):
            raise TextError("a control character inside quotes (or a quote that is missing)", self.at)
        body = match[2]
        if match[1] == "'":
            body = re.sub(r"\\'", "'", body)
            body = re.sub(r'(?<!\\)((?:\\\\)*)"', r'\1\\"', body)
            self.slip("single quotes", match.start(), match.end(), f'"{body}"')
        try:
            text: str = json.loads(f'"{body}"')
        except ValueError:
            raise TextError(f"a backslash that means nothing in {match[0][:40]}", self.at) from None
        self.at = match.end()
        return text
