"""Bounds for what data makes this machine do: a chat template is a program, a packed file may be a thousand times as
large as it looks."""

from __future__ import annotations

import contextlib
import gzip
import io
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from trainer.errors import UserError

RENDER_LIMIT_S = 10.0  # for one conversation; a template takes milliseconds
RENDER_LIMIT_BYTES = 2 << 30  # of memory that rendering may take beyond what is held before
MAX_TEXT = 100_000_000  # characters that a template may make of a conversation
UNPACKED_TIMES, UNPACKED_BYTES = 200, 64 << 20  # of a .gz; text packs to a tenth, logs to a hundredth


class TooMuch(BaseException):
    """A template that doesn't end; no Exception, which its own machinery might catch."""


@contextlib.contextmanager
def bounded_rendering() -> Iterator[None]:
    """Limit time and memory of what is done meanwhile; raise UserError where they run out.

    In a thread that gets no signals there is no limit of time.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = held + RENDER_LIMIT_BYTES

    def end(number: int, frame: FrameType | None) -> None:
        raise TooMuch

    on_main = threading.current_thread() is threading.main_thread()
    before, timer = signal.signal(signal.SIGALRM, end) if on_main else None, (0.0, 0.0)
    try:
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        if on_main:
            timer = signal.setitimer(signal.ITIMER_REAL, RENDER_LIMIT_S)
        yield
    except TooMuch:
        raise UserError(f"the chat template does not end within {RENDER_LIMIT_S:.0f} s") from None
    except MemoryError:
        raise UserError(f"the chat template takes more than {RENDER_LIMIT_BYTES >> 30} GiB of memory") from None
    finally:
        if on_main:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Unpacked(io.RawIOBase):
    """A .gz file, unpacked; raises UserError once that is many times as much as the file has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = gzip.open(path)  # noqa: SIM115, closed with this
        self._limit = path.stat().st_size * UNPACKED_TIMES + UNPACKED_BYTES

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer; return how many bytes came."""
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        if self._file.tell() > self._limit:
            raise UserError(f"{self._path}: unpacks to more than {UNPACKED_TIMES} times its size: unpack it yourself "
                            "if that is right: gunzip")
        return len(data)

    def seekable(self) -> bool:
        """It is, as Parquet wants it."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; the end is found by reading up to it, within the limit."""
        if whence == io.SEEK_END:
            block = memoryview(bytearray(1 << 20))
            while self.readinto(block):
                pass
            offset, whence = self._file.tell() + offset, io.SEEK_SET
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def open_unpacked(path: Path) -> BinaryIO:
    """Open a .gz file to be read unpacked."""
    return io.BufferedReader(Unpacked(path), 1 << 20)
