#!/usr/bin/env python3
"""Run one node's part of a training: DeepSpeed's per-node launcher, watched, ended as a whole, reported as data.

The master streams this file to each node over SSH and stays connected:

    python3 -c 'import os;d=b"";exec("while len(d)<N:d+=os.read(0,N-len(d))");exec(d)'

Standard input is the control channel: a first line with the job as JSON, then {"beat": n} every few seconds,
{"stop": seconds} for an orderly end, {"fail": why} after a failure elsewhere, {"kill": true} for an end at once.
Standard output has one JSON object a line, each with "event": beat, started, line (what a rank printed), progress (what
it does), metrics, rank (how one ended), ended. Silence or the end of the input means that the master is gone. A first
line {"end": job, "grace": seconds} ends a job whose master has disconnected. Standard library only, Python 3.8+.
"""

from __future__ import annotations

import array
import base64
import contextlib
import ctypes
import fcntl
import glob
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
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIOCGIFCONF = 0x8912  # linux/sockios.h
TICK = 0.1  # seconds between two looks at ranks and logs
FIRST_TICK = 0.02  # the same until every rank has been seen
LOOK = 1.0  # seconds between two looks at what the ranks say that they do
BEAT = 3.0  # seconds between two heartbeats
PATIENCE = 2.0  # seconds between TERM and KILL after a failure
LINE_LIMIT = 5000  # characters of a printed line that are passed on: less than 64 KiB as JSON
TAIL_BLOCK = 1 << 16


kept_in: list[str] = []  # the log that lines go to once the master is lost and the job continues


def keep_in(path: str, why: str) -> None:
    """Write what ranks print to a log here from now on, beginning with the reason."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        kept_in[:] = [path]
        say(event="line", rank=None, text=f"{why}: the job continues without it")


def say(**fields: object) -> None:
    """Print one event."""
    if kept_in:
        if fields["event"] == "line":
            with contextlib.suppress(OSError), open(kept_in[0], "a", encoding="utf-8") as file:
                rank = "-" if fields["rank"] is None else fields["rank"]
                file.write(f"{time.strftime('%H:%M:%S')} [{rank}] {fields['text']}\n")
        return
    try:
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()
    except (OSError, ValueError):
        pass  # the master has disconnected; the silence on the input shows the same


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
    """Kill what is left of the job, and wait until nothing is."""
    end = time.monotonic() + 10
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


def end_abandoned(job: str, grace: float) -> None:
    """End a job whose master has disconnected: ask its ranks to save, kill what is left after `grace` seconds, report
    it."""
    pids = [pid for pid, state in processes(job).items() if state not in "ZX"]
    ranks = {pid for pid in pids if has_rank(pid)}
    for pid in ranks:
        if parent_of(pid) not in ranks:  # not what a rank has started, as a data loader's workers
            send(pid, signal.SIGTERM)
    end = time.monotonic() + grace
    while time.monotonic() < end and any(state not in "ZX" for state in processes(job).values()):
        say(event="beat")
        time.sleep(0.3)
    end_all(job, {os.getpid()})
    say(event="ended", processes=len(pids))


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
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ():
        found.setdefault(name, interface or "")
    return found, interface


def launcher_words(job: dict[str, Any], logs: str) -> list[str]:
    """Return the command that `deepspeed` itself runs on a node; -P: no module of the folder that it starts in."""
    world = base64.urlsafe_b64encode(json.dumps(job["world"]).encode()).decode()
    return [job["python"], "-P", "-u", "-m", "deepspeed.launcher.launch", "--world_info=" + world,
            f"--node_rank={job['node_rank']}", f"--master_addr={job['master_addr']}",
            f"--master_port={job['master_port']}", "--log_level=critical", f"--enable_each_rank_log={logs}",
            *(["--no_local_rank"] if job.get("no_local_rank") else []), job["script"]] + job["arguments"]


class Tail:
    """A rank's log file, handed on line by line; a carriage return ends a line too (progress bars)."""

    def __init__(self, path: str, rank: int, event: str = "line") -> None:
        self.path, self.rank, self.event, self.at, self.rest = path, rank, event, 0, ""
        self.file = 0  # its inode: a file that is resumed is written anew

    def read(self, last: bool = False) -> bool:
        """Pass on what was written since; with `last` an unfinished line too."""
        try:
            with open(self.path, "rb") as file:
                now = os.fstat(file.fileno())
                if now.st_ino != self.file or now.st_size < self.at:
                    self.file, self.at, self.rest = now.st_ino, 0, ""
                    if self.event == "metrics":
                        say(event="metrics", rank=self.rank, text="", fresh=True)
                file.seek(self.at)
                data = file.read(TAIL_BLOCK)
        except OSError:
            return False
        self.at += len(data)
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


