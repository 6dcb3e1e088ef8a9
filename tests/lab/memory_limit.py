"""A machine of the lab with little memory: its processes are in a control group of this kernel that has a limit."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.hosts import Host

ROOT = Path("/sys/fs/cgroup")
LIMITS = ((ROOT / "memory", "memory.limit_in_bytes"), (ROOT, "memory.max"))  # of cgroups' two versions


def processes(host: Host) -> list[int]:
    """All that runs on a machine, its sshd among it, from which all else comes."""
    space, found = os.readlink(f"/proc/{host.pid}/ns/pid"), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(path / "ns" / "pid") == space:
                found.append(int(path.name))
    return found


@contextlib.contextmanager
def limited(host: Host, size: int) -> Iterator[None]:
    """While entered, all that runs on a machine has so many bytes of memory together."""
    folder, made = f"lanspeed-{host.name}-{host.pid}", None
    for root, limit in LIMITS:
        with contextlib.suppress(OSError):
            (root / folder).mkdir()
            made = root / folder
            (made / limit).write_text(str(size))
            for pid in processes(host):
                (made / "cgroup.procs").write_text(str(pid))
            break
    else:
        if made:
            made.rmdir()
        pytest.skip("no control group can be made here")
    try:
        yield
    finally:
        host.end()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                made.rmdir()
                break
            time.sleep(0.1)
