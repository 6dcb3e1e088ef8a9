"""Signs of life: what this rank does now, in a file of the folder LANSPEED_PROGRESS, where whoever launched it looks.

Without that variable nothing is written. A rank whose file doesn't change for minutes hangs.
"""

from __future__ import annotations

import contextlib
import os
import time

EVERY_S = 1.0  # a step or batch may be shorter: not each is reported
_told = 0.0


def report(what: str, often: bool = False) -> None:
    """Say what is being done ("step 12/550"); `often`: it comes many times a second, and may be left out."""
    global _told
    folder, now = os.environ.get("LANSPEED_PROGRESS"), time.monotonic()
    if not folder or (often and now - _told < EVERY_S):
        return
    _told = now
    path = os.path.join(folder, os.environ.get("RANK", "0"))
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:  # a full disk is reported elsewhere
        file.write(what)
