#!/usr/bin/env python3
"""Run one node's part of a training: DeepSpeed's per-node launcher, watched, ended as a whole, reported as data.

The master streams this file to each node over SSH and stays connected:

    python3 -c 'import os;d=b"";exec("while len(d)<N:d+=os.read(0,N-len(d))");exec(d)'

Standard input is the control channel: a first line with the job as JSON, then {"beat": n} every few seconds (n: the
last event that has arrived), {"stop": seconds} for an orderly end, {"fail": why} after a failure elsewhere,
{"kill": true} for an end at once. Standard output has one JSON object a line, each with "event": beat, started, line
(what a rank printed), progress (what it does), metrics, rank (how one ended), ended; all but beat are numbered.

When the connection is lost, the ranks don't notice. A first line {"attach": job, "node": k, "seen": n} connects a
master to the job again, and what it has missed is said again. Without one for `patience` seconds the ranks save and
end, or continue alone. A first line {"end": job, "node": k, "grace": seconds} ends a job without a master. Standard
library only, Python 3.8+.
"""

from __future__ import annotations

import array
import base64
import contextlib
import ctypes
import fcntl
import glob
import hashlib
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIOCGIFCONF = 0x8912  # linux/sockios.h
TICK = 0.1  # seconds between two looks at ranks and logs
FIRST_TICK = 0.02  # the same until every rank has been seen
LOOK = 1.0  # seconds between two looks at what the ranks say that they do
BEAT = 3.0  # seconds between two heartbeats
TERM_TO_KILL = 2.0  # seconds between TERM and KILL after a failure
END_LIMIT = 10.0  # seconds that a killed process may take to end
SAVE_LIMIT = 1800.0  # seconds that a save may take once it has begun
LINE_LIMIT = 5000  # characters of a printed line that are passed on: less than 64 KiB as JSON
TAIL_BLOCK = 1 << 16
UNREAD_LIMIT = 256 << 20  # bytes of a rank's log that may wait for the master; older ones are left out
KEPT_LIMIT = 256 << 20  # bytes of the log that is written here while there is no master
WINDOW = 4 << 20  # bytes of events that may be unconfirmed: more is not read from the ranks' logs
PUNCH_EVERY = 1 << 20  # bytes of a rank's log after which what was read gives its disk space back
PUNCH_HOLE = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, linux/falloc.h
ASKED = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}  # how a stopped program ends


def say(**fields: object) -> None:
    """Print one event."""
    with contextlib.suppress(OSError, ValueError):  # the master has disconnected
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()


def read_line() -> bytes:
    """Return the first line of standard input, and take not one byte more, so that select() sees the rest."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return line


# -- processes ---------------------------------------------------------------------------------------------------------


def processes(job: str) -> dict[int, str]:
    """Return {pid: state} of this user's processes that carry the job's name."""
    found = {}
    mark = b"LANSPEED_JOB=" + job.encode() + b"\0"
    for path in glob.glob("/proc/[0-9]*"):
        try:
            with open(path + "/environ", "rb") as file:
                if mark not in file.read() + b"\0":
                    continue
            with open(path + "/stat") as file:
                words = file.read().rpartition(")")[2].split()
        except OSError:
            continue  # ended, or somebody else's
        found[int(path.rpartition("/")[2])] = words[0]
    return found


def exit_status(pid: int) -> int | None:
    """Return the exit code of a process that nobody has waited for yet (negative: a signal); None if it runs on."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            words = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    if words[0] not in "ZX":
        return None
    status = int(words[49])  # proc(5): field 52, as waitpid has it
    return -(status & 0x7F) if status & 0x7F else status >> 8


def children(pid: int) -> list[int]:
    """Return the children of a process, zombies among them."""
    found = []
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        try:
            with open(path) as file:
                found += [int(word) for word in file.read().split()]
        except OSError:
            continue
    return found


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def end_all(job: str, own: set[int]) -> None:
    """Kill what is left of the job, and wait until nothing is; what hangs in a driver can't be killed, and is left."""
    end = time.monotonic() + END_LIMIT
    while time.monotonic() < end:
        left = [pid for pid, state in processes(job).items() if pid not in own and state not in "ZX"]
        if not left:
            return
        for pid in left:
            send(pid, signal.SIGKILL)
        time.sleep(0.05)


