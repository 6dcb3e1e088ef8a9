"""One training over several hosts: a session a host, one job, one end.

A thread a host holds the connection (node_link.py); this one decides. When a rank fails, every other host is told at
once. A host that can't be reached goes on training, and is connected again; if that takes too long, all save and end.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from master.diagnosis.hang_watch import HangWatch, WatchedJob
from master.inventory.node_facts import query_facts, query_gpu_use
from master.ssh.event_queue import EventQueue
from master.ssh.json_channel import SILENCE_LIMIT_S
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import HostKeyPrompt, run_on_all
from master.ssh.session import Session
from master.ssh.worker_message import check_message
from master.training.job import HostAssignment, JobResult, RankOutput, Supervision, ranks_by_host
from master.training.node_link import NoContact, NodeLink, Patience, attach_all
from master.training.root_cause import describe_exit

TICK_S = 0.1
MANY, SWITCH_S = 64, 0.02  # threads that ask for Python's lock every 5 ms: a thousand took half the time by asking
SAVE_LIMIT_MIN = 30  # minutes that a save may take once it has begun (run_node.py)

Approve = Callable[[dict[str, dict[str, Any]], dict[str, SshError]], "dict[str, Any] | None"]


class ClusterJob:
    """A job to start (`start`), or one that runs and has lost its launcher (`attach`), to be supervised to its end."""

    def __init__(self, parts: Sequence[HostAssignment], ssh: SshOptions, name: str, supervision: Supervision,
                 run: Path, output: RankOutput, say: Callable[[str], None]) -> None:
        self._parts = {str(part.node): part for part in parts}
        self._ssh, self._name, self._supervision = ssh, name, supervision
        self._output, self._say = output, say
        self._hangs = HangWatch(supervision.stall_timeout, WatchedJob(
            name, run, ranks_by_host(parts), {host: part.place.python for host, part in self._parts.items()}))
        self._events: EventQueue[tuple[str, Any]] = EventQueue(self._parts)
        self._decided = threading.Event()
        self._order: Mapping[str, Any] | None = None
        self._links: dict[str, NodeLink] = {}
        self._running = set(self._parts)
        self._lost_at: dict[str, float] = {}  # hosts without a connection, and since when
        self._signals = 0
        self.result = JobResult()

    def start(self, wanted: Mapping[str, Any], approve: Approve, prompt: HostKeyPrompt | None) -> JobResult | None:
        """Run to the end and return what happened; None if it was cancelled before it began. `approve` is given every
        host's facts, and those `wanted`, and returns the job for run_node.py, or None.
        """
        return self._run(lambda: self._start_all(wanted, prompt), lambda: self._collect_facts(approve))

    def attach(self, follows: bool) -> JobResult | None:
        """Supervise the job that runs on the hosts, to its end. `follows`: its first host sends metrics."""
        self._make_links(follows)
        return self._run(lambda: attach_all(self._links, self._events.put), lambda: True)

    def _run(self, reach: Callable[[], None], begin: Callable[[], bool]) -> JobResult | None:
        before = {number: signal.signal(number, self._count) for number in (signal.SIGINT, signal.SIGTERM)}
        check_message("run_node.beat", {"event": "beat"}, "")  # loads what a thousand threads would wait for
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S if len(self._parts) > MANY else interval)
        started = time.monotonic()
        sessions = threading.Thread(target=reach, daemon=True)
        sessions.start()
        try:
            if begin():
                self._supervise(started)
                return self.result
            return None
        finally:
            self._output.close()
            self._decided.set()
            self._events.close()
            sessions.join(timeout=SILENCE_LIMIT_S + 10)
            sys.setswitchinterval(interval)
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def stop_requested(self) -> bool:
        """True once somebody has asked for the end."""
        return self._signals > 0

    def sessions(self) -> dict[str, Session | None]:
        """Return the connections to the hosts, None where there is none now."""
        return {host: link.session for host, link in list(self._links.items())}  # other threads ask, too

    def _count(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _collect_facts(self, approve: Approve) -> bool:
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
        self._order = None if self._signals else approve(facts, faults)
        if self._order is not None:
            self._make_links(self._order["follow"] is not None)
        self._decided.set()
        return self._order is not None

    def _make_links(self, follows: bool) -> None:
        ranks = ranks_by_host(list(self._parts.values()))
        patience = Patience(self._supervision.patience, self._supervision.survives_master)
        for node, (host, part) in enumerate(self._parts.items()):
            put = functools.partial(self._events.put, host)
            self._links[host] = NodeLink(part, node, ranks[host], self._name, self._ssh, patience,
                                         follows and node == 0, put)

    def _supervise(self, started: float) -> None:
        """Handle what the hosts tell until all have ended; end the others when one fails or somebody asks to."""
        told, kept = 0, -1.0
        while self._running:
            if (since := time.monotonic() - started) - kept > TICK_S:  # what looks at every host
                kept = since
                self._output.pass_time()
                self._look_for_hang(since)
                self._give_up(since)
            if self._signals > told:
                self._stop(told := self._signals)
            try:
                host, (kind, content) = self._events.get(timeout=TICK_S)
            except queue.Empty:
                continue
            if kind == "over":
                self._note_over(host, content, since)
            elif kind == "event":
                self._handle_event(host, content, since)
            elif kind == "lost":
                self._lost_at[host] = since
                self._say(f"{host}: connection lost ({content}): its ranks go on; reconnecting for up to "
                          f"{self._supervision.patience:.0f} s")
            elif kind == "back":
                self._lost_at.pop(host, None)
                self._say(f"{host}: connected again after {content:.0f} s")
            elif kind == "alone":
                self.result.ended_alone.add(host)

    def _look_for_hang(self, since: float) -> None:
        """Have the ranks asked where they are when nothing has moved for too long; tell it; end them if asked to."""
        if stalled := self._hangs.overdue(since):
            self._say(stalled)
            self._hangs.examine(self.sessions(), {end.rank: describe_exit(end.code) for end in self.result.exits})
        if (report := self._hangs.take(self._say)) and report.cause.is_hang and self._supervision.ends_hangs:
            self.result.hang = report.cause.sentence
            self._fail("", since, "the training hangs")

    def _stop(self, times: int) -> None:
        """Do what Ctrl-C asks for: the first one saves, the second one kills."""
        self.result.asked_to_stop, grace = True, self._supervision.grace
        if times == 1:
            self._say(f"stopping: the ranks save first, {grace:.0f} s at most to begin and to end; a save that has "
                      f"begun may take {SAVE_LIMIT_MIN} min; Ctrl-C again kills them")
            self._tell(self._running, {"stop": grace, "step": 2 * self._hangs.a_step})
            return
        self._say("killing them")
        self._tell(self._running, {"kill": True})

    def _note_over(self, host: str, outcome: object, since: float) -> None:
        """Handle the end of a host's session: it has ended there, or is out of reach for too long."""
        self._running.discard(host)
        lost_at = self._lost_at.pop(host, None)
        if not isinstance(outcome, SshError) or host in self.result.launcher_codes:
            return
        self.result.lost_hosts[host] = f"{outcome.stage}: {outcome.reason}"
        if isinstance(outcome, NoContact):
            self.result.out_of_reach.add(host)
            if self._running <= set(self._lost_at):
                return  # what the ranks do isn't known, and nobody is left who could be told
        if lost_at is not None and self._hangs.active_since(lost_at, self._running) \
                and self.result.first_failure_at is None:
            self._say(f"{host}: no contact, and the training goes on: all ranks save and end")
            self.result.first_failure_at = since
            self._tell(self._running, {"stop": self._supervision.grace, "step": 2 * self._hangs.a_step})
        else:
            self._fail(host, since, f"connection to {host} lost")

    def _handle_event(self, host: str, event: dict[str, Any], since: float) -> None:
        kind = event["event"]
        self.result.note(host, event, since)
        if kind == "line":
            self._hangs.line(host, since)
            self._output.show(host, event["rank"], event["text"])
        elif kind == "progress":
            self._hangs.progress(host, event["rank"], since, event["text"])
            self._output.show_progress(event["rank"], event["text"])
        elif kind == "metrics":
            self._output.add_metrics(None if event.get("fresh") else event["text"])
        elif kind == "rank" and event["code"] and not event["asked"]:
            self._fail(host, since, f"rank {event['rank']} on {host} failed")
        elif kind == "ended" and event["code"] and not event["reason"]:
            self._fail(host, since, f"DeepSpeed's launcher on {host} failed")
        elif kind == "failed":
            self._fail(host, since, f"{host}: {event['text']}")

    def _fail(self, host: str, since: float, why: str) -> None:
        """Note the first failure and end the job everywhere else."""
        if self.result.first_failure_at is None:
            self.result.first_failure_at = since
            if not self.result.asked_to_stop:
                self._tell(self._running - {host}, {"fail": why})

    def _give_up(self, since: float) -> None:
        """Where hosts may be out of reach for ever: wait for them no longer once the others have ended."""
        watched, lost = self._supervision, self._lost_at
        if watched.survives_master and lost and self._running <= set(lost) and self._running != set(self._parts) \
                and since - max(lost.values()) > watched.patience:
            for host in self._running:
                self._links[host].give_up()

    def _tell(self, hosts: set[str], order: dict[str, Any]) -> None:
        for host in hosts:
            self._links[host].tell(order)

    def _start_all(self, wanted: Mapping[str, Any], prompt: HostKeyPrompt | None) -> None:
        run_on_all([part.node for part in self._parts.values()], self._ssh, lambda session: self._work(session, wanted),
                   prompt, lambda node, result: self._events.put(str(node), ("over", result)), at_once=len(self._parts))

    def _work(self, session: Session, wanted: Mapping[str, Any]) -> None:
        part = self._parts[host := str(session.node)]
        facts = query_facts(session, part.place, wanted)
        self._events.put(host, ("facts", {**facts, "gpus": query_gpu_use(session) if wanted.get("gpus") else None}))
        self._decided.wait()
        if (job := self._order) is None:
            return
        self._links[host].start(session, {
            **job, "job": self._name, "python": part.place.python, "patience": self._supervision.patience,
            "grace": self._supervision.grace, "node_rank": list(self._parts).index(host),
            "folder": job["folders"][host], "script": job["scripts"][host], "log": job["logs"][host],
            "arguments": [part.place.translate_path(word) for word in job["arguments"]],
            "sent": {part.place.translate_path(path): text for path, text in job["sent"].items()}})