class Node:
    """The job on this node, from start to end."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.patience = job.get("patience", 12.0)
        self.logs = tempfile.mkdtemp(prefix=f"lanspeed-{job['job']}-")
        self.tails: dict[int, Tail] = {}
        if job.get("follow") and job["node_rank"] == 0:
            self.tails[-1] = Tail(os.path.join(job["folder"], job["follow"]), -1, "metrics")
        names, at = list(job["world"]), job["node_rank"]
        first = sum(len(job["world"][name]) for name in names[:at])
        self.expected = set(range(first, first + len(job["world"][names[at]])))
        self.ranks: dict[int, int] = {}  # pid -> rank
        self.ended: dict[int, int | None] = {}  # rank -> exit code
        self.reason = ""  # why the job is ended early
        self.forced = False  # ranks that end from now on do so because they were told to
        self.deadline = 0.0  # when what is left is killed
        self.heard = self.said = time.monotonic()
        self.buffer = b""
        self.guard = 0
        self.deaf = False  # the master is lost, and the job continues
        self.gone: list[int] = []  # ranks that somebody else has waited for, in the order in which they ended
        self.files: dict[int, int] = {}  # pid -> a file descriptor that turns readable as the process ends
        self.progress = os.path.join(self.logs, "progress")
        os.mkdir(self.progress)
        self.seen: dict[str, int] = {}  # rank -> when its progress was last written
        self.looked = 0.0

    def start(self) -> None:
        """Start the launcher in a session of its own."""
        job = self.job
        variables, interface = environment(job)
        variables["LANSPEED_PROGRESS"] = self.progress
        command = launcher_words(job, self.logs)

        def die_with_parent() -> None:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

        self.launcher = subprocess.Popen(command, cwd=job["folder"], env=variables, start_new_session=True,
                                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                         preexec_fn=die_with_parent)
        assert self.launcher.stdout
        os.set_blocking(self.launcher.stdout.fileno(), False)
        say(event="started", pid=self.launcher.pid, interface=interface, host=socket.gethostname())

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
                    self.ended[rank] = code
                    if pid in self.files:
                        os.close(self.files.pop(pid))
                    for _ in range(100):
                        if rank not in self.tails or not self.tails[rank].read():
                            break
                    say(event="rank", rank=rank, code=code, asked=self.forced)
                    if code and not self.reason:
                        self.end("a rank failed", PATIENCE)

    def code_of_gone(self, pid: int) -> int | None:
        """Return how a rank ended that its launcher waited for before us: the launcher ends as the first such did."""
        if pid not in self.gone:
            self.gone.append(pid)
        code = self.launcher.poll()
        if code is None or (code and pid != self.gone[0]):
            return None
        return code if code < 128 else code - 256

    def end(self, reason: str, grace: float, orderly: bool = False) -> None:
        """Ask the ranks to end, and set the time after which they are killed."""
        if self.reason and time.monotonic() + grace >= self.deadline:
            return
        self.reason = self.reason or reason
        self.forced = self.forced or not orderly
        self.deadline = time.monotonic() + grace
        for pid in list(self.ranks) if orderly else [*self.ranks, self.launcher.pid]:
            send(pid, signal.SIGTERM)

    def listen(self) -> None:
        """Read what the master says; wait for it no longer than a rank lives."""
        tick = TICK if len(self.ranks) >= len(self.expected) else FIRST_TICK
        ready = select.select([*([] if self.deaf else [0]), *self.files.values()], [], [], tick)[0]
        if self.deaf:
            return
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                self.lose_master("the connection to the master has ended")
                return
            self.heard = time.monotonic()
            self.buffer += data
            while b"\n" in self.buffer:
                line, self.buffer = self.buffer.split(b"\n", 1)
                try:
                    order = json.loads(line.decode("utf-8"))
                except ValueError:
                    continue
                if order.get("kill"):
                    self.end(order.get("reason") or "killed", 0)
                elif "stop" in order:
                    self.end(order.get("reason") or "stopped", float(order["stop"]), orderly=True)
                elif "fail" in order:
                    self.end(order["fail"], PATIENCE)
        elif time.monotonic() - self.heard > self.patience:
            self.lose_master(f"the master is silent for {self.patience:.0f} s")

    def lose_master(self, why: str) -> None:
        """End the job, or let it continue if that was asked for."""
        self.deaf = True
        if not self.job.get("continue_without_master"):
            self.end(why, PATIENCE)
        elif self.job.get("log"):
            keep_in(os.path.join(self.job["folder"], self.job["log"]), why)

    def run(self) -> None:
        """Run to the end, or until the time to end is over."""
        while self.launcher.poll() is None and not (self.deadline and time.monotonic() > self.deadline):
            self.listen()
            self.find_ranks()
            self.watch_ranks()
            self.pass_on()
            self.look_at_progress()
            if time.monotonic() - self.said > BEAT:
                self.said = time.monotonic()
                say(event="beat")
        self.watch_ranks()
        if self.launcher.poll() is not None and not self.reason:
            self.wait_for_ranks()

    def wait_for_ranks(self) -> None:
        """Ranks whose launcher was killed under them end too."""
        if self.launcher.returncode and any(rank not in self.ended for rank in self.ranks.values()):
            self.end("DeepSpeed's launcher was killed", PATIENCE)
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
                        say(event="progress", rank=int(entry.name), text=text)

    def pass_on(self, last: bool = False) -> None:
        """Forward what ranks and launcher have printed."""
        for tail in self.tails.values():
            while tail.read(last):
                pass
        assert self.launcher.stdout
        text = self.launcher.stdout.read()  # None while there is nothing
        for line in (text or b"").decode("utf-8", "replace").splitlines():
            if line.strip():
                say(event="line", rank=None, text=line[:LINE_LIMIT])

    def finish(self) -> None:
        """Leave nothing: processes, then the logs' temporary folder."""
        end_all(self.job["job"], {os.getpid(), self.guard})
        code = self.launcher.wait()
        for rank in self.ranks.values():
            self.ended.setdefault(rank, None)  # it was killed with the rest
        self.pass_on()
        self.pass_on(last=True)
        shutil.rmtree(self.logs, ignore_errors=True)
        say(event="ended", code=code, reason=self.reason, ranks=self.ended)


def main() -> int:
    """Read the job, run it, say how it ended."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    job = json.loads(read_line().decode("utf-8"))
    if "end" in job:
        end_abandoned(job["end"], job["grace"])
        return 0
    node = Node(job)
    signal.signal(signal.SIGTERM, lambda number, frame: node.end("terminated", PATIENCE))
    node.guard, pipe = stand_guard(node.job["job"])
    try:
        node.start()
        node.run()
    except OSError as error:
        say(event="failed", text=str(error))
        return 1
    node.finish()
    os.close(pipe)
    os.waitpid(node.guard, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