def has_rank(pid: int) -> bool:
    """Return whether a process is a rank, or was started by one."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return b"\0RANK=" in b"\0" + file.read()
    except OSError:
        return False


def parent_of(pid: int) -> int:
    """Return the process that started another, 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def end_abandoned(job: str, node: int, grace: float) -> None:
    """End a job without a master: through the process that watches it, or, if that is gone, on its ranks directly."""
    count = len([pid for pid, state in processes(job).items() if state not in "ZX"])
    found = connect(job, node)
    if found:
        with found:
            found.sendall(json.dumps({"stop": grace}).encode() + b"\n")
        grace += SAVE_LIMIT  # it counts them itself
    else:
        end_ranks(job)
    end = time.monotonic() + grace
    while time.monotonic() < end and any(state not in "ZX" for state in processes(job).values()):
        say(event="beat")
        time.sleep(0.3)
    end_all(job, {os.getpid()})
    say(event="ended", processes=count)


def end_ranks(job: str) -> None:
    """Ask a job's ranks to save."""
    ranks = {pid for pid, state in processes(job).items() if state not in "ZX" and has_rank(pid)}
    for pid in ranks:
        if parent_of(pid) not in ranks:  # not what a rank has started, as a data loader's workers
            send(pid, signal.SIGTERM)


def stand_guard(job: str) -> tuple[int, int]:
    """Fork a process that kills what is left of the job should this one be killed; return its pid and the pipe."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(reading)
        return pid, writing
    os.setsid()
    os.close(writing)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(reading, 1)  # ends when the other end is closed, however that came about
    end_all(job, {os.getpid()})
    os._exit(0)


# -- the way to the master ---------------------------------------------------------------------------------------------


def socket_name(job: str, node: int) -> bytes:
    """Return the abstract name (unix(7)) of the socket at which a job's supervisor on this machine is found."""
    return b"\0lanspeed-" + hashlib.sha256(f"{os.getuid()}/{job}/{node}".encode()).hexdigest()[:40].encode()


def is_own(connection: socket.socket) -> bool:
    """Return whether a process of this user is at the other end; anybody may use an abstract name."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", peer)[1] == os.getuid()  # struct ucred: pid, uid, gid


def open_door(job: str, node: int) -> socket.socket | None:
    """Return the socket at which a master may come back, None where there can't be one."""
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        door.bind(socket_name(job, node))
    except OSError:
        door.close()
        return None
    door.listen(4)
    door.setblocking(False)
    return door


