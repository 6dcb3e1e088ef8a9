"""Saving on a disk that may be full: a write that fails is noted, and raises nothing while all ranks save together.

A rank that left in the middle would keep the others waiting at a barrier. So each writes what it can, and afterwards
they tell each other what went wrong.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError

Faults = list[str]


def noting(faults: Faults, function: Callable[..., Any], *more: type[Exception]) -> Callable[..., Any]:
    """Return a function that writes as `function` does, and notes why it can't; `more`: errors that say so too."""

    kinds: tuple[type[Exception], ...] = (OSError, SafetensorError, *more)

    @functools.wraps(function)
    def careful(*words: Any, **options: Any) -> Any:
        try:
            return function(*words, **options)
        except kinds as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            faults.append(reason_of(error))
            return None

    return careful


def reason_of(error: Exception) -> str:
    """Return what an error of a write says, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):  # which don't say why
        return "the file could not be written whole: no space left?"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module or an object another function for a while."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)  # its class has it
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def noted_faults(engine: Any) -> Iterator[Faults]:
    """While entered, what torch.save and DeepSpeed's `engine` (or any other model) can't write is noted.

    DeepSpeed writes `latest` before its last barrier; whoever enters this writes it.
    """
    faults: Faults = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(torch, "save", noting(faults, torch.save, RuntimeError)))
        if hasattr(engine, "checkpoint_engine"):
            keeper = engine.checkpoint_engine
            stack.enter_context(replaced(keeper, "makedirs", noting(faults, keeper.makedirs)))
            script = engine._copy_recovery_script
            stack.enter_context(replaced(engine, "_copy_recovery_script", noting(faults, script)))
            save = functools.partial(engine.save_checkpoint, save_latest=False)
            stack.enter_context(replaced(engine, "save_checkpoint", save))
        yield faults
