"""What was typed after `invoke`: which tasks, each with its own words, and what a mistyped one may mean."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from master.core.run_cli import UsageError
from master.core.tool_parser import ToolParser, takes_value

ParserOf = Callable[[str], ToolParser | None]


def split_tasks(words: Sequence[str], tasks: Collection[str], parser_of: ParserOf) -> list[tuple[str, list[str]]]:
    """Return each task with the words that follow it, up to the next task.

    A task's name that is a flag's value, or a file that is there, begins no task. `parser_of`: a task's parser, None
    for a task of invoke's own. Raises UsageError for a first word that is no task.
    """
    found: list[tuple[str, list[str]]] = []
    parser: ToolParser | None = None
    for number, word in enumerate(words):
        is_value = number > 0 and parser is not None and takes_value(words[number - 1], parser)
        if word in tasks and not is_value and not (found and parser and Path(word).exists()):
            found.append((word, []))
            parser = parser_of(word)
        elif found:
            found[-1][1].append(word)
        else:
            raise UsageError(no_task(word, tasks))
    return found


def no_task(word: str, tasks: Collection[str]) -> str:
    """Return what is said of a word that is no task."""
    near = difflib.get_close_matches(word.replace("_", "-"), tasks, n=1)
    return f"no task {word}{f': did you mean {near[0]}?' if near else ''} (invoke --list)"


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command line that may be shown: without passwords and the values of --env, which may be tokens."""
    shown: list[str] = []
    for number, word in enumerate(words):
        before = words[number - 1] if number else ""
        flag, equals, value = word.partition("=")
        if is_password(before) and not word.startswith("-"):
            shown.append("***")
        elif equals and is_password(flag):
            shown.append(f"{flag}=***")
        elif before == "--env":
            shown.append(without_value(word))
        elif equals and flag == "--env":
            shown.append(f"--env={without_value(value)}")
        else:
            shown.append(word)
    return shown


def is_password(flag: str) -> bool:
    """Return whether a flag's value is a password, however it is mistyped."""
    name = flag.replace("_", "-")
    return name.startswith("--ssh-pa") and not name.startswith("--ssh-password-")


def without_value(setting: str) -> str:
    """Return NAME=VALUE without its value."""
    name, equals, _ = setting.partition("=")
    return name + ("=***" if equals else "")