def connect(job: str, node: int) -> socket.socket | None:
    """Return a connection to the process that supervises a job here, None if there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(socket_name(job, node))
        if is_own(connection):
            return connection
    except OSError:
        pass
    connection.close()
    return None


def relay(job: str, node: int, seen: int | None) -> None:
    """Connect standard input and output to the process that supervises a job here, until one side ends."""
    found = connect(job, node)
    if found is None:
        say(event="absent")
        return
    found.sendall(json.dumps({"attach": job, "seen": seen}).encode() + b"\n")
    while True:
        for ready in select.select([0, found.fileno()], [], [])[0]:
            data = os.read(ready, TAIL_BLOCK)
            if not data:
                return
            if ready:
                while data:
                    data = data[os.write(1, data) :]
            else:
                found.sendall(data)


class Link:
    """The connection to the master, one at a time. What it hasn't confirmed is kept, and said again to the next one.

    Nothing blocks: what the connection doesn't take now waits in `unsent`.
    """

    def __init__(self) -> None:
        self.reading: int | None = 0
        self.writing: int | None = 1
        self.heard = time.monotonic()
        self.unconfirmed: deque[tuple[int, bytes]] = deque()
        self.bytes = 0  # of these
        self.number = 0
        self.unsent = b""
        self.received = b""
        os.set_blocking(1, False)

    @property
    def is_up(self) -> bool:
        """True while there is a connection, as far as can be told."""
        return self.reading is not None

    @property
    def is_full(self) -> bool:
        """True while the master has much to confirm."""
        return self.bytes > WINDOW or len(self.unsent) > WINDOW

    def say(self, **fields: object) -> None:
        """Send a numbered event."""
        self.number += 1
        line = json.dumps({**fields, "n": self.number}).encode() + b"\n"
        self.unconfirmed.append((self.number, line))
        self.bytes += len(line)
        self._send(line)

    def say_once(self, **fields: object) -> None:
        """Send an event that is worth nothing later."""
        self._send(json.dumps(fields).encode() + b"\n")

    def _send(self, line: bytes) -> None:
        if self.writing is not None:
            self.unsent += line
            self.flush()

    def flush(self) -> None:
        """Write what the connection takes."""
        if self.writing is None:
            return
        try:
            while self.unsent:
                self.unsent = self.unsent[os.write(self.writing, self.unsent[:TAIL_BLOCK]) :]
        except BlockingIOError:
            pass
        except OSError:
            self.lose()

    def confirm(self, number: int) -> None:
        """Forget events up to this one: the master has them."""
        while self.unconfirmed and self.unconfirmed[0][0] <= number:
            self.bytes -= len(self.unconfirmed.popleft()[1])

    def orders(self) -> list[dict[str, Any]]:
        """Return what the master has said; the end of its input loses it."""
        assert self.reading is not None
        try:
            data = os.read(self.reading, TAIL_BLOCK)
        except OSError:
            data = b""
        if not data:
            self.lose()
            return []
        self.heard = time.monotonic()
        *lines, self.received = (self.received + data).split(b"\n")
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                order = json.loads(line.decode("utf-8"))
                if isinstance(order, dict):
                    found.append(order)
        return found

    def lose(self) -> None:
        """Close the connection; what waited for it is in `unconfirmed`."""
        null = os.open(os.devnull, os.O_RDWR)
        for number in {self.reading, self.writing} - {None}:
            assert number is not None
            if number in (0, 1):
                os.dup2(null, number)
            else:
                os.close(number)
        os.close(null)
        self.reading = self.writing = None
        self.unsent = self.received = b""

    def take(self, connection: socket.socket, seen: int | None) -> None:
        """Replace the connection by another; its master has seen events up to this one (None: none of them)."""
        if self.is_up:
            self.lose()
        connection.setblocking(False)
        self.reading = self.writing = connection.detach()
        self.heard = time.monotonic()
        if seen is not None:
            self.confirm(seen)
        self.say_once(event="attached")
        for _, line in list(self.unconfirmed):
            self._send(line)


def first_order(connection: socket.socket) -> dict[str, Any]:
    """Return the first line of a connection at the door, {} if it is none of this user's."""
    connection.settimeout(5)
    line = b""
    try:
        while is_own(connection) and not line.endswith(b"\n") and len(line) < 1000:
            byte = connection.recv(1)
            if not byte:
                break
            line += byte
        found = json.loads(line.decode("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# -- the node ----------------------------------------------------------------------------------------------------------


def interface_towards(address: str) -> str | None:
    """Return the network interface that leads to an address, None if that can't be told.

    gloo and NCCL otherwise guess by the host's name, which Debian maps to the loopback address.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: it asks for the route
            own = probe.getsockname()[0]
            named = ipv6_interfaces() if family == socket.AF_INET6 else ipv4_interfaces(probe)
    except OSError:
        return None  # the ranks find it themselves
    return named.get(own.split("%")[0])


def ipv4_interfaces(probe: socket.socket) -> dict[str, str]:
    """Return this machine's IPv4 addresses, each with its interface (netdevice(7)); `ip` may not be installed."""
    size = 24 + 2 * struct.calcsize("P")  # of a struct ifreq
    found = array.array("B", bytes(size * 256))
    request = struct.pack("iP", len(found), found.buffer_info()[0])
    used = struct.unpack("iP", fcntl.ioctl(probe, SIOCGIFCONF, request))[0]
    entries = [found.tobytes()[start : start + size] for start in range(0, used, size)]
    return {socket.inet_ntoa(entry[20:24]): entry[:16].split(b"\0")[0].split(b":")[0].decode() for entry in entries}


def ipv6_interfaces() -> dict[str, str]:
    """Return this machine's IPv6 addresses, each with its interface."""
    with open("/proc/net/if_inet6") as file:
        entries = [line.split() for line in file]
    return {socket.inet_ntop(socket.AF_INET6, bytes.fromhex(entry[0])): entry[-1] for entry in entries}


def environment(job: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """Return the ranks' environment: this login's, the job's, the interpreter's own folder first on PATH."""
    found = dict(os.environ)
    found.pop("LANSPEED_SSH_PASSWORD", None)  # it is for the master alone
    found.update(job["environment"])
    found["LANSPEED_JOB"] = job["job"]
    if job.get("secret"):
        found["LANSPEED_SECRET"] = job["secret"]  # which strangers at the ranks' ports don't have
    found["PYTHONUNBUFFERED"] = "1"
    found["PATH"] = os.path.dirname(job["python"]) + os.pathsep + found.get("PATH", "/usr/bin:/bin")
    interface = interface_towards(job["master_addr"])
    for name, exactly in (("GLOO_SOCKET_IFNAME", ""), ("NCCL_SOCKET_IFNAME", "=")) if interface else ():
        found.setdefault(name, f"{exactly}{interface}")  # NCCL takes eth1 for eth10 too
    return found, interface


def launcher_words(job: dict[str, Any], logs: str) -> list[str]:
    """Return the command that `deepspeed` itself runs on a node; -P: no module of the folder that it starts in."""
    world = base64.urlsafe_b64encode(json.dumps(job["world"]).encode()).decode()
    return [job["python"], "-P", "-u", "-m", "deepspeed.launcher.launch", "--world_info=" + world,
            f"--node_rank={job['node_rank']}", f"--master_addr={job['master_addr']}",
            f"--master_port={job['master_port']}", "--log_level=critical", f"--enable_each_rank_log={logs}",
            *(["--no_local_rank"] if job.get("no_local_rank") else []),
            *(["--module"] if job.get("module") else []), job["script"]] + job["arguments"]


def make_observable(variables: dict[str, str], observer: str, folder: str) -> None:
    """Have every Python that starts with these variables load observe_rank.py first; `folder` is the job's own."""
    code, stacks = os.path.join(folder, "python"), os.path.join(folder, "stacks")
    os.mkdir(code)
    os.mkdir(stacks)
    with open(os.path.join(code, "sitecustomize.py"), "w", encoding="utf-8") as file:  # site.py imports it
        file.write(observer)
    variables["LANSPEED_STACKS"] = stacks
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [code, variables.get("PYTHONPATH")]))


class Tail:
    """A rank's log file, handed on line by line; a carriage return ends a line too (progress bars)."""

    def __init__(self, path: str, rank: int, event: str = "line") -> None:
        self.path, self.rank, self.event, self.at, self.rest = path, rank, event, 0, ""
        self.file = 0  # its inode: a file that is resumed is written anew
        self.punched = 0  # bytes at its beginning that take no space any more
        self.more = False  # there is more to read

    def read(self, say: Any, last: bool = False) -> bool:
        """Pass on a block of what was written since; with `last` an unfinished line too."""
        try:
            with open(self.path, "rb") as file:
                now = os.fstat(file.fileno())
                if now.st_ino != self.file or now.st_size < self.at:
                    self.file, self.at, self.rest = now.st_ino, 0, ""
                    if self.event == "metrics":
                        say(event="metrics", rank=self.rank, text="", fresh=True)
                if self.event == "line" and now.st_size - self.at > UNREAD_LIMIT:
                    left_out, self.at, self.rest = now.st_size - self.at - TAIL_BLOCK, now.st_size - TAIL_BLOCK, ""
                    say(event="line", rank=self.rank, text=f"({left_out >> 20} MiB of output are left out)")
                file.seek(self.at)
                data = file.read(TAIL_BLOCK)
        except OSError:
            self.more = False
            return False
        self.at += len(data)
        self.more = len(data) == TAIL_BLOCK
        if self.event == "line" and self.at - self.punched > PUNCH_EVERY:
            self.punch()
        lines = (self.rest + data.decode("utf-8", "replace")).split("\n")
        *bars, self.rest = lines.pop().rpartition("\r")  # a bar's line ends by a carriage return
        lines += [bars[0]] if bars[0] else []
        self.rest = self.rest[:LINE_LIMIT]
        if last and not data and self.rest:
            lines, self.rest = [*lines, self.rest], ""
        for line in lines:
            for part in line.split("\r") if line.strip() else [""]:
                if part.strip() or not line.strip():
                    say(event=self.event, rank=self.rank, text=part[:LINE_LIMIT])
        return bool(data)

    def punch(self) -> None:
        """Give back the disk space of what was read: the rank writes on behind it (fallocate(2))."""
        self.punched = self.at
        with contextlib.suppress(OSError, AttributeError), open(self.path, "r+b") as file:
            ctypes.CDLL(None).fallocate(file.fileno(), PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(self.at))


class KeptLog:
    """The run's log on this machine, which lines go to while there is no master."""

    def __init__(self, path: str) -> None:
        self.path, self.bytes = path, 0

    def say(self, **fields: Any) -> None:
        """Write a line."""
        if fields["event"] != "line" or self.bytes > KEPT_LIMIT:
            return
        rank = "-" if fields["rank"] is None else fields["rank"]
        line = f"{time.strftime('%H:%M:%S')} [{rank}] {fields['text']}\n"
        self.bytes += len(line)
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)


