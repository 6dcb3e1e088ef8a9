"""The connection to worker/run_node.py on one host, for the whole of a job: what breaks is connected again.

    link = NodeLink(host, job, ssh, patience, inbox)
    link.run(session, order)

While there is no connection the ranks there go on, and what they say is kept; after `patience` they save and end.
"""

from __future__ import annotations

import contextlib
import queue
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from master.inventory.worker_script import open_worker
from master.ssh.json_channel import SILENCE_LIMIT_S, JsonChannel
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import Waiting, connect
from master.ssh.session import Session
from master.training.job import HostAssignment

HEARTBEAT_S = 3.0  # seconds between two heartbeats, both ways
CONFIRM_EVENTS = 100  # events after which they are confirmed at once: the host says no more than its window
LISTEN_S = 0.25  # seconds after which a thread that hears nothing looks for orders
TRY_EVERY_S = 2.0  # seconds between two attempts to connect
LEAST_TRY_S = 2.0  # seconds that an attempt has, however little patience is left
STOPPED_S = 5.0  # seconds without a look at the channel, after which this process itself was stopped or asleep


@dataclass(frozen=True)
class Patience:
    """How long a host may be out of reach, in seconds; `for_ever`: until the others have ended."""

    seconds: float
    for_ever: bool = False

    @property
    def silence(self) -> float:
        """Seconds without a word after which a connection counts as lost."""
        return SILENCE_LIMIT_S if self.for_ever else min(SILENCE_LIMIT_S, self.seconds)


class NoContact(SshError):
    """A host that was out of reach for too long; what its ranks do isn't known."""


class Absent(Exception):
    """No process supervises the job on the host any more."""


