#!/usr/bin/env python3
"""Tell what the ranks of a job do on this node: each one's stack, collectives and connections, as a line of JSON.

    python3 worker/inspect_ranks.py JOB

`invoke watch --stacks` and a launcher whose training hangs stream this file over SSH. The ranks answer by what
observe_rank.py has set up in them, and go on with what they do; one that gives no answer in time is told of by what the
kernel says of it. Standard library only, Python 3.8+.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import socket
import struct
import sys
import time
from typing import Any, Dict, NamedTuple, Tuple

MARK = "@@RANKS "
STACK_SIGNAL = signal.SIGRTMIN + 10  # as in observe_rank.py
ANSWER_S = 4.0  # seconds in which a rank answers: it takes milliseconds, where the node isn't swamped
THREAD_S = 1.5  # seconds until a thread that doesn't answer is taken for one that waits for Python's lock
LOOK_S = 0.5  # seconds over which the use of the CPU is measured
SETTLED_S = 0.1  # seconds without growth after which a dump is complete
MOST_FRAMES, MOST_THREADS, MOST_HELPERS = 100, 20, 16
HISTORY = 8  # collectives of each group that are told of
MOST_CONNECTIONS = 64
FRAME = re.compile(r'\s*File "(.*)", line (\d+|\?\?\?) in (.*)')
TCPDIAG, DUMP, REQUEST, DONE, ERROR = 20, 0x300, 1, 3, 2  # SOCK_DIAG_BY_FAMILY; NLM_F_*; NLMSG_* (sock_diag(7))
NETLINK_SOCK_DIAG, INFO, ESTABLISHED = 4, 2, 1 << 1  # INET_DIAG_INFO; TCPF_ESTABLISHED
Frame = Tuple[str, int, str]  # file, line, function
Sockets = Dict[int, Dict[str, Any]]  # by inode


class Process(NamedTuple):
    """A process of the job: its parent, its state (proc(5): R S D T Z ...), its variables by name."""

    pid: int
    parent: int
    state: str
    variables: dict


def processes(job: str) -> dict[int, Process]:
    """Return this user's processes that carry the job's name."""
    found = {}
    for path in glob.glob("/proc/[0-9]*"):
        try:
            with open(path + "/environ", "rb") as file:
                words = file.read().decode("utf-8", "replace").split("\0")
            if f"LANSPEED_JOB={job}" not in words:
                continue
            with open(path + "/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # ended, or somebody else's
        pid = int(path.rpartition("/")[2])
        found[pid] = Process(pid, int(parent), state, dict(word.split("=", 1) for word in words if "=" in word))
    return found


def ranks_of(found: dict[int, Process]) -> dict[int, list[Process]]:
    """Return by rank its process, and behind it those that it has started."""
    ranks = {pid: process for pid, process in found.items() if process.variables.get("RANK", "").isdigit()}
    first = {pid: [process] for pid, process in ranks.items() if process.parent not in ranks}
    for pid, process in ranks.items():
        above = process.parent
        while above in ranks and above not in first:
            above = ranks[above].parent
        if pid not in first and above in first:
            first[above].append(process)
    return {int(every[0].variables["RANK"]): every for every in first.values()}


# -- stacks ------------------------------------------------------------------------------------------------------------


class Asked:
    """What a process was asked, and where its answers will be."""

    def __init__(self, process: Process) -> None:
        folder = process.variables.get("LANSPEED_STACKS", "")
        self.process = process
        self.dump, self.told = os.path.join(folder, str(process.pid)), os.path.join(folder, f"{process.pid}.json")
        self.before = self.last = self.size()
        self.written = self.time_written()
        self.since = self.began = time.monotonic()
        self.is_able = os.path.exists(self.dump) and process.state not in "TtZX"
        self.has_thread = self.is_able and ask(self.dump + ".ask")
        self.is_signalled = False

    def size(self) -> int:
        """Return the bytes of its dumps."""
        with contextlib.suppress(OSError):
            return os.stat(self.dump).st_size
        return 0

    def time_written(self) -> int:
        """Return when its thread answered last."""
        with contextlib.suppress(OSError):
            return os.stat(self.told).st_mtime_ns
        return 0

    def has_told(self) -> bool:
        """Return whether its thread has answered."""
        return self.has_thread and self.time_written() != self.written

    def is_answered(self) -> bool:
        """Return whether there is an answer, or none to be had. A thread that can't answer is replaced by the signal.
        """
        if not self.is_able or self.has_told():
            return True
        if not self.is_signalled and (not self.has_thread or time.monotonic() - self.began > THREAD_S):
            self.is_signalled = catches(self.process.pid, STACK_SIGNAL)  # any other process would die of it
            if not self.is_signalled:
                return not self.has_thread
            with contextlib.suppress(OSError):
                os.kill(self.process.pid, STACK_SIGNAL)
        now = self.size()
        if now != self.last:
            self.last, self.since = now, time.monotonic()
        return now > self.before and time.monotonic() - self.since > SETTLED_S

    def answer(self) -> tuple[list[list[Frame]], list[dict[str, Any]]]:
        """Return the stacks that have come, the main thread's first, and the last collectives of each group."""
        with contextlib.suppress(OSError, ValueError):  # the job has ended meanwhile
            return self.read_answer()
        return [], []

    def read_answer(self) -> tuple[list[list[Frame]], list[dict[str, Any]]]:
        """Return the same. Raises OSError, ValueError."""
        if self.has_told():
            with open(self.told, encoding="utf-8", errors="replace") as file:
                first, *rest = file.read().split("\n")
            stacks = [[(str(path)[:300], int(line), str(name)[:100]) for path, line, name in stack[:MOST_FRAMES]]
                      for stack in json.loads(first)][:MOST_THREADS]
            return stacks, parse_recorder(rest, time.time())
        if self.size() == self.before:
            return [], []
        with open(self.dump, encoding="utf-8", errors="replace") as file:
            file.seek(self.before)
            return [parse_stack(file.read())], []


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal (proc(5): SigCgt)."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        found = re.search(r"^SigCgt:\s*([0-9a-f]+)", file.read(), re.M)
        return bool(found and int(found[1], 16) >> (number - 1) & 1)
    return False


