"""The error that a user can fix: one line that says where, what, and how to fix it."""

from __future__ import annotations

import re

OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


class UserError(Exception):
    """Ends the training with its message and an exit code; never shown with a traceback.

    `exit_code` is 1 for a fault in what was found, 2 for a wrong use of the command line. `shared` says that
    every rank meets the same fault (a wrong flag), so that rank 0 alone prints it.
    """

    def __init__(self, message: str, exit_code: int = 1, shared: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.shared = shared


def usage_error(message: str) -> UserError:
    """Return the UserError of a wrong command line (exit code 2)."""
    return UserError(message, exit_code=2, shared=True)


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))
