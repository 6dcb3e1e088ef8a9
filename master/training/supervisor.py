"""One training over several hosts: a session a host, one job, one end.

A thread a host holds the connection and speaks with worker/run_node.py there; this one decides. When something fails,
every other host is told at once; a host that is silent for too long counts as lost, and ends its ranks itself.
"""

from __future__ import annotations

import contextlib
import queue
import shlex
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

from master.inventory.node_facts import query_facts, query_gpu_use
from master.inventory.worker_script import open_worker
from master.ssh.event_queue import EventQueue
from master.ssh.json_channel import SILENCE_LIMIT_S, JsonChannel
from master.ssh.node_names import Node
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import HostKeyPrompt, run_on_all
from master.ssh.session import Session
from master.training.hang_detector import HangDetector
from master.training.job import HostAssignment, JobResult, ranks_by_host
from master.training.root_cause import RankExit

HEARTBEAT_S = 3.0  # seconds between two heartbeats, both ways


Approve = Callable[[dict[str, dict[str, Any]], dict[str, SshError]], "dict[str, Any] | None"]


class RankOutput(Protocol):
    """Where the ranks' output goes (rank None: the launcher's), and the metrics of a run folder elsewhere."""

    def show(self, host: str, rank: int | None, text: str) -> None: ...

    def add_metrics(self, line: str | None) -> None: ...

    def show_progress(self, rank: int, text: str) -> None: ...

    def pass_time(self) -> None: ...

    def close(self) -> None: ...


