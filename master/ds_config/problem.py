"""What is wrong with a DeepSpeed config, and the table that its rules are kept in; `checker.py` runs them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from master.ds_config.json_text import KeyPath
from master.ds_config.schema import fills_auto

LEVELS = ("error", "warning", "info")
PARSE, INIT, STEP = "parse", "init", "step"  # DeepSpeedConfig refuses; deepspeed.initialize fails; the first step does


@dataclass(frozen=True)
class Fix:
    """A change that is always safe. kind: rename (value: the new key), put (value), replace (new key and value), remove
    (value "first": of duplicates, the first), strict (the whole text as plain JSON).
    """

    kind: str
    value: Any = None


@dataclass(frozen=True)
class Problem:
    """One finding. level: error (it will be refused or fail), warning (ignored, or can't be meant), info (harmless).

    `phase`, for errors: when. `path`: the keys from the root. `how_to_fix`: what to do, a sentence without its full
    stop.
    """

    code: str
    level: str
    path: KeyPath
    message: str
    how_to_fix: str = ""
    phase: str = ""
    fix: Fix | None = None

    @property
    def json_path(self) -> str:
        """The path as $.a.b[0]."""
        return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path)

    def line(self, file: str, number: int) -> str:
        """Return the finding as one line of text."""
        command = self.how_to_fix.startswith(("pip ", "make ", "invoke "))
        text = self.how_to_fix if command else self.how_to_fix[:1].upper() + self.how_to_fix[1:]
        how_to_fix = f". {text}" if text else ""
        phase = f" [{self.phase}]" if self.phase else ""
        return f"{file}:{number}: {self.level} {self.json_path}: {self.message}{how_to_fix}{phase}"


@dataclass(frozen=True)
class Target:
    """What the config is for. Unknown things are None.

    `trainer`: True for the Hugging Face Trainer, False for plain DeepSpeed, None: as the config looks.
    `completed`: by trainer/train.py, which fills in what a config lacks. `world_size`: ranks. `hosts`: those of
    cluster.json that train.
    """

    trainer: bool | None = None
    completed: bool = False
    world_size: int | None = None
    hosts: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Config:
    """A config's root and what the rules often ask of it."""

    root: dict[str, Any]
    target: Target = field(default_factory=Target)

    def get(self, *path: str | int, default: Any = None) -> Any:
        """Return the value of a path, `default` where a part of it is missing."""
        node: Any = self.root
        for step in path:
            if not isinstance(node, dict) or step not in node:
                return default
            node = node[step]
        return node

    def has(self, *path: str) -> bool:
        """Return whether a path is written."""
        missing = object()
        return self.get(*path, default=missing) is not missing

    def section(self, *path: str) -> dict[str, Any]:
        """Return a section, {} if there is none or it is no object."""
        found = self.get(*path)
        return found if isinstance(found, dict) else {}

    def on(self, *path: str) -> bool:
        """Return whether a switch is on, in any of the spellings that DeepSpeed takes."""
        value = self.get(*path)
        return value in (True, 1) or (isinstance(value, str) and value.lower() in ("true", "t", "yes", "y", "on", "1"))

    @property
    def stage(self) -> int:
        """The ZeRO stage; "auto" is 2, as Accelerate fills it (0 for plain DeepSpeed)."""
        zero = self.get("zero_optimization")
        if isinstance(zero, bool):
            return int(zero)
        value = self.get("zero_optimization", "stage", default=0)
        if value == "auto":
            return 0 if self.target.trainer is False else 2
        try:
            return int(value)
        except (TypeError, ValueError, OverflowError):
            return 0

    def device(self, section: str) -> str:
        """Return where offload_optimizer or offload_param puts things: none, cpu or nvme."""
        old = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}[section]
        if self.on("zero_optimization", old):
            return "cpu"
        value = self.get("zero_optimization", section, "device")
        return value if value in ("cpu", "nvme") else "none"

    @functools.cached_property
    def for_trainer(self) -> bool:
        """True if the Trainer will read it: it was given, or a value that only the Trainer fills is "auto"."""
        if self.target.trainer is not None:
            return self.target.trainer
        return any(value == "auto" and fills_auto(path) for path, value in leaves(self.root))


Rule = Callable[[Config], Iterator[Problem]]


class Rules(list[Rule]):
    """A table of rules."""

    def add(self, rule: Rule) -> Rule:
        """Enter a rule; for use as a decorator."""
        self.append(rule)
        return rule


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Walk over all values that are no objects and no lists."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from leaves(part, (*path, number))
    else:
        yield path, value


def shown(value: Any) -> str:
    """Return a value as it stands in the file, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
