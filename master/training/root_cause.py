"""Why a training over several hosts failed: of all that ended, the one that ended first, and what it means."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# What a rank says that lost another one: the cause is elsewhere.
COLLATERAL = re.compile(
    r"Connection (closed|reset) by peer|connection was closed|Broken pipe|NCCL.*(remote error|unhandled system error)|"
    r"Gloo.*(Timed out|Read error|Write error)|DistNetworkError|DistStoreError|rank 0 exited|"
    r"Socket closed|connectFullMesh.*closed", re.IGNORECASE)
HINTS: list[tuple[str, str]] = [
    (r"what would save memory", ""),  # the trainer's own message has it all
    (r"CUDA out of memory|OutOfMemoryError|HIP out of memory",  # a script of the user's own
     "a smaller batch or shorter sequences, or a DeepSpeed config with offload (trainer/configs/)"),
    (r"No space left on device", "free disk space on that host, or --save_total_limit 1"),
    (r"Address already in use|EADDRINUSE", "the port is taken: --master-port N, or end that program"),
    (r"connectFullMesh|unable to connect to|No route to host|Connection refused|Connection timed out",
     "can the hosts reach each other (firewall)? --env GLOO_SOCKET_IFNAME=... names the network card"),
    (r"unrecognized arguments:.*--local_rank", "--no-local-rank starts a script without that flag"),
    (r"ModuleNotFoundError|ImportError", "the packages differ there: invoke sync"),
    (r"CUDA driver version is insufficient|no CUDA GPUs are available|Found no NVIDIA driver",
     "invoke detect on that host says what is wrong with its driver"),
    (r"FileNotFoundError|No such file or directory", "copy the file to the same path on every host"),
    (r"Permission denied", "the account there may not read or write that"),
]
KILLED = "if you didn't kill it, the kernel ran out of memory: sudo dmesg | tail on that host"
EARLY = "exited with code 0 while the others still trained"
TAIL = 12  # lines of a failing rank that are shown


@dataclass(frozen=True)
class RankExit:
    """How a rank ended: exit code (negative: a signal), seconds since the start, whether it was asked to end."""

    host: str
    rank: int
    code: int
    at: float
    asked: bool = False


@dataclass(frozen=True)
class Cause:
    """The first cause: where (rank None: the host itself), what, its exit code, the last lines, a hint ('' if none)."""

    host: str
    rank: int | None
    what: str
    code: int | None
    excerpt: tuple[str, ...]
    hint: str

    def __str__(self) -> str:
        where = f"{self.host}, rank {self.rank}" if self.rank is not None else self.host
        return f"{where}: {self.what}"


def describe_exit(code: int) -> str:
    """Return what an exit code says."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exited with code {code}"


def excerpt(lines: Sequence[str]) -> tuple[str, ...]:
    """Return the end of a rank's output, from its last traceback on if there is one, shortened in the middle."""
    starts = [number for number, line in enumerate(lines) if line.startswith(("Traceback", "error: "))]
    part = list(lines[starts[-1] :] if starts else lines[-TAIL:])
    return tuple(part if len(part) <= TAIL else [part[0], "  ...", *part[2 - TAIL :]])


def first_cause(exits: Sequence[RankExit], lost_hosts: Mapping[str, str],
                output: Mapping[tuple[str, int | None], Sequence[str]],
                ) -> Cause | None:
    """Return why it failed, None if nothing did.

    `lost_hosts`: hosts whose connection ended, with why; `output`: the last lines by host and rank (None: the
    launcher). A rank
    that only lost its peers is no cause where another one is.
    """
    failed = sorted((end for end in exits if end.code and not end.asked), key=lambda end: end.at)
    causes = [end for end in failed if not COLLATERAL.search("\n".join(output.get((end.host, end.rank), [])[-40:]))
              or end.code < 0]
    left = [end for end in exits if failed and end.code == 0 and not end.asked and end.at < failed[0].at]
    if left and not causes and not lost_hosts:
        return Cause(left[0].host, left[0].rank, EARLY, 0, (), "each rank must do as many steps as the others")
    if causes or (failed and not lost_hosts):
        end = (causes or failed)[0]
        if not output.get((end.host, end.rank)):  # what goes wrong on all ranks alike is printed by the first one
            end = next((one for one in causes or failed if one.code == end.code and output.get((one.host, one.rank))),
                       end)
        lines = [line for line in output.get((end.host, end.rank), []) if line.strip()]
        text = "\n".join(lines[-40:])
        hint = KILLED if end.code == -signal.SIGKILL else next(
            (hint for pattern, hint in HINTS if re.search(pattern, text)), "")
        return Cause(end.host, end.rank, describe_exit(end.code), end.code, excerpt(lines), hint)
    for host, why in lost_hosts.items():
        lines = [line for line in output.get((host, None), []) if line.strip()]
        return Cause(host, None, why, None, excerpt(lines) if lines else (), "")
    return None
