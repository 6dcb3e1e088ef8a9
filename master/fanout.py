"""One copy leaves this machine, whatever the number of nodes: each passes on what it gets while it gets it.

The nodes stand in a chain. The first gets its pieces over its SSH session; each other one pulls from the one before, by
TLS with a key pair that is made for this one job. A node that is lost costs the others nothing: the next in the chain
turns to the one before, or else is fed from here. worker/receive_files.py is the nodes' side.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from master.channels import Channel
from master.fleet import Ask, on_all
from master.job_key import make_pem
from master.node_facts import streamed
from master.nodes import Node
from master.pieces import WORKER, Pieces
from master.ssh import Session
from master.ssh_config import Access, SshError
from master.trees import TreeError

PYTHON = "python3"  # any will do that is 3.8 or newer
BEAT, SILENCE = 3.0, 30.0  # seconds between signs of life; without one after which a node counts as lost
LONGEST = 32 << 20  # bytes of one event
STALL = 120.0  # seconds in which a node that gets nothing, while it could, is let go


@dataclass
class Seat:
    """A node in the chain: its channel, what it said, how far it is; `fault` once it is out."""

    node: Node
    channel: Channel | None = None
    address: str | None = None  # at which the others may reach it
    said: dict[str, dict[str, Any]] = field(default_factory=dict)  # the last event of each kind
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)  # when it last got something
    missing: int = 0  # pieces
    written: int = 0  # bytes
    same_home: str = ""  # of this node, which gets the files for both
    fault: str | None = None
    over: bool = False
    sending: threading.Lock = field(default_factory=threading.Lock)

    @property
    def host(self) -> str:
        """The node as it was named."""
        return str(self.node)

    @property
    def takes_part(self) -> bool:
        """True while it belongs to the chain."""
        return self.fault is None and not self.same_home

    @property
    def total(self) -> int:
        """Bytes that it lacked."""
        return int(self.said.get("plan", {}).get("bytes", 0))

    def tell(self, order: Mapping[str, Any] | None = None, data: bytes = b"") -> None:
        """Send an order and the bytes that go with it; without one, a sign of life. A broken connection shows later."""
        with self.sending, contextlib.suppress(SshError):
            if self.channel and not self.over:
                self.channel.send((json.dumps(order) if order else "").encode() + b"\n" + data)


class Fanout:
    """Use as a context manager: `reach`, then `plan` and `spread`, or `remove`. `show` is told of the seats."""

    def __init__(self, nodes: Sequence[Node], access: Access, addresses: Mapping[str, str | None],
                 show: Callable[[Sequence[Seat]], None]) -> None:
        self.seats = {str(node): Seat(node, address=addresses.get(str(node))) for node in nodes}
        self._access, self._show = access, show
        self._events: queue.Queue[tuple[Seat, dict[str, Any]]] = queue.Queue()
        self._ended = threading.Event()
        self._feeders: list[threading.Thread] = []
        self._broken: TreeError | None = None
        self._fleet: threading.Thread | None = None

    def __enter__(self) -> Fanout:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for feeder in self._feeders:
            feeder.join(timeout=5)
        if self._fleet:
            self._fleet.join(timeout=SILENCE)

    # -- the course of it ----------------------------------------------------------------------------------------------

    def reach(self, question: Ask | None) -> None:
        """Get a session on every node and its hello; nodes that share a home with one before it are out."""
        self._fleet = threading.Thread(target=self._reach_all, args=(question,), daemon=True)
        self._fleet.start()
        self._wait(lambda seat: "hello" in seat.said)
        homes: dict[str, str] = {}
        for seat in self._in():
            first = homes.setdefault(seat.said["hello"]["id"], seat.host)
            if first != seat.host:
                seat.same_home = first
            seat.tell({"go": seat.takes_part})

    def remove(self) -> None:
        """Have every node take away what lanspeed put there."""
        for seat in self._in():
            seat.tell({"remove": True})
        self._wait(lambda seat: "finished" in seat.said)

    def plan(self, pieces: Pieces, room: Callable[[Seat], int], overwrite: bool) -> None:
        """Announce the files; each node says where they lie and what it lacks. `room`: bytes for an environment."""
        common = {"trees": pieces.manifest, "pem": make_pem(), "overwrite": overwrite}
        for seat in self._in():
            threading.Thread(target=seat.tell, args=({**common, "room": room(seat)},), daemon=True).start()
        self._wait(lambda seat: "plan" in seat.said)

    def spread(self, pieces: Pieces, order: Callable[[Seat], Any]) -> None:
        """Send what is missing; the chain stands in this order. Raises TreeError if a file changes meanwhile."""
        self._wait(lambda seat: "listening" in seat.said)
        chain = sorted(self._in(), key=order)
        for number, seat in enumerate(chain):
            seat.moved = time.monotonic()
            before = [[one.host, one.address, one.said["listening"]["port"]] for one in reversed(chain[:number])
                      if one.address]
            seat.tell({"begin": before})
            if not before and seat.missing:
                self._feed(seat, pieces, seat.said["plan"]["missing"])
        self._wait(lambda seat: seat.missing == 0, pieces, chain)
        if self._broken:
            raise self._broken
        for seat in self._in():
            seat.tell({"finish": True})
        self._wait(lambda seat: "finished" in seat.said)

    # -- this thread ---------------------------------------------------------------------------------------------------

    def _in(self) -> list[Seat]:
        return [seat for seat in self.seats.values() if seat.takes_part]

    def _wait(self, ready: Callable[[Seat], bool], pieces: Pieces | None = None, chain: Sequence[Seat] = ()) -> None:
        """Take in events until all that take part are ready."""
        beat = shown = 0.0
        while not self._broken and any(not ready(seat) for seat in self._in()):
            now = time.monotonic()
            with contextlib.suppress(queue.Empty):
                seat, event = self._events.get(timeout=0.1)
                try:
                    self._take(seat, event, pieces)
                except (KeyError, TypeError, ValueError):  # a node may say anything
                    seat.fault = "it says what makes no sense"
            if now - beat > BEAT:
                beat = now
                for seat in self._in():
                    if seat.channel and not ready(seat) and now - seat.heard > SILENCE:
                        seat.fault = f"no sign of life for {SILENCE:.0f} s"
                    elif not seat.sending.locked():  # else something is on its way to it anyway
                        seat.tell()
                self._let_go_of_stalled(chain, now)
            if now - shown > 0.3:
                shown = now
                self._show(list(self.seats.values()))

    @staticmethod
    def _let_go_of_stalled(chain: Sequence[Seat], now: float) -> None:
        """Let go of the first in the chain that gets nothing; those behind it then turn to the ones before it."""
        for seat in chain:
            if seat.takes_part and seat.missing and now - seat.moved > STALL:
                seat.fault = f"it took nothing for {STALL:.0f} s"
                for other in chain:
                    other.moved = now
                return

    def _take(self, seat: Seat, event: dict[str, Any], pieces: Pieces | None) -> None:
        kind = event["event"]
        seat.heard = time.monotonic()
        if kind == "hello":
            event["id"], event["machine"], uv = str(event["id"]), str(event["machine"]), event["uv"]
            event["uv"] = uv if isinstance(uv, str) else None
        elif kind == "plan":
            seat.missing, event["bytes"] = len(event["missing"]), int(event["bytes"])
            event["roots"] = {str(name): str(root) for name, root in dict(event["roots"]).items()}
            seat.fault = "; ".join(map(str, event["faults"])) or None
        elif kind == "progress":
            written, seat.missing = int(event["bytes"]), int(event["missing"])
            seat.moved = seat.heard if written != seat.written else seat.moved
            seat.written = written
        elif kind == "orphan" and pieces:
            self._feed(seat, pieces, event["missing"])
        elif kind in ("failed", "over") and seat.takes_part and "finished" not in seat.said:
            seat.fault = str(event["text"])
        seat.said[str(kind)] = event

    # -- a thread a node that is fed from here -------------------------------------------------------------------------

    def _feed(self, seat: Seat, pieces: Pieces, numbers: Sequence[int]) -> None:
        known = range(len(pieces.pieces))

        def feed() -> None:
            for number in numbers:
                if number not in known or not seat.takes_part or seat.over or self._ended.is_set():
                    return
                try:
                    data = pieces.read(number)
                except TreeError as error:
                    self._broken = error
                    return
                seat.tell({"piece": number, "bytes": len(data)}, data)

        self._feeders.append(threading.Thread(target=feed, daemon=True))
        self._feeders[-1].start()

    # -- a thread a node -----------------------------------------------------------------------------------------------

    def _reach_all(self, question: Ask | None) -> None:
        def done(node: Node, result: SshError | None) -> None:
            seat = self.seats[str(node)]
            text = str(result).removeprefix(f"{node}: ") if result else "it ended before its time"
            self._events.put((seat, {"event": "over", "text": text}))

        on_all([seat.node for seat in self.seats.values()], self._access, self._work, question, done)

    def _work(self, session: Session) -> None:
        seat = self.seats[str(session.node)]
        if seat.address is None:
            seat.address = server_address(session)
        with contextlib.closing(session.open(f"exec {PYTHON} {streamed(WORKER)}")) as channel:
            channel.send(WORKER.read_bytes())
            seat.channel, seat.heard, rest = channel, time.monotonic(), b""
            while not self._ended.is_set() and seat.takes_part:
                block = channel.receive(0.5)
                if block == b"":
                    break
                *lines, rest = (rest + (block or b"")).split(b"\n")
                if len(rest) > LONGEST:
                    raise SshError(seat.host, "sync", "it says more than makes sense")
                for line in lines:
                    with contextlib.suppress(ValueError):
                        if isinstance(event := json.loads(line), dict) and "event" in event:
                            self._events.put((seat, event))
            with seat.sending:  # nobody writes to a channel that is closed
                seat.over = True
            said = channel.complaints().splitlines()
            if said and "hello" not in seat.said:
                raise SshError(seat.host, "Python", f"{PYTHON} there: {said[-1][:200]}", "sudo apt install python3")


def server_address(session: Session) -> str | None:
    """Return the address at which a node was reached on its own network, None if it doesn't say."""
    found = session.run('printf "\\n@@ADDRESS %s\\n" "$SSH_CONNECTION"').out
    for line in found.splitlines():
        if line.startswith("@@ADDRESS ") and len(words := line.split()) >= 4:
            return words[3]
    return None
