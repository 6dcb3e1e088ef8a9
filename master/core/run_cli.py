"""How every tool ends: exit code 0, or one line that says what is wrong and 1 for a fault found, 2 for wrong usage."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from master.core.terminal import say


class UserError(Exception):
    """Something that the user can fix: shown in one line, without a traceback; exit code 1."""


class UsageError(UserError):
    """A command line that can't be meant; exit code 2."""


def run_cli(work: Callable[[], int], stopped: str = "stopped") -> int:
    """Do the work of a tool and return its exit code; `stopped` is printed after Ctrl-C."""
    os.umask(os.umask(0) | 0o022)  # what a tool writes, others may not change
    try:
        code = work()
        if sys.stdout:
            sys.stdout.flush()  # here, where a full disk can be told
        return code
    except UserError as error:
        say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        say(stopped)
        return 1
    except BrokenPipeError:  # whoever read the output has seen enough
        drop_output()
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        say(f"error: {place}{error.strerror or error}")
        drop_output()
        return 1


def drop_output() -> None:
    """Forget what was printed and can't be written, which Python would try again at its end."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