class ClusterJob:
    """`approve` is given every host's facts and returns the job for run_node.py, or None to cancel it."""

    def __init__(self, parts: Sequence[HostAssignment], ssh: SshOptions, wanted: dict[str, Any], name: str,
                 grace: float,
                 hangs: HangDetector, approve: Approve) -> None:
        self._parts = {str(part.node): part for part in parts}
        self._ssh, self._wanted, self._name, self._grace, self._approve = ssh, wanted, name, grace, approve
        self._hangs = hangs
        self._events: EventQueue[tuple[str, Any]] = EventQueue(self._parts)
        self._ranks = ranks_by_host(parts)
        self._orders: dict[str, queue.Queue[dict[str, Any]]] = {host: queue.Queue() for host in self._parts}
        self._decided = threading.Event()
        self._job: dict[str, Any] | None = None
        self._signals = 0
        self.result = JobResult()

    def run(self, host_key_prompt: HostKeyPrompt | None, output: RankOutput,
            say: Callable[[str], None]) -> JobResult | None:
        """Run to the end and return what happened; None if it was cancelled before it began."""
        before = {number: signal.signal(number, self._count) for number in (signal.SIGINT, signal.SIGTERM)}
        started = time.monotonic()
        sessions = threading.Thread(target=self._reach_all, args=(host_key_prompt,), daemon=True)
        sessions.start()
        try:
            if not self._collect_facts():
                return None
            self._supervise(started, output, say)
            return self.result
        finally:
            output.close()
            self._decided.set()
            self._events.close()
            sessions.join(timeout=SILENCE_LIMIT_S + 10)
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def stop_requested(self) -> bool:
        """True once somebody has asked for the end."""
        return self._signals > 0

    def _count(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    # -- this thread: decisions ----------------------------------------------------------------------------------------

    def _collect_facts(self) -> bool:
        """Wait for every host's facts or error; have the job approved; let the hosts start. False: cancelled."""
        facts: dict[str, dict[str, Any]] = {}
        faults: dict[str, SshError] = {}
        while len(facts) + len(faults) < len(self._parts) and not self._signals:
            with contextlib.suppress(queue.Empty):
                host, (kind, content) = self._events.get(timeout=0.2)
                if kind == "facts":
                    facts[host] = content
                elif isinstance(content, SshError):
                    faults[host] = content
        self._job = None if self._signals else self._approve(facts, faults)
        self._decided.set()
        return self._job is not None

    def _supervise(self, started: float, output: RankOutput, say: Callable[[str], None]) -> None:
        """Handle what the hosts tell until all have ended; end the others when one fails or somebody asks to."""
        running, told = set(self._parts), 0
        while running:
            since = time.monotonic() - started
            output.pass_time()
            if stalled := self._hangs.overdue(since):
                say(stalled)
            if self._signals > told:
                told = self._signals
                self.result.asked_to_stop = True
                say(f"stopping: the ranks may take {self._grace:.0f} s to save; Ctrl-C again kills them" if told == 1
                    else "killing them")
                self._tell(running, {"stop": self._grace} if told == 1 else {"kill": True})
            try:
                host, (kind, content) = self._events.get(timeout=0.1)
            except queue.Empty:
                continue
            if kind == "over":
                running.discard(host)
                if isinstance(content, SshError) and host not in self.result.launcher_codes:
                    self.result.lost_hosts[host] = f"{content.stage}: {content.reason}"
                    self._fail(host, since, running, f"connection to {host} lost")
            elif kind == "event":
                self._handle_event(host, content, since, running, output)

    def _handle_event(self, host: str, event: dict[str, Any], since: float, running: set[str],
                      output: RankOutput) -> None:
        kind = event.get("event")
        if kind == "line":
            self._hangs.line(host, since)
            self.result.output[host, event["rank"]].append(event["text"])
            output.show(host, event["rank"], event["text"])
        elif kind == "progress":
            self._hangs.progress(host, event["rank"], since, event["text"])
            output.show_progress(event["rank"], event["text"])
        elif kind == "metrics":
            output.add_metrics(None if event.get("fresh") else event["text"])
        elif kind == "rank":
            self.result.exits.append(RankExit(host, event["rank"], event["code"], since, event["asked"]))
            if event["code"]:
                self._fail(host, since, running, f"rank {event['rank']} on {host} failed")
        elif kind == "ended":
            self.result.launcher_codes[host] = event["code"]
            if event["code"] and not event["reason"]:
                self._fail(host, since, running, f"DeepSpeed's launcher on {host} failed")
        elif kind == "failed":
            self.result.lost_hosts[host] = event["text"]
            self._fail(host, since, running, f"{host}: {event['text']}")

    def _fail(self, host: str, since: float, running: set[str], why: str) -> None:
        """Note the first failure and end the job everywhere else."""
        if self.result.first_failure_at is None:
            self.result.first_failure_at = since
            self._tell(running - {host}, {"fail": why})

    def _tell(self, hosts: set[str], order: dict[str, Any]) -> None:
        for host in hosts:
            self._orders[host].put(order)

    # -- a thread a host -----------------------------------------------------------------------------------------------

    def _reach_all(self, host_key_prompt: HostKeyPrompt | None) -> None:
        def done(node: Node, result: object) -> None:
            self._events.put(str(node), ("over", result))

        run_on_all([part.node for part in self._parts.values()], self._ssh, self._work, host_key_prompt, done,
                   at_once=len(self._parts))

    def _work(self, session: Session) -> None:
        host = str(session.node)
        part = self._parts[host]
        facts = query_facts(session, part.place, self._wanted)
        gpus = query_gpu_use(session) if self._wanted.get("gpus") else None
        self._events.put(host, ("facts", {**facts, "gpus": gpus}))
        self._decided.wait()
        if self._job is None:
            return
        with contextlib.closing(open_worker(session, "run_node.py", shlex.quote(part.place.python))) as channel:
            job = {**self._job, "job": self._name, "python": part.place.python, "patience": SILENCE_LIMIT_S,
                   "node_rank": list(self._parts).index(host), "folder": self._job["folders"][host],
                   "script": self._job["scripts"][host], "log": self._job["logs"][host],
                   "arguments": [part.place.translate_path(word) for word in self._job["arguments"]]}
            messages = JsonChannel(channel, host, "run_node")
            messages.send(job)
            self._relay_events(host, messages)

    def _check_speaker(self, host: str, event: dict[str, Any]) -> None:
        """Raise SshError for a host that speaks for the ranks of another, or sends figures that nobody asked for."""
        rank = event.get("rank")
        metrics = event["event"] == "metrics"
        assert self._job
        if metrics and (self._job["follow"] is None or host != next(iter(self._parts))):
            raise SshError(host, "message", "it sends metrics that nobody asked for")
        if rank is not None and not metrics and rank not in self._ranks[host]:
            raise SshError(host, "message", f"it speaks for rank {rank}, which is not its own")

    def _relay_events(self, host: str, messages: JsonChannel) -> None:
        """Pass events to the deciding thread, orders to the host, until it has ended; raise SshError if it is lost."""
        spoken, over = time.monotonic(), False
        while True:
            for event in messages.receive(0.1):
                over = over or event["event"] in ("ended", "failed")
                self._check_speaker(host, event)
                self._events.put(host, ("event", event))
            now = time.monotonic()
            if over:
                return
            if messages.ended:
                raise SshError(host, "connection", messages.stderr_tail()[-300:] or "it exited")
            if now - messages.last_heard > SILENCE_LIMIT_S:
                raise SshError(host, "connection", f"no answer for {SILENCE_LIMIT_S:.0f} s")
            with contextlib.suppress(queue.Empty):
                while True:
                    messages.send(self._orders[host].get_nowait())
                    spoken = now
            if now - spoken > HEARTBEAT_S:
                messages.send({"beat": 1})
                spoken = now
