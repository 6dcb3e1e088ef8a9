"""A person at a terminal: runs a command on a pty and types an answer after each prompt."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import time
from collections.abc import Sequence


def type_into(command: Sequence[str], answers: dict[str, str], seconds: float = 60) -> tuple[int, str]:
    """Run a command on a terminal of its own; return exit code and screen. Each prompt is answered once."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(command[0], list(command))
    screen, waiting, end = "", dict(answers), time.monotonic() + seconds
    with contextlib.suppress(OSError):  # the terminal closes with the command
        while time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                screen += os.read(terminal, 4096).decode(errors="replace")
                for prompt in [prompt for prompt in waiting if prompt in screen]:
                    os.write(terminal, (waiting.pop(prompt) + "\n").encode())
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), screen
