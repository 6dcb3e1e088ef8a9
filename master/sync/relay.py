"""One copy of the data leaves this machine, whatever the number of nodes: each passes on what it gets while it gets it.

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
from typing import Any

from master.core.paths import WORKER
from master.inventory.node_facts import streamed
from master.ssh.json_channel import JsonChannel
from master.ssh.node_names import Node
from master.ssh.route import Access, SshError
from master.ssh.run_on_all import Ask, on_all
from master.ssh.session import Session
from master.sync.chunks import Pieces
from master.sync.file_trees import TreeError
from master.sync.job_key import make_pem
from master.sync.relay_peer import Seat

SCRIPT = WORKER / "receive_files.py"
PYTHON = "python3 -X utf8"  # any will do that is 3.8 or newer; names are read the same in every locale
BEAT, LOST = 3.0, 30.0  # seconds between signs of life; without one after which a node, whose disk may be slow, is lost
STALL = 90.0  # seconds in which a node that gets nothing, while it could, is fed from here, and then let go
UPSTREAM = 3  # nodes before it that one may turn to


class Fanout:
    """Use as a context manager: `reach`, then `plan` and `spread`, or `remove`. `show` is told of the seats."""

    def __init__(self, nodes: Sequence[Node], access: Access, addresses: Mapping[str, str | None],
                 show: Callable[[Sequence[Seat]], None]) -> None:
        self.seats = {str(node): Seat(node, address=addresses.get(str(node))) for node in nodes}
        self._access, self._show = access, show
        self._events: queue.Queue[tuple[Seat, dict[str, Any]]] = queue.Queue()
        self._ended = threading.Event()
        self._feeders: list[threading.Thread] = []
        self._pieces: Pieces | None = None
        self._broken: TreeError | None = None
        self._fleet: threading.Thread | None = None

    def __enter__(self) -> Fanout:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for feeder in self._feeders:
            feeder.join(timeout=5)
        if self._fleet:
            self._fleet.join(timeout=LOST)

    # -- the course of it ----------------------------------------------------------------------------------------------

    def reach(self, question: Ask | None) -> None:
        """Get a session on every node and its hello; of nodes that share a home the first is for all."""
        self._fleet = threading.Thread(target=self._reach_all, args=(question,), daemon=True)
        self._fleet.start()
        self._wait(lambda seat: "hello" in seat.said)
        firsts: dict[str, Seat] = {}
        alike = []
        for seat in self._in():
            first = firsts.setdefault(seat.said["hello"]["id"], seat)
            if first is not seat:  # the same home, or one that was copied with its machine
                alike.append((seat, first))
                seat.tell({"look": first.said["hello"]["meet"]})
        self._wait(lambda seat: "sees" in seat.said or seat not in [one for one, _ in alike])
        for seat, first in alike:
            if seat.takes_part and seat.said["sees"]["there"]:
                seat.same_home = first.host
        for seat in self.seats.values():
            seat.tell({"go": seat.takes_part})

    def remove(self) -> None:
        """Have every node take away what lanspeed put there."""
        for seat in self._in():
            seat.tell({"remove": True})
        self._wait(lambda seat: "finished" in seat.said)

    def plan(self, pieces: Pieces, room: Callable[[Seat], int], overwrite: bool, dry_run: bool) -> None:
        """Announce the files; each node says where they lie and what it lacks. `room`: bytes for an environment."""
        self._pieces = pieces
        common = json.dumps({"trees": pieces.manifest, "pem": make_pem(), "overwrite": overwrite, "dry_run": dry_run})
        for seat in self._in():
            line = f'{{"room": {room(seat)}, {common[1:]}'.encode()
            threading.Thread(target=seat.tell, args=(line,), daemon=True).start()
        self._wait(lambda seat: "plan" in seat.said)
        for seat in self.seats.values():
            first = self.seats.get(seat.same_home)
            if not first or "plan" not in first.said:
                continue
            home, roots = first.said["hello"]["home"], first.said["plan"]["roots"].values()
            if not all(root.startswith(home + "/") for root in roots):
                seat.fault = f"it has the home of {first.host}, but not all lies there: --nodes {seat.host} by itself"

    def spread(self, order: Callable[[Seat], Any]) -> None:
        """Send what is missing; the chain stands in this order. Raises TreeError if a file changes meanwhile."""
        self._wait(lambda seat: "listening" in seat.said)
        chain = sorted(self._in(), key=order)
        for number, seat in enumerate(chain):
            seat.moved = time.monotonic()
            before = [[one.host, one.address, one.said["listening"]["port"]] for one in reversed(chain[:number])
                      if one.address][:UPSTREAM]
            seat.tell({"begin": before})
            if not before:
                self._feed(seat, seat.said["plan"]["missing"])
        self._wait(lambda seat: seat.missing == 0, chain)
        if self._broken:
            raise self._broken
        for seat in self._in():
            seat.tell({"finish": True})
        self._wait(lambda seat: "finished" in seat.said)

    # -- this thread ---------------------------------------------------------------------------------------------------

    def _in(self) -> list[Seat]:
        return [seat for seat in self.seats.values() if seat.takes_part]

    def _wait(self, ready: Callable[[Seat], bool], chain: Sequence[Seat] = ()) -> None:
        """Take in events until all that take part are ready."""
        beat = shown = 0.0
        while not self._broken and any(not ready(seat) for seat in self._in()):
            now = time.monotonic()
            with contextlib.suppress(queue.Empty):
                self._take(*self._events.get(timeout=0.1))
            if now - beat > BEAT:
                beat = now
                for seat in self._in():
                    if seat.channel and now - seat.heard > LOST:
                        seat.fault = f"no sign of life for {LOST:.0f} s"
                    elif not seat.sending.locked():  # else something is on its way to it anyway
                        threading.Thread(target=seat.tell, daemon=True).start()
                self._help_who_is_stalled(chain, now)
            if now - shown > 0.3:
                shown = now
                self._show(list(self.seats.values()))

    def _help_who_is_stalled(self, chain: Sequence[Seat], now: float) -> None:
        """Feed the first in the chain that gets nothing; if that doesn't help, let go of it."""
        for seat in chain:
            if seat.takes_part and seat.missing and now - seat.moved > STALL:
                if seat.fed:
                    seat.fault = f"it took nothing for {STALL:.0f} s"
                else:
                    self._feed(seat, seat.said["plan"]["missing"])
                for other in chain:
                    other.moved = now
                return

    def _take(self, seat: Seat, event: dict[str, Any]) -> None:
        trees = [tree.name for tree in self._pieces.trees] if self._pieces else []
        try:
            seat.hear(event, trees, len(self._pieces.pieces) if self._pieces else 0)
        except ValueError as error:
            seat.fault = f"it says what makes no sense: {error}"
            return
        if event["event"] == "orphan":
            self._feed(seat, event["missing"])

    # -- a thread a node that is fed from here -------------------------------------------------------------------------

    def _feed(self, seat: Seat, numbers: Sequence[int]) -> None:
        pieces = self._pieces
        assert pieces

        def feed() -> None:
            for number in numbers:
                if not seat.takes_part or seat.over or self._ended.is_set():
                    return
                try:
                    data = pieces.read(number)
                except TreeError as error:
                    self._broken = error
                    return
                seat.tell({"piece": number, "bytes": len(data)}, data)

        if not seat.fed:
            seat.fed = True
            self._feeders.append(threading.Thread(target=feed, daemon=True))
            self._feeders[-1].start()

    # -- a thread a node -----------------------------------------------------------------------------------------------

    def _reach_all(self, question: Ask | None) -> None:
        def done(node: Node, result: SshError | None) -> None:
            text = str(result).removeprefix(f"{node}: ") if result else "it ended before its time"
            self._events.put((self.seats[str(node)], {"event": "over", "text": text}))

        nodes = [seat.node for seat in self.seats.values()]
        on_all(nodes, self._access, self._work, question, done, at_once=len(nodes))

    def _work(self, session: Session) -> None:
        seat = self.seats[str(session.node)]
        with contextlib.closing(session.open(f"exec {PYTHON} {streamed(SCRIPT)}")) as channel:
            channel.send(SCRIPT.read_bytes())
            seat.heard, seat.channel = time.monotonic(), channel
            talk = JsonChannel(channel, seat.host)
            while not self._ended.is_set() and seat.takes_part and not talk.ended:
                for event in talk.receive(0.5):
                    self._events.put((seat, event))
            if seat.fault:
                session.close()  # so that whoever still sends to it gives up
            with seat.sending:  # nobody writes to a channel that is closed
                seat.over = True
            said = channel.complaints().splitlines()
            if said and "hello" not in seat.said:
                raise SshError(seat.host, "Python", f"python3 there: {said[-1][:200]}", "sudo apt install python3")