def ask(pipe: str) -> bool:
    """Write a byte into a pipe; return whether anybody reads it."""
    try:
        file = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    with contextlib.suppress(OSError):
        os.write(file, b"?")
    os.close(file)
    return True


def parse_stack(text: str) -> list[Frame]:
    """Return faulthandler's stack, innermost frame first; of several the last."""
    found: list[Frame] = []
    for line in text.splitlines():
        if line.endswith("(most recent call first):"):
            found = []
        elif (frame := FRAME.match(line)) and len(found) < MOST_FRAMES:
            found.append((frame[1][:300], int(frame[2]) if frame[2].isdigit() else 0, frame[3][:100]))
    return found


def parse_recorder(lines: list[str], now: float) -> list[dict[str, Any]]:
    """Return the last collectives of each group from what torch's flight recorders say, a line each."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            for entry in json.loads(line).get("entries", []):
                with contextlib.suppress(KeyError, TypeError, ValueError, IndexError):
                    backend, _, operation = str(entry["profiling_name"]).partition(":")
                    group = str(entry["process_group"][0])
                    groups.setdefault((backend, group), []).append({
                        "group": group[:40], "backend": backend[:20], "operation": operation[:60],
                        "sequence": int(entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"]),
                        "is_p2p": bool(entry["is_p2p"]),
                        "is_over": bool(entry["retired"]) or entry["state"] == "completed",
                        "sizes": json.dumps(entry["input_sizes"])[:100],
                        "seconds": max(0.0, round(now - entry["time_created_ns"] / 1e9, 1))})
    return [entry for entries in groups.values() for entry in sorted(entries, key=lambda each: -each["seconds"])
            [-HISTORY:]][:200]


# -- what the kernel knows ---------------------------------------------------------------------------------------------


def waits_in(pid: int) -> str:
    """Return the kernel's function that a process waits in, '' where it doesn't, or that isn't told."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/wchan") as file:
        name = file.read(60)
        return "" if name == "0" else name
    return ""


def state_and_cpu(pid: int) -> tuple[str, float]:
    """Return a process's state, X if it has ended, and the seconds of the CPU that it has had."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        words = file.read().rpartition(")")[2].split()
        return words[0], (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return "X", 0.0


def sockets_of(pid: int) -> set[int]:
    """Return the inodes of a process's sockets."""
    found = set()
    for path in glob.glob(f"/proc/{pid}/fd/*"):
        with contextlib.suppress(OSError, ValueError):
            name = os.readlink(path)
            if name.startswith("socket:["):
                found.add(int(name[8:-1]))
    return found


