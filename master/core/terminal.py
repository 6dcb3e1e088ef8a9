"""What a person sees while tools work: progress on stderr, plain lines where there is no terminal.

Whatever a tool prints goes through `say` or `print_lines`: text of hosts and files does nothing to a terminal, and
begins no line of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.text import Text

T = TypeVar("T")
NAMED = 6  # hosts that are listed while they are waited for; of more only the number


def say(*lines: str) -> None:
    """Print lines of progress, each cleaned."""
    with survive_closed_terminal():
        print("\n".join(map(one_line, lines)), file=sys.stderr, flush=True)


def print_lines(*lines: str) -> None:
    """Print lines of a result, each cleaned."""
    with survive_closed_terminal():
        print("\n".join(map(one_line, lines)), flush=True)


@contextlib.contextmanager
def survive_closed_terminal() -> Iterator[None]:
    """Let a line be lost whose terminal is gone: what is printed ends no training. A full disk is an error."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def one_line(text: str) -> str:
    """Return text that stays in its line and does nothing to a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def listed(names: Sequence[str]) -> str:
    """Return names for a sentence, at most four of them."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def plural(count: int, noun: str) -> str:
    """Return a number with its noun: 0 errors, 1 error."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def confirm(question: str) -> bool:
    """Ask a question on the terminal; return True for yes. Anything else, the end of the input or Ctrl-C is a no."""
    print(f"{one_line(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        return False


def is_terminal() -> bool:
    """Return whether progress is read on a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class HostTable:
    """A table that grows by a row as each host answers; on a terminal the line below lists the hosts that haven't
    answered.

    Rows may come from any thread. Use as a context manager.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._waiting = list(hosts)
        self._wide = max(map(len, hosts), default=0)
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._live: Any = None

    def __enter__(self) -> HostTable:
        if is_terminal():
            from rich.console import Console  # here: it takes a twentieth of a second to load
            from rich.live import Live

            self._live = Live(get_renderable=self._line, console=Console(stderr=True, highlight=False),
                              refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def tell(self, host: str, way: str, text: str, failed: bool = False) -> None:
        """Print a host's row: how it was reached (or 'failed'), and what came of it."""
        row = f"{host:{self._wide}}  {way:8}  {one_line(text)}"
        with self._lock:
            if host in self._waiting:
                self._waiting.remove(host)
            if self._live:
                self._live.console.print(row, style="red" if failed else None, markup=False, soft_wrap=True)
            else:
                say(row)

    def paused(self, ask: Callable[..., T] | None) -> Callable[..., T] | None:
        """Return a question that is asked without the moving line in its way."""
        if ask is None or self._live is None:
            return ask

        def asking(*words: Any) -> T:
            self._live.stop()
            try:
                return ask(*words)
            finally:
                self._live.start(refresh=True)

        return asking

    def _line(self) -> Text:
        from rich.text import Text

        names = ", ".join(self._waiting[:NAMED]) if len(self._waiting) <= NAMED else \
            f"{len(self._waiting)} hosts"
        return Text(f"waiting {time.monotonic() - self._started:.0f} s for {names}" if self._waiting else "", "dim")
