"""Safe fixes of a DeepSpeed config, made in its text so that order and formatting stay."""

from __future__ import annotations

from collections import Counter

from master.ds_config.checker import check
from master.ds_config.json_text import Document, KeyPath, TextError, put, remove, rename
from master.ds_config.problem import Problem, Target

ROUNDS = 500  # more fixes than any config needs; each round makes one


def apply_fixes(text: str, target: Target) -> tuple[str, list[Problem]]:
    """Return the text with every safe fix applied, and the problems that they solved.

    A fix is undone if it brings up anything that wasn't there before: a config never gets worse. Raises TextError.
    """
    done: list[Problem] = []
    refused: set[tuple[str, KeyPath]] = set()
    problems = check(Document(text), target)
    for _ in range(ROUNDS):
        problem = next((each for each in problems if each.fix and (each.code, each.path) not in refused), None)
        if problem is None:
            break
        try:
            changed = apply(Document(text), problem)
            after = check(Document(changed), target)
        except TextError:
            after = None
        if after is None or changed == text or any(_kinds(after, problem) - _kinds(problems, problem)):
            refused.add((problem.code, problem.path))
            continue
        text, problems = changed, after
        done.append(problem)
    return text, done


def _kinds(problems: list[Problem], fixed: Problem) -> Counter[tuple[str, str, KeyPath]]:
    """Return the findings as they can be compared: a renamed key's are those of its old name."""
    old, new, fix = fixed.path, fixed.path, fixed.fix
    if fix and fix.kind in ("rename", "replace"):
        new = (*old[:-1], fix.value if fix.kind == "rename" else fix.value[0])

    def before(path: KeyPath) -> KeyPath:
        return old + path[len(new):] if path[: len(new)] == new else path

    return Counter((problem.code, problem.level, before(problem.path)) for problem in problems)


def apply(document: Document, problem: Problem) -> str:
    """Return the text with one fix applied."""
    fix = problem.fix
    if fix is None:
        return document.text
    if fix.kind == "strict":
        return document.strict()
    if fix.kind == "rename":
        return rename(document, problem.path, fix.value)
    if fix.kind == "replace":
        return rename(Document(put(document, problem.path, fix.value[1])), problem.path, fix.value[0])
    if fix.kind == "put":
        return put(document, problem.path, fix.value)
    return remove(document, problem.path, first=fix.value == "first")
