"""worker/run_node.py, streamed to a process as to a node: what it tells, and that nothing of a job runs on."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from patience import wait_until

from master.core.paths import WORKER
from master.inventory.worker_script import load_worker, stdin_loader

PROGRAM = """
import os, signal, subprocess, sys, time
rank, mode = os.environ["RANK"], sys.argv[2]
print("hello", rank, sys.argv[2:], os.environ.get("GLOO_SOCKET_IFNAME"), flush=True)
if mode == "stop":
    signal.signal(signal.SIGTERM, lambda *_: (print("saving", flush=True), time.sleep(0.3), sys.exit(0)))
if mode in ("half", "long") and rank == "0":  # rank 1 doesn't know of SIGTERM
    def save(*_):
        for second in range(40):
            with open(os.path.join(os.environ["LANSPEED_PROGRESS"], rank), "w") as file:
                file.write("saving" if mode == "long" else "step 3/9")
            time.sleep(0.1)
        print("saved", flush=True)
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
if mode == "flood":
    while True:
        print("x" * 200)
if mode == "instant" and rank == "1":
    sys.exit(3)
if mode == "child":
    subprocess.Popen(["sleep", "300"], start_new_session=True)  # out of the session, but not out of the job
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == "1" and mode in ("raise", "child", "stubborn"):
    time.sleep(0.5)
    raise ValueError("boom")