class NodeLink:
    """`put((kind, content))` hands on what happens: event, lost (why), back (after seconds), alone (it ended unseen).

    `follows`: metrics are expected of it. `put` may be given a heartbeat to call while it has to wait.
    """

    def __init__(self, part: HostAssignment, node: int, ranks: range, job: str, ssh: SshOptions, patience: Patience,
                 follows: bool, put: Callable[..., None]) -> None:
        self._part, self._node, self._ranks, self._job, self._ssh = part, node, ranks, job, ssh
        self._host = str(part.node)
        self._patience, self._follows, self._put = patience, follows, put
        self.session: Session | None = None  # while there is a connection
        self._orders: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        self._hopeless = threading.Event()  # no more attempts to connect
        self._seen: int | None = None  # the last event that has come
        self._started = self._over = False
        self._heard = boot_time()  # when something came last
        self._lost_at: float | None = None  # since when there has been no connection (time.monotonic), and why
        self._why, self._quiet = "", 0.0  # `_quiet`: seconds without a word before it counted as lost
        self._spoken = 0.0

    def tell(self, order: Mapping[str, Any]) -> None:
        """Give the host an order, as soon as it can be reached."""
        if "fail" in order or "kill" in order:
            self.give_up()
        self._orders.put(order)

    def give_up(self) -> None:
        """Connect no more, should the connection be lost."""
        self._hopeless.set()

    def start(self, session: Session, order: Mapping[str, Any]) -> None:
        """Start the job there, and hand on what it says until it has ended. Raises SshError for a host that is lost."""
        with contextlib.ExitStack() as stack:
            self._follow(self._open(session, order, stack), stack)

    def attach(self) -> None:
        """Connect to the job that runs there, and do the same. Raises SshError."""
        self._started, self._heard = True, float("-inf")
        with contextlib.ExitStack() as stack:
            try:
                messages = self._connect(stack)
            except SshError as fault:
                messages = self._reconnect(fault, stack)
            self._follow(messages, stack)

    def _follow(self, messages: JsonChannel, stack: contextlib.ExitStack) -> None:
        """Relay until it has ended, over one connection after the other."""
        while True:
            try:
                self._relay(messages)
                return
            except Absent:
                if self._lost_at is None or boot_time() - self._heard >= self._patience.seconds:
                    self._put(("alone", None))
                    return
                raise SshError(self._host, "connection", self._why) from None
            except SshError as fault:
                if not self._started or fault.stage == "message":
                    raise
                stack.close()
                messages = self._reconnect(fault, stack)

    def _open(self, session: Session, order: Mapping[str, Any], stack: contextlib.ExitStack) -> JsonChannel:
        self.session = session
        python = shlex.quote(self._part.place.python)
        channel = stack.enter_context(contextlib.closing(open_worker(session, "run_node.py", python)))
        messages = JsonChannel(channel, self._host, "run_node")
        messages.send(order)
        return messages

    def _reconnect(self, fault: SshError, stack: contextlib.ExitStack) -> JsonChannel:
        """Connect again and return the channel. Raises NoContact if that can't be done in time."""
        if fault.stage == "host key":
            raise fault
        self.session = None
        if self._lost_at is None:
            self._lost_at, self._why, self._quiet = time.monotonic() - self._quiet, fault.reason, 0.0
            self._put(("lost", fault.reason))
        patience = float("inf") if self._patience.for_ever else self._patience.seconds
        while True:
            left = self._lost_at + patience - time.monotonic()
            if self._hopeless.wait(max(0.0, min(TRY_EVERY_S, left))):
                raise SshError(self._host, "connection", self._why)
            try:
                return self._connect(stack, max(left, LEAST_TRY_S))
            except SshError as error:
                fault = error
            if left < 0:
                raise NoContact(self._host, "connection",
                                f"no contact for {patience:.0f} s ({fault.stage}: {fault.reason})")

    def _connect(self, stack: contextlib.ExitStack, within: float = float("inf")) -> JsonChannel:
        """Connect to the job that runs there, `within` seconds. Raises SshError."""
        ssh = replace(self._ssh, connect_timeout=min(self._ssh.connect_timeout, within))
        try:
            session = connect(self._part.node, ssh, may_ask=False)
            assert not isinstance(session, Waiting)
            stack.callback(session.close)
            order = {"attach": self._job, "node": self._node, "seen": self._seen}
            return self._open(session, order, stack)
        except SshError:
            stack.close()
            raise

    def _relay(self, messages: JsonChannel) -> None:
        """Hand on events, and orders to the host, until it has ended. Raises SshError if it is lost, Absent."""
        self._spoken, unconfirmed = time.monotonic(), 0

        def speak() -> None:
            if time.monotonic() - self._spoken > min(HEARTBEAT_S, self._patience.seconds / 4):
                self._spoken = time.monotonic()
                messages.send({"beat": self._seen or 0})

        while True:
            looked = time.monotonic()
            for event in messages.receive(LISTEN_S):
                unconfirmed += self._hear(event, speak)
            if self._over:
                with contextlib.suppress(SshError):  # it waits for this no longer than its patience
                    messages.send({"beat": self._seen or 0})
                return
            if unconfirmed >= CONFIRM_EVENTS:
                messages.send({"beat": self._seen or 0})
                unconfirmed = 0
            now = time.monotonic()
            if messages.ended:
                raise SshError(self._host, "connection", f"it exited: {messages.last_words()}")
            if now - looked > STOPPED_S:
                messages.last_heard = now  # what has come meanwhile waits to be read
            if now - messages.last_heard > self._patience.silence:
                self._quiet = now - messages.last_heard
                raise SshError(self._host, "connection", f"no answer for {self._patience.silence:.0f} s")
            while not self._orders.empty():
                messages.send(self._orders.get())
            speak()

    def _hear(self, event: dict[str, Any], speak: Callable[[], None]) -> bool:
        """Hand on an event; return whether it is to be confirmed. Raises SshError for one that can't be, Absent."""
        kind, number = event["event"], event.pop("n", None)
        if kind == "absent":
            raise Absent
        if number is not None and number != (number if self._seen is None else self._seen + 1):
            raise SshError(self._host, "message", f"event {number} comes after event {self._seen}")
        self._check_speaker(event)
        self._heard = boot_time()
        if self._lost_at is not None:
            self._put(("back", time.monotonic() - self._lost_at), speak)
            self._lost_at = None
        self._started = True
        self._over = kind in ("ended", "failed")
        if kind not in ("beat", "attached"):
            self._put(("event", event), speak)
        self._seen = number or self._seen
        return number is not None

    def _check_speaker(self, event: Mapping[str, Any]) -> None:
        """Raise SshError for a host that speaks for the ranks of another, or sends figures that nobody asked for."""
        rank, metrics = event.get("rank"), event["event"] == "metrics"
        if metrics and not self._follows:
            raise SshError(self._host, "message", "it sends metrics that nobody asked for")
        if rank is not None and not metrics and rank not in self._ranks:
            raise SshError(self._host, "message", f"it speaks for rank {rank}, which is not its own")


def attach_all(links: Mapping[str, NodeLink], put: Callable[[str, tuple[str, Any]], None]) -> None:
    """Connect to a job on all of its hosts, and do as `attach` does until all have ended."""
    def attach(host: str) -> None:
        try:
            links[host].attach()
            put(host, ("over", None))
        except Exception as error:  # as in run_on_all: a host whose thread died silently would be waited for
            put(host, ("over", error if isinstance(error, SshError) else SshError(host, "internal", repr(error))))

    with ThreadPoolExecutor(len(links)) as pool:
        pool.map(attach, links)


def boot_time() -> float:
    """Return a clock in seconds that goes on while this machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