def connections() -> Sockets:
    """Return this node's TCP connections to others, as the kernel tells anybody (what `ss -ti` shows)."""
    found: Sockets = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as diag:
            diag.settimeout(2)
            body = struct.pack("=BBBBI48x", family, socket.IPPROTO_TCP, 1 << (INFO - 1), 0, ESTABLISHED)
            diag.send(struct.pack("=IHHII", 16 + len(body), TCPDIAG, REQUEST | DUMP, 1, 0) + body)
            while read_answers(diag.recv(1 << 20), family, found):
                pass
    return found


def read_answers(data: bytes, family: int, found: Sockets) -> bool:
    """Add the connections of one answer; return whether there will be another."""
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if kind in (DONE, ERROR) or length < 16:
            return False
        read_connection(data[at + 16 : at + length], family, found)
        at += -(-length // 4) * 4
    return True


def read_connection(data: bytes, family: int, found: Sockets) -> None:
    """Add a connection: a struct inet_diag_msg (72 bytes), behind it attributes, among them a struct tcp_info."""
    size = 4 if family == socket.AF_INET else 16
    ports = struct.unpack_from("!HH", data, 4)
    own, peer = (socket.inet_ntop(family, data[start : start + size]) for start in (8, 24))
    waiting, _, inode = struct.unpack_from("=III", data, 60)  # bytes that aren't acknowledged; user; inode
    if own == peer or own.startswith("127.") or own == "::1":
        return
    at = 72
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if kind == INFO and length >= 4 + 136:
            acknowledged, received = struct.unpack_from("=QQ", data, at + 4 + 120)
            found[inode] = {"own": f"{plain(own)} {ports[0]}", "peer": f"{plain(peer)} {ports[1]}", "waiting": waiting,
                            "repeats": data[at + 4 + 2], "acknowledged": acknowledged, "received": received}
        at += max(4, -(-length // 4) * 4)


def plain(address: str) -> str:
    """Return an IPv4 address that stands in an IPv6 one as itself."""
    return address[7:] if address.startswith("::ffff:") and "." in address else address


def node_state(folder: str) -> dict[str, Any]:
    """Return load, memory and the free disk space of a folder."""
    memory: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        memory = dict(re.findall(r"(\w+):\s+(\d+) kB", file.read()))
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
    return {"load": round(os.getloadavg()[0], 1), "cores": os.cpu_count() or 1, "disk_free_bytes": free,
            **{name: int(memory[key]) * 1024 if key in memory else None
               for name, key in (("ram_bytes", "MemTotal"), ("ram_available_bytes", "MemAvailable"))}}


# -- all of it ---------------------------------------------------------------------------------------------------------


def inspect(job: str) -> dict[str, Any]:
    """Return what every rank of a job on this node does."""
    ranks = ranks_of(processes(job))
    every = [process for group in ranks.values() for process in group[: 1 + MOST_HELPERS]]
    before = {process.pid: state_and_cpu(process.pid)[1] for process in every}
    started = time.monotonic()
    asked = {process.pid: Asked(process) for process in every}
    while time.monotonic() - started < ANSWER_S and not all([one.is_answered() for one in asked.values()]):
        time.sleep(0.02)
    time.sleep(max(0.0, LOOK_S - (time.monotonic() - started)))
    passed, answers = time.monotonic() - started, {pid: one.answer() for pid, one in asked.items()}
    sockets = connections()

    def described(process: Process) -> dict[str, Any]:
        state, cpu = state_and_cpu(process.pid)
        used = (cpu - before[process.pid]) / max(passed, 0.1)
        return {"pid": process.pid, "state": state, "waits_in": waits_in(process.pid),
                "cpu_percent": round(100 * max(used, 0)),
                "stacks": [[{"file": file, "line": line, "name": name} for file, line, name in stack]
                           for stack in answers[process.pid][0]]}

    found = []
    for rank, group in sorted(ranks.items()):
        mine = [sockets[inode] for inode in sockets_of(group[0].pid) & set(sockets)]
        mine.sort(key=lambda each: (-each["repeats"], -each["waiting"], each["own"]))
        found.append({"rank": rank, "processes": [described(process) for process in group[: 1 + MOST_HELPERS]],
                      "collectives": answers[group[0].pid][1], "connections": mine[:MOST_CONNECTIONS]})
    folder = "/"
    for group in ranks.values():
        with contextlib.suppress(OSError):
            folder = os.readlink(f"/proc/{group[0].pid}/cwd")
    return {"ranks": found, "node": node_state(folder)}


def main() -> int:
    """Print what is known of the job that is named."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: inspect_ranks.py JOB", file=sys.stderr)
        return 2
    print("\n" + MARK + json.dumps(inspect(sys.argv[1])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