if rank == "1" and mode == "kill":
    time.sleep(0.5)  # a rank that dies as it is born may be waited for by its launcher before anybody sees it
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.5 if mode == "ok" else 300)
"""


class Node:
    """The node's side, as a process here; `events` are what it has told."""

    def __init__(self, folder: Path, mode: str, patience: float = 60.0, grace: float = 60.0) -> None:
        (folder / "program.py").write_text(PROGRAM)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.name = f"test-{os.getpid()}-{time.monotonic_ns()}"
        job = {"job": self.name, "python": sys.executable, "folder": str(folder), "environment": {
            "DS_ACCELERATOR": "cpu"}, "master_addr": "127.0.0.1", "master_port": port, "node_rank": 0,
               "world": {"here": [0, 1]}, "script": str(folder / "program.py"), "arguments": [mode, "a b"],
               "patience": patience, "grace": grace, "log": "here.log"}
        script = WORKER / "run_node.py"
        self.process = subprocess.Popen(["sh", "-c", f"exec {shlex.quote(sys.executable)} {stdin_loader(script)}"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.write(script.read_bytes() + json.dumps(job).encode() + b"\n")
        self.seen = 0  # the last event that has come
        self.quiet = threading.Event()  # the master's heartbeats end
        threading.Thread(target=self._beat, daemon=True).start()

    def attach(self, seen: int | None) -> None:
        """Come back by another connection, as a master that has seen events up to this one."""
        script = WORKER / "run_node.py"
        self.process = subprocess.Popen(["sh", "-c", f"exec {shlex.quote(sys.executable)} {stdin_loader(script)}"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.write(script.read_bytes() + json.dumps({"attach": self.name, "node": 0, "seen": seen}).encode() + b"\n")
        threading.Thread(target=self._beat, daemon=True).start()

    def leave(self) -> None:
        """Be gone, as when a cable is pulled."""
        self.quiet.set()
        time.sleep(0.6)  # the last heartbeat
        self.quiet = threading.Event()
        if self.process.stdin and self.process.stdout:
            self.process.stdin.close()
            self.process.stdout.close()

    def _beat(self) -> None:
        quiet = self.quiet
        with contextlib.suppress(OSError, ValueError):  # it has ended
            while not quiet.wait(0.5):
                self.write(json.dumps({"beat": self.seen}).encode() + b"\n")

    def write(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def events(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout
        for line in self.process.stdout:
            event = json.loads(line)
            if number := event.pop("n", None):
                assert number == self.seen + 1
                self.seen = number
            yield event

    def until(self, text: str) -> None:
        for event in self.events():
            if text in str(event.get("text")):
                return
        pytest.fail(f"it never said {text}")

    def all(self) -> list[dict[str, Any]]:
        found = [event for event in self.events() if event["event"] != "beat"]
        assert self.process.wait(timeout=60) == 0
        self.assert_gone()
        return found

    def assert_gone(self) -> None:
        wait_until(lambda: not job_of(self.name))
        assert not list(Path(tempfile.gettempdir()).glob(f"lanspeed-{self.name}-*"))


def job_of(name: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"LANSPEED_JOB={name}".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def test_ranks_that_end_well_are_told_of_in_order(tmp_path: Path) -> None:
    events = Node(tmp_path, "ok").all()
    assert [event["event"] for event in events] == ["started", "line", "line", "rank", "rank", "ended"]
    assert {event["text"] for event in events if event["event"] == "line"} == {
        f"hello {rank} ['ok', 'a b'] lo" for rank in (0, 1)}
    assert events[-1] == {"event": "ended", "code": 0, "reason": "", "ranks": {"0": 0, "1": 0}, "checkpoints": []}


@pytest.mark.parametrize(("mode", "code"), [("raise", 1), ("kill", -9), ("child", 1), ("stubborn", 1)])
def test_a_rank_that_fails_takes_the_others_along(mode: str, code: int, tmp_path: Path) -> None:
    started = time.monotonic()
    events = Node(tmp_path, mode).all()
    assert time.monotonic() - started < 100  # the others would sleep 300 s
    failed = next(event for event in events if event["event"] == "rank")
    assert (failed["rank"], failed["code"]) == (1, code)
    assert events[-1]["reason"] == "a rank failed" and events[-1]["code"] != 0
    if mode == "raise":
        said = [event["text"] for event in events if event["event"] == "line" and event["rank"] == 1]
        assert said[1].startswith("Traceback") and said[-1] == "ValueError: boom"


def test_an_orderly_stop_lets_ranks_save(tmp_path: Path) -> None:
    node = Node(tmp_path, "stop")
    node.until("hello 1")
    time.sleep(0.3)
    node.write(b'{"stop": 20}\n')
    events = node.all()
    assert [event["text"] for event in events if event["event"] == "line"].count("saving") == 2
    assert events[-1]["reason"] == "stopped" and events[-1]["code"] == 0
    assert events[-1]["ranks"] == {"0": 0, "1": 0}


def test_an_order_to_kill_is_followed_at_once(tmp_path: Path) -> None:
    node = Node(tmp_path, "stubborn-all")
    node.until("hello 1")
    node.write(b'{"stop": 60}\n{"kill": true}\n')
    started = time.monotonic()
    assert node.all()[-1]["reason"] == "stopped" and time.monotonic() - started < 40  # not the 60 s of the stop


@pytest.mark.parametrize("end", ["silence", "closed"])
def test_without_a_master_for_too_long_ranks_save_and_end(end: str, tmp_path: Path) -> None:
    node = Node(tmp_path, "stop", patience=2.0)
    node.until("hello 1")
    node.quiet.set()
    if end == "closed" and node.process.stdin:
        node.process.stdin.close()
    assert node.process.wait(timeout=60) == 0
    node.assert_gone()
    kept = (tmp_path / "here.log").read_text()
    assert "no contact with the master for 2 s: the ranks save and end" in kept and kept.count("] saving") == 2, kept


def test_a_supervisor_that_is_killed_leaves_no_rank(tmp_path: Path) -> None:
    node = Node(tmp_path, "hang")
    node.until("hello 1")
    node.process.send_signal(signal.SIGKILL)
    node.process.wait()
    wait_until(lambda: not job_of(node.name))


def test_a_master_that_comes_back_misses_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path, "stop")
    node.until("hello 0")
    time.sleep(1)
    first, seen = node.process, node.seen
    node.leave()
    ranks = job_of(node.name)
    node.attach(seen)
    assert next(node.events())["event"] == "attached"
    node.write(b'{"stop": 20}\n')
    said = [event["text"] for event in node.all() if event["event"] == "line"]
    assert said.count("saving") == 2 and len(ranks) >= 3
    assert first.wait(timeout=60) == 0  # which said the last words over the second connection


def test_another_master_is_told_what_nobody_confirmed(tmp_path: Path) -> None:
    node = Node(tmp_path, "ok")
    node.until("hello 1")
    node.leave()
    time.sleep(2)  # the ranks end meanwhile
    node.attach(None)
    attached, first = next(node.events()), json.loads(node.process.stdout.readline())  # type: ignore[union-attr]
    assert attached == {"event": "attached"} and first["n"] <= node.seen + 1
    node.seen = first["n"]
    assert [event["event"] for event in node.all()][-3:] == ["rank", "rank", "ended"]


def test_a_job_that_is_no_more_is_absent(tmp_path: Path) -> None:
    node = Node(tmp_path, "ok")
    node.all()
    node.attach(None)
    assert next(node.events()) == {"event": "absent"}


def test_others_cannot_come_in_a_masters_place(tmp_path: Path) -> None:
    node = Node(tmp_path, "stop")
    node.until("hello 1")
    with socket.socket(socket.AF_UNIX) as stranger:  # what it says is no order
        stranger.connect(load_worker("run_node").socket_name(node.name, 0))
        stranger.sendall(b"[1]\n")
        assert stranger.recv(10) == b""
    node.write(b'{"stop": 20}\n')
    assert node.all()[-1]["code"] == 0


@pytest.mark.parametrize("mode", ["half", "long"])
def test_one_rank_that_does_not_know_of_the_stop_costs_no_other_its_save(mode: str, tmp_path: Path) -> None:
    node = Node(tmp_path, mode)
    node.until("hello 1")
    time.sleep(0.3)
    node.write(b'{"stop": %d}\n' % (1 if mode == "long" else 20))  # a save that has begun takes longer than that
    events = node.all()
    assert "saved" in [event["text"] for event in events if event["event"] == "line"]
    assert {event["rank"]: (event["code"], event["asked"]) for event in events if event["event"] == "rank"} == {
        0: (0, False), 1: (-15, True)}
    assert events[-1]["code"] == 0 and events[-1]["reason"] == "stopped"


def test_a_rank_that_nobody_saw_has_an_end(tmp_path: Path) -> None:
    node = Node(tmp_path, "instant")
    next(event for event in node.events() if event["event"] == "started")
    node.process.send_signal(signal.SIGSTOP)  # as on a machine with much to do
    time.sleep(6)
    node.process.send_signal(signal.SIGCONT)
    events = node.all()
    assert (1, 3) in [(event["rank"], event["code"]) for event in events if event["event"] == "rank"]


def test_a_flood_keeps_no_order_waiting_and_fills_no_disk(tmp_path: Path) -> None:
    node = Node(tmp_path, "flood")
    lines = iter(node.events())
    for _ in range(20_000):
        next(lines)
    (folder,) = Path(tempfile.gettempdir()).glob(f"lanspeed-{node.name}-*")
    held = sum(path.stat().st_blocks * 512 for path in folder.glob("*.log"))
    written = sum(path.stat().st_size for path in folder.glob("*.log"))
    assert held < written - (1 << 20), f"{held} bytes on the disk of {written} written"
    node.write(b'{"stop": 5}\n')
    asked = time.monotonic()
    end = next(event for event in lines if event["event"] == "rank")
    assert end["code"] == -15 and time.monotonic() - asked < 30
    node.write(b'{"kill": true}\n')
    node.all()


def test_a_process_that_can_not_be_killed_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    node = load_worker("run_node")
    killed: list[int] = []
    monkeypatch.setattr(node, "processes", lambda job: {4242: "D"})  # it hangs in a driver
    monkeypatch.setattr(node, "send", lambda pid, number: killed.append(pid))
    monkeypatch.setattr(node, "END_LIMIT", 0.3)
    started = time.monotonic()
    node.end_all("job", set())
    assert set(killed) == {4242} and 0.3 <= time.monotonic() - started < 20


def test_nccl_is_told_one_card_and_no_other_that_begins_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    job = {"environment": {}, "job": "x", "python": sys.executable, "master_addr": "127.0.0.1"}
    found, interface = load_worker("run_node").environment(job)
    assert (interface, found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]) == ("lo", "lo", "=lo")


def test_the_way_to_an_address_is_known_without_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    node = load_worker("run_node")
    assert node.interface_towards("127.0.0.1") == "lo" and node.interface_towards("no-such-host.invalid") is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        assert node.ipv4_interfaces(probe)["127.0.0.1"] == "lo"
    if Path("/proc/net/if_inet6").exists() and "::1" in node.ipv6_interfaces():
        assert node.interface_towards("::1") == "lo"


@pytest.mark.parametrize("change", ["trainer/train.py", "trainer/sequences/packing.py", "trainer/new.py"])
def test_code_that_differs_anywhere_has_another_digest(change: str, tmp_path: Path) -> None:
    copy = tmp_path / "trainer"
    shutil.copytree(ROOT / "trainer", copy, ignore=shutil.ignore_patterns("__pycache__"))
    digest = load_worker("describe_node").code_digest
    assert digest(str(tmp_path)) == digest(str(ROOT)) and digest(str(tmp_path / "nowhere")) is None
    with (tmp_path / change).open("a") as file:
        file.write("# changed\n")
    assert digest(str(tmp_path)) != digest(str(ROOT))


def test_a_node_describes_itself(tmp_path: Path) -> None:
    wanted = {"folder": str(ROOT), "paths": [str(tmp_path), "/no/such/path"], "marks": [str(tmp_path), "/nor/this"]}
    done = subprocess.run([sys.executable, WORKER / "describe_node.py", json.dumps(wanted)], capture_output=True,
                          text=True, check=True)
    facts = json.loads(done.stdout.partition("@@NODE_FACTS ")[2])
    assert facts["missing"] == ["/no/such/path"] and facts["there"] == [str(tmp_path)]
    assert facts["packages"]["deepspeed"] and len(facts["code"]) == 16 and facts["port"] > 1024
    with socket.create_server(("", 0)) as taken:
        wanted["port"] = taken.getsockname()[1]
        done = subprocess.run([sys.executable, WORKER / "describe_node.py", json.dumps(wanted)], capture_output=True,
                              text=True, check=True)
    assert json.loads(done.stdout.partition("@@NODE_FACTS ")[2])["port"] is None
