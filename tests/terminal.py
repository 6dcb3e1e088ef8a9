"""A person at a terminal: types commands and answers on a pty, and reads what stands there."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import time
from collections.abc import Callable, Sequence
from types import TracebackType

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")
PROMPT = re.compile(r"\[(\d+)\]% $")  # of the shell below: how the last command ended


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


class Shell:
    """A bash on a terminal: commands are typed, what they print is read without colours and cursor movements."""

    def __init__(self, words: Sequence[str], columns: int = 100) -> None:
        self.child, self.terminal = pty.fork()
        if self.child == 0:
            os.environ.update(PS1="[$?]% ", TERM="xterm", COLUMNS=str(columns))
            os.execvp(words[0], [*words, "bash", "--norc", "--noprofile", "-i"])
        self.screen = ""  # all that was printed
        self.read_to = 0  # how much of it was asked for
        self.wait_for("% ")

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _read(self, seconds: float) -> None:
        if select.select([self.terminal], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                text = ESCAPES.sub("", os.read(self.terminal, 65536).decode(errors="replace"))
                self.screen += text.replace("\r\n", "\n").replace("\r", "\n")  # a line that is written anew

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until a text comes; return what came up to its end. Fails with the screen."""
        end = time.monotonic() + seconds
        while (at := self.screen.find(text, self.read_to)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {seconds} s:\n{self.screen[-6000:]}"
            self._read(0.5)
        before, self.read_to = self.read_to, at + len(text)
        return self.screen[before : self.read_to]

    def until(self, happened: Callable[[], object], seconds: float = 60) -> None:
        """Read until something has happened elsewhere."""
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, self.screen[-6000:]
            self._read(0.5)

    def during(self, seconds: float) -> str:
        """Return what is printed in some seconds."""
        before, end = len(self.screen), time.monotonic() + seconds
        while time.monotonic() < end:
            self._read(0.2)
        return self.screen[before:]

    def type(self, line: str) -> None:
        """Type a line."""
        os.write(self.terminal, (line + "\n").encode())

    def press_ctrl_c(self) -> None:
        """Press Ctrl-C."""
        os.write(self.terminal, b"\x03")

    def end_of_command(self, seconds: float = 120, code: int | None = 0) -> str:
        """Wait for the shell's next prompt; return what came before it, which ended with this exit code."""
        end = time.monotonic() + seconds
        while not (found := PROMPT.search(self.screen, self.read_to)):
            assert time.monotonic() < end, f"not at an end in {seconds} s:\n{self.screen[-6000:]}"
            self._read(0.5)
        said, self.read_to = self.screen[self.read_to : found.start()], found.end()
        assert code is None or int(found[1]) == code, said
        assert "Traceback" not in said, said
        return said

    def run(self, line: str, seconds: float = 120, code: int | None = 0) -> str:
        """Type a command and return what it prints; it ends with this exit code (None: any)."""
        self.type(line)
        return self.end_of_command(seconds, code)

    def close(self) -> None:
        """Close the terminal, as a window is closed."""
        with contextlib.suppress(OSError):
            os.close(self.terminal)
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            for _ in range(50):
                if os.waitpid(self.child, os.WNOHANG)[0]:
                    return
                time.sleep(0.1)
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
