"""Ctrl-C and SIGTERM: once asks for an orderly stop, twice ends at once."""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType, TracebackType

from trainer.distributed.shared_flag import SharedFlag

PR_SET_PDEATHSIG = 1  # linux/prctl.h
ASKING = (signal.SIGINT, signal.SIGTERM)  # what asks a rank to save and stop


class Interrupted(BaseException):
    """A signal came while there was nothing to save yet. Not an Exception, so that no library swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name


class SignalWatch:
    """While entered: a first SIGINT or SIGTERM raises `flag` where there is one (steps are being made), else
    raises Interrupted; a second one ends the process. After `finish` a first one is ignored: what is left is
    short and worth having."""

    def __init__(self) -> None:
        self.flag: SharedFlag | None = None
        self._asked: int | None = None
        self._finishing = False

    def __enter__(self) -> SignalWatch:
        for number in ASKING:
            signal.signal(number, self._handle)
        follow_launcher()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(number, default)

    def steps_begin(self, flag: SharedFlag) -> None:
        """Say that from now on a signal raises `flag`. Raises Interrupted for one before, should it have been lost:
        Python passes over what is raised while it clears something away."""
        self.flag = flag
        if self._asked is not None:
            raise Interrupted(self._asked)

    def finish(self) -> None:
        """Say that the steps are made."""
        self._finishing = True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._asked is not None:
            os._exit(128 + number)
        self._asked = number
        if self.flag is not None:
            self.flag.raised = True
        elif not self._finishing:
            raise Interrupted(number)


def follow_launcher() -> None:
    """Get a SIGTERM when DeepSpeed's launcher dies: killed itself, it would leave its ranks behind as orphans."""
    if "CROSS_RANK" in os.environ:  # set by that launcher alone
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
