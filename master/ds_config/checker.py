"""All that is known of a DeepSpeed config before it runs: the schema, and tables of small rules for the rest.

    problems = check(document, Target(world_size=8))

The schema's part is in schema.py, the rules are in rules/
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from master.core.run_cli import UserError
from master.core.terminal import say
from master.ds_config import schema_check
from master.ds_config.json_text import Document, KeyPath, TextError, strict_error
from master.ds_config.problem import INIT, LEVELS, PARSE, Config, Fix, Problem, Rule, Target, shown
from master.ds_config.rules import batch, contradictions, nodes, optimizer, parse, precision, scheduler, zero

RULES: list[Rule] = [rule for table in (parse, contradictions, batch, zero, optimizer, scheduler, precision, nodes)
                     for rule in table.RULES]


def check(document: Document, target: Target) -> list[Problem]:
    """Return what is wrong with a config, in the order of its lines; of several findings at a key, the gravest."""
    found = list(text_problems(document, target))
    root = document.value
    if target.trainer is False:
        root = hjson_numbers(root)
    if isinstance(root, dict):
        config = Config(root, target)
        found += schema_check.findings(root)
        for rule in RULES:
            found += rule(config)
    else:
        found.append(Problem("not-a-section", "error", (), f"a config is an object {{...}}, not {shown(root)}",
                             "write an object", PARSE))
    return sorted(_gravest(found), key=lambda problem: (document.place(problem.path), LEVELS.index(problem.level)))


def hjson_numbers(value: Any) -> Any:
    """Return a value as Hjson, DeepSpeed's loader, has it: whole numbers below 1e10 are integers, also 1.0 and 5e8."""
    if isinstance(value, dict):
        return {key: hjson_numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [hjson_numbers(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e10 else value


def _gravest(problems: list[Problem]) -> list[Problem]:
    """Drop findings where a more severe one, or an equal one with the same code, exists for the same key."""
    best: dict[KeyPath, int] = {}
    for problem in problems:
        rank = LEVELS.index(problem.level)
        best[problem.path] = min(rank, best.get(problem.path, rank))
    kept: dict[tuple[KeyPath, str], Problem] = {}
    for problem in problems:
        graver = best[problem.path] < LEVELS.index(problem.level) and problem.code in ("bad-value", "loose-type",
                                                                                       "wrong-stage", "no-effect")
        if not graver:
            kept.setdefault((problem.path, problem.code), problem)
    return list(kept.values())


def text_problems(document: Document, target: Target) -> Iterator[Problem]:
    """Yield what is wrong with the text itself: slips that only Hjson reads, and keys that stand twice."""
    for path, at in document.duplicates:
        same = document.member(path)
        first = document.line(at)[0]
        yield Problem("duplicate-key", "error", path, f"stands twice, also in line {first}: DeepSpeed refuses the "
                      "file, the Trainer takes the last one", "take one out", PARSE,
                      Fix("remove", "first") if same and _equal_twins(document, path) else None)
    if (refused := strict_error(document.text)) is None:
        return
    slips = document.slips
    places = sorted({document.line(slip.at)[0] for slip in slips})
    names = ", ".join(dict.fromkeys(slip.what.split(":")[0] for slip in slips)) or refused[0]
    lines = ", ".join(map(str, places[:5])) + (" ..." if len(places) > 5 else "")
    message = f"not JSON: {names} (line{'s' * (len(places) > 1)} {lines})" if places else f"not JSON: {names}"
    bare = any(slip.what.startswith("a word") for slip in slips)
    fix = None if bare or not slips else Fix("strict")
    python = [slip.what for slip in slips if slip.what.startswith("Python's")]
    if target.trainer is False and python:
        yield Problem("not-json", "error", (), f"{message}: DeepSpeed takes it for a text up to the end of the line",
                      "write true, false and null", PARSE, fix)
    elif target.trainer is False:
        yield Problem("not-json", "info", (), f"{message}; DeepSpeed reads it, the Trainer would not",
                      "put texts in quotes" if bare else "")
    else:
        yield Problem("not-json", "error", (), f"{message}; DeepSpeed alone reads it, the Trainer refuses it",
                      "put texts in quotes" if bare else "write plain JSON (--fix does)", INIT, fix)


def _equal_twins(document: Document, path: KeyPath) -> bool:
    """Return whether all the values of a duplicate key are the same."""
    parent = document.member(path[:-1])
    node = parent.node if parent else document.root
    duplicate_hosts = [member.node.value for member in node.members if member.key == path[-1]]
    return all(twin == duplicate_hosts[0] for twin in duplicate_hosts)


__all__ = ["INIT", "RULES", "Config", "Problem", "Target", "check"]


class ConfigError(UserError):
    """A DeepSpeed config that would be refused."""


def ensure_accepted(path: Path, ranks: int, name: str) -> None:
    """Say what is wrong with a config, called `name`; raise ConfigError if DeepSpeed or the Trainer would refuse it."""
    try:
        document = Document(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, TextError) as error:
        raise ConfigError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    problems = check(document, Target(trainer=True, completed=True, world_size=ranks))
    for problem in problems:
        if problem.level != "info":
            say(problem.line(name, document.line(document.place(problem.path))[0]))
    if errors := sum(problem.level == "error" for problem in problems):
        fixable = "invoke validate --fix" if any(problem.fix for problem in problems if problem.level == "error") else \
            "change it as said above, then invoke validate"
        raise ConfigError(f"{name} has {errors} error{'s' * (errors > 1)}: {fixable} {shlex.quote(name)}")