class Node:
    """The job on this node, from start to end."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.patience = job.get("patience", 60.0)
        self.grace = job.get("grace", 60.0)
        self.logs = tempfile.mkdtemp(prefix=f"lanspeed-{job['job']}-")
        self.link = Link()
        self.door = open_door(job["job"], job["node_rank"])
        self.kept: KeptLog | None = None  # no master for too long: ranks end, or continue alone
        self.tails: dict[int, Tail] = {}
        if job.get("follow") and job["node_rank"] == 0:
            self.tails[-1] = Tail(os.path.join(job["folder"], job["follow"]), -1, "metrics")
        names, at = list(job["world"]), job["node_rank"]
        first = sum(len(job["world"][name]) for name in names[:at])
        self.expected = set(range(first, first + len(job["world"][names[at]])))
        self.ranks: dict[int, int] = {}  # pid -> rank
        self.ended: dict[int, int | None] = {}  # rank -> exit code
        self.reason = ""  # why the job is ended early
        self.stopping = False  # the ranks were asked to save and end
        self.forced = False  # ranks that end from now on do so because they were told to
        self.deadline = 0.0  # when what is left is killed
        self.save_limit = 0.0  # the same, where a save takes longer
        self.said = time.monotonic()
        self.guard = 0
        self.gone: list[int] = []  # ranks that somebody else has waited for, in the order in which they ended
        self.files: dict[int, int] = {}  # pid -> a file descriptor that turns readable as the process ends
        self.progress = os.path.join(self.logs, "progress")
        os.mkdir(self.progress)
        self.seen: dict[str, int] = {}  # rank -> when its progress was last written
        self.does: dict[str, str] = {}  # rank -> what it does
        self.looked = 0.0

    def start(self) -> None:
        """Start the launcher in a session of its own."""
        job = self.job
        variables, interface = environment(job)
        variables["LANSPEED_PROGRESS"] = self.progress
        if job.get("run"):
            variables["LANSPEED_RUN"] = os.path.join(job["folder"], job["run"])
        for path, text in job.get("sent", {}).items():
            place = os.path.join(self.logs, os.path.basename(path))
            with open(place, "w", encoding="utf-8") as file:
                file.write(text)
            job["arguments"] = [place if word == path else word for word in job["arguments"]]
        if job.get("observer"):
            make_observable(variables, job["observer"], self.logs)
        command = launcher_words(job, self.logs)

        def die_with_parent() -> None:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

        self.launcher = subprocess.Popen(command, cwd=job["folder"], env=variables, start_new_session=True,
                                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                         preexec_fn=die_with_parent)
        assert self.launcher.stdout
        os.set_blocking(self.launcher.stdout.fileno(), False)
        self.link.say(event="started", pid=self.launcher.pid, interface=interface, host=socket.gethostname())

    # -- ranks ---------------------------------------------------------------------------------------------------------

    def find_ranks(self) -> None:
        """Note the launcher's children that are ranks, and the logs that they write."""
        for path in glob.glob(self.logs + "/*_rank*.log"):
            rank = int(path.rpartition("_rank")[2][:-4])
            self.tails.setdefault(rank, Tail(path, rank))
        strays = []
        for pid in children(self.launcher.pid):
            if pid in self.ranks:
                continue
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    named = re.search(rb"\0RANK=(\d+)\0", b"\0" + file.read() + b"\0")
            except OSError:
                continue
            if named:
                self.ranks[pid] = int(named.group(1))
                with contextlib.suppress(OSError):
                    if hasattr(os, "pidfd_open"):  # Python 3.9; Linux 5.3
                        self.files[pid] = getattr(os, "pidfd_open")(pid)  # noqa: B009, vermin takes 3.8 at its word
            elif exit_status(pid) is not None:
                strays.append(pid)  # it died before it could be looked at; ranks are started in their order
        missing = sorted(self.expected - set(self.ranks.values()))
        if len(strays) == len(missing):
            self.ranks.update(zip(sorted(strays), missing))

    def watch_ranks(self) -> None:
        """Report how ranks ended, as soon as they do; one that failed ends the job here."""
        for pid, rank in self.ranks.items():
            if rank not in self.ended:
                code = exit_status(pid)
                if code is None and not os.path.exists(f"/proc/{pid}"):
                    code = self.code_of_gone(pid)
                if code is not None:
                    if pid in self.files:
                        os.close(self.files.pop(pid))
                    self.note_end(rank, code)

    def note_end(self, rank: int, code: int) -> None:
        """Report how a rank ended, after what it printed."""
        self.ended[rank] = code
        for _ in range(100):
            if rank not in self.tails or not self.tails[rank].read(self.say):
                break
        self.say(event="rank", rank=rank, code=code, asked=self.forced or (self.stopping and code in ASKED))
        if code and not self.reason:
            self.end("a rank failed", TERM_TO_KILL)

    def code_of_gone(self, pid: int) -> int | None:
        """Return how a rank ended that its launcher waited for before us: the launcher ends as the first such did."""
        if pid not in self.gone:
            self.gone.append(pid)
        code = self.launcher.poll()
        if code is None or (code and pid != self.gone[0]):
            return None
        return code if code < 128 else code - 256

    def note_unseen(self) -> None:
        """Report ranks that ended, and were waited for by their launcher, before anybody saw them."""
        code = self.launcher.returncode
        for rank in sorted(self.expected - set(self.ranks.values())) if code and not self.reason else ():
            if rank in self.tails:  # its log shows that it was started
                self.note_end(rank, code)

    def end(self, reason: str, grace: float) -> None:
        """End the ranks: TERM now, KILL after `grace` seconds."""
        if self.forced and time.monotonic() + grace >= self.deadline:
            return
        self.reason = self.reason or reason
        self.forced = True
        self.deadline = time.monotonic() + grace
        self.freeze_launcher(False)
        for pid in [*self.ranks, self.launcher.pid]:
            send(pid, signal.SIGTERM)

    def stop(self, reason: str, grace: float, a_step: float = 0) -> None:
        """Ask the ranks to save and end. They have a step's time and `grace` to begin, and `grace` to end after it."""
        if self.reason:
            return
        self.reason = reason
        self.stopping = True
        whole = len(self.ranks) == len(self.expected)  # else it has just been started: there is nothing to save
        self.deadline = time.monotonic() + (grace + a_step if whole else TERM_TO_KILL)
        if whole:
            self.freeze_launcher(True)
        for pid in [*self.ranks, *([] if whole else [self.launcher.pid])]:
            send(pid, signal.SIGTERM)

    def freeze_launcher(self, still: bool) -> None:
        """Keep DeepSpeed's launcher from ending ranks that save because another one has ended, or let it continue."""
        send(self.launcher.pid, signal.SIGSTOP if still else signal.SIGCONT)

    def is_time_up(self) -> bool:
        """Return whether what is left is to be killed. A save that has begun may take longer."""
        now = time.monotonic()
        if self.stopping and not self.forced and any(what.startswith("saving") for what in self.does.values()):
            self.save_limit = self.save_limit or now + SAVE_LIMIT
            self.deadline = max(self.deadline, min(now + self.grace, self.save_limit))
        return bool(self.deadline) and now > self.deadline

    # -- the master ----------------------------------------------------------------------------------------------------

    def say(self, **fields: Any) -> None:
        """Send an event, or keep what is printed while there is no master."""
        if self.kept and fields["event"] == "line" and not self.link.is_up:
            self.kept.say(**fields)
        else:
            self.link.say(**fields)

    def listen(self) -> None:
        """Read what the master says; wait for it no longer than a rank lives, and not at all where there is output."""
        tick = TICK if len(self.ranks) >= len(self.expected) else FIRST_TICK
        if any(tail.more and self.is_read(rank) for rank, tail in self.tails.items()):
            tick = 0
        watched = [*self.files.values(), *([self.door.fileno()] if self.door else [])]
        watched += [self.link.reading] if self.link.reading is not None else []
        writing = [self.link.writing] if self.link.unsent and self.link.writing is not None else []
        ready = select.select(watched, writing, [], tick)[0]
        if self.door and self.door.fileno() in ready:
            self.answer_door()
        elif self.link.reading is not None and self.link.reading in ready:
            for order in self.link.orders():
                self.obey(order)
        self.link.flush()
        if self.kept is None and time.monotonic() - self.link.heard > self.patience:
            self.lose_master()

    def answer_door(self) -> None:
        """Let a master in that comes back, or take the one order of somebody who stops the job."""
        assert self.door
        with contextlib.suppress(OSError):
            connection, _ = self.door.accept()
            order = first_order(connection)
            if order.get("attach") != self.job["job"]:
                connection.close()
                self.obey(order)
                if self.reason and not self.link.is_up:
                    self.keep_log()  # whoever stops it comes for no words
                return
            seen = order.get("seen")
            self.link.take(connection, seen if isinstance(seen, int) else None)
            self.seen.clear()  # what each rank does is said again
            if self.kept:
                self.say(event="line", rank=None, text=f"what was printed meanwhile is in {self.kept.path}")
                self.kept = None
            if seen is None and -1 in self.tails:
                self.tails[-1].file = 0  # the metrics from the beginning

    def obey(self, order: dict[str, Any]) -> None:
        """Do what the master says."""
        if isinstance(order.get("beat"), int):
            self.link.confirm(order["beat"])
        if order.get("kill"):
            self.end(order.get("reason") or "killed", 0)
        elif "stop" in order:
            self.grace = float(order["stop"])
            self.stop(order.get("reason") or "stopped", self.grace, float(order.get("step") or 0))
        elif "fail" in order:
            self.end(order["fail"], TERM_TO_KILL)

    def lose_master(self) -> None:
        """Have the ranks save and end, or continue if that was asked for; what they print goes to a log here."""
        why = f"no contact with the master for {self.patience:.0f} s"
        self.link.lose()
        self.keep_log()
        alone = bool(self.job.get("continue_without_master"))
        self.say(event="line", rank=None,
                 text=f"{why}: " + ("the job continues without it" if alone else "the ranks save and end"))
        if not alone:
            self.stop(why, self.grace)

    def keep_log(self) -> None:
        """Write what is printed to the run's log here from now on."""
        self.kept = KeptLog(os.path.join(self.job["folder"], self.job.get("log") or os.path.join(self.logs, "log")))

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run to the end, or until the time to end is over."""
        while self.launcher.poll() is None and not self.is_time_up() and not self.have_all_stopped():
            self.listen()
            self.find_ranks()
            self.watch_ranks()
            self.pass_on()
            self.look_at_progress()
            if time.monotonic() - self.said > BEAT:
                self.said = time.monotonic()
                self.link.say_once(event="beat")
        self.find_ranks()
        self.watch_ranks()
        if self.launcher.poll() is not None:
            self.note_unseen()
            if not self.reason:
                self.wait_for_ranks()

    def have_all_stopped(self) -> bool:
        """Return whether all ranks have ended that were asked to."""
        return self.stopping and set(self.ended) == self.expected

    def wait_for_ranks(self) -> None:
        """Ranks whose launcher was killed under them end too."""
        if self.launcher.returncode and any(rank not in self.ended for rank in self.ranks.values()):
            self.end("DeepSpeed's launcher was killed", TERM_TO_KILL)
            while time.monotonic() < self.deadline and any(os.path.exists(f"/proc/{pid}") for pid in self.ranks):
                time.sleep(TICK)

    def look_at_progress(self) -> None:
        """Forward what the ranks say that they do, where it has changed."""
        if time.monotonic() - self.looked < LOOK:
            return
        self.looked = time.monotonic()
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.progress):
                written = entry.stat().st_mtime_ns
                if entry.name.isdigit() and self.seen.get(entry.name) != written:
                    with open(entry.path, encoding="utf-8", errors="replace") as file:
                        text = file.read(200)
                    if text:
                        self.seen[entry.name] = written
                        self.does[entry.name] = text
                        self.link.say_once(event="progress", rank=int(entry.name), text=text)

    def is_read(self, rank: int) -> bool:
        """Return whether what a rank (-1: the metrics) writes is read now; else it waits on the disk."""
        return not self.link.is_full and (self.link.is_up or (self.kept is not None and rank >= 0))

    def pass_on(self, last: bool = False) -> None:
        """Forward a block of what each rank has printed, and what the launcher has."""
        for rank, tail in self.tails.items():
            if last or self.is_read(rank):
                tail.read(self.say)
        assert self.launcher.stdout
        text = self.launcher.stdout.read()  # None while there is nothing
        for line in (text or b"").decode("utf-8", "replace").splitlines():
            if line.strip():
                self.say(event="line", rank=None, text=line[:LINE_LIMIT])

    def finish(self) -> None:
        """Leave nothing: processes, then the logs' temporary folder. Tell the master, who may have to come back."""
        end_all(self.job["job"], {os.getpid(), self.guard})
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in a driver can't be killed
            code = self.launcher.wait(timeout=5)
        for rank in self.ranks.values():
            self.ended.setdefault(rank, None)  # it was killed with the rest
        if self.stopping and not self.forced and all(code in {0, *ASKED} for code in self.ended.values()):
            code = 0
        self.empty_logs()
        self.say(event="ended", code=-signal.SIGKILL if code is None else code, reason=self.reason, ranks=self.ended,
                 checkpoints=self.checkpoints())
        while self.link.unconfirmed and not self.kept:
            self.listen_at_the_end()
        shutil.rmtree(self.logs, ignore_errors=True)

    def empty_logs(self) -> None:
        """Pass on all that the ranks have printed, as fast as the master takes it."""
        left = True
        while left:
            self.pass_on(last=True)
            left = any([tail.read(self.say, last=True) for tail in self.tails.values()])
            while self.link.is_full and not self.kept:
                self.listen_at_the_end()

    def listen_at_the_end(self) -> None:
        """Wait for the master to confirm, or to come back, until it is lost for good."""
        if time.monotonic() - self.said > BEAT:
            self.said = time.monotonic()
            self.link.say_once(event="beat")
        self.listen()

    def checkpoints(self) -> list[int]:
        """Return the steps of the newest complete checkpoints on this machine's disk."""
        place = os.path.join(self.job["folder"], self.job.get("checkpoints") or "-", "checkpoint-*", "complete.json")
        steps = [re.search(r"checkpoint-([0-9]{1,12})/complete", path) for path in glob.glob(place)]
        return sorted(int(step.group(1)) for step in steps if step)[-20:]


def main() -> int:
    """Read the job, run it, say how it ended."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    job = json.loads(read_line().decode("utf-8"))
    if "end" in job:
        end_abandoned(job["end"], job["node"], job["grace"])
        return 0
    if "attach" in job:
        with contextlib.suppress(OSError):
            relay(job["attach"], job["node"], job["seen"])
        return 0
    node = Node(job)
    signal.signal(signal.SIGTERM, lambda number, frame: node.end("terminated", TERM_TO_KILL))
    node.guard, pipe = stand_guard(node.job["job"])
    try:
        node.start()
        node.run()
    except OSError as error:
        node.link.say(event="failed", text=str(error)[:500])
        node.link.flush()
        return 1
    node.finish()
    os.close(pipe)
    end = time.monotonic() + 15
    while os.waitpid(node.guard, os.WNOHANG)[0] == 0 and time.monotonic() < end:  # it waits for what can't be killed
        time.sleep(0.05)
    return 0


if __name__ == "__main__":
    sys.exit(main())
