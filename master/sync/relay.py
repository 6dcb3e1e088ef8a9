"""One copy of the data leaves this machine, whatever the number of nodes: each passes on what it gets while it gets it.

The nodes form a chain. The first gets its chunks over its SSH session; each other one pulls from the one before, by
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

from master.inventory.worker_script import open_worker
from master.ssh.event_queue import EventQueue
from master.ssh.json_channel import JsonChannel
from master.ssh.node_names import Node
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import HostKeyPrompt, run_on_all
from master.ssh.session import Session
from master.sync.chunks import Chunks
from master.sync.file_trees import TreeError
from master.sync.job_key import make_pem
from master.sync.relay_peer import RelayPeer

PYTHON = "python3 -X utf8"  # any will do that is 3.8 or newer; names are read the same in every locale
# seconds between heartbeats; without one after which a node, whose disk may be slow, is lost
HEARTBEAT_S, LOST = 3.0, 30.0
STALL = 90.0  # seconds in which a node that gets nothing, while it could, is fed from here, and then dropped
LONGEST_LINE_BYTES = 16 << 20  # which names the missing pieces of a large dataset
UPSTREAM = 3  # nodes before it that one may turn to


class Relay:
    """Use as a context manager: `reach`, then `plan` and `distribute`, or `remove`. `show` is called with the peers."""

    def __init__(self, nodes: Sequence[Node], ssh: SshOptions, addresses: Mapping[str, str | None],
                 show: Callable[[Sequence[RelayPeer]], None]) -> None:
        self.peers = {str(node): RelayPeer(node, address=addresses.get(str(node))) for node in nodes}
        self._ssh, self._show = ssh, show
        self._events: EventQueue[dict[str, Any]] = EventQueue(self.peers)
        self._ended = threading.Event()
        self._feeders: list[threading.Thread] = []
        self._chunks: Chunks | None = None
        self._broken: TreeError | None = None
        self._sessions: threading.Thread | None = None

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._events.close()
        for feeder in self._feeders:
            feeder.join(timeout=5)
        if self._sessions:
            self._sessions.join(timeout=LOST)

    # -- the course of it ----------------------------------------------------------------------------------------------

    def reach(self, host_key_prompt: HostKeyPrompt | None) -> None:
        """Get a session on every node and its hello; of nodes that share a home the first is for all."""
        self._sessions = threading.Thread(target=self._reach_all, args=(host_key_prompt,), daemon=True)
        self._sessions.start()
        self._wait(lambda peer: "hello" in peer.said)
        firsts: dict[str, RelayPeer] = {}
        shared_homes = []
        for peer in self._in():
            first = firsts.setdefault(peer.said["hello"]["id"], peer)
            if first is not peer:  # the same home, or one that was copied with its machine
                shared_homes.append((peer, first))
                peer.tell({"look": first.said["hello"]["meet"]})
        self._wait(lambda peer: "sees" in peer.said or peer not in [one for one, _ in shared_homes])
        for peer, first in shared_homes:
            if peer.takes_part and peer.said["sees"]["there"]:
                peer.same_home = first.host
        for peer in self.peers.values():
            peer.tell({"go": peer.takes_part})

    def remove(self) -> None:
        """Have every node take away what lanspeed put there."""
        for peer in self._in():
            peer.tell({"remove": True})
        self._wait(lambda peer: "finished" in peer.said)

    def plan(self, chunks: Chunks, environment_bytes: Callable[[RelayPeer], int], overwrite: bool,
             dry_run: bool) -> None:
        """Announce the files; each node says where they lie and what it lacks. `environment_bytes`: bytes for an
        environment."""
        self._chunks = chunks
        common = json.dumps({"trees": chunks.manifest, "pem": make_pem(), "overwrite": overwrite, "dry_run": dry_run})
        for peer in self._in():
            line = f'{{"room": {environment_bytes(peer)}, "address": {json.dumps(peer.address)}, {common[1:]}'.encode()
            threading.Thread(target=peer.tell, args=(line,), daemon=True).start()
        self._wait(lambda peer: "plan" in peer.said)
        for peer in self.peers.values():
            first = self.peers.get(peer.same_home)
            if not first or "plan" not in first.said:
                continue
            home, roots = first.said["hello"]["home"], first.said["plan"]["roots"].values()
            if not all(root.startswith(home + "/") for root in roots):
                peer.reason = (f"it shares the home folder of {first.host}, but not all paths are below it: --nodes "
                               f"{peer.host} by itself")

    def distribute(self, order: Callable[[RelayPeer], Any]) -> None:
        """Send what is missing; the chain stands in this order. Raises TreeError if a file changes meanwhile."""
        self._wait(lambda peer: "listening" in peer.said)
        chain = sorted(self._in(), key=order)
        for number, peer in enumerate(chain):
            peer.moved = time.monotonic()
            before = [[one.host, one.address, one.said["listening"]["port"]] for one in reversed(chain[:number])
                      if one.address][:UPSTREAM]
            peer.tell({"begin": before})
            if not before:
                self._feed(peer, peer.said["plan"]["missing"])
        self._wait(lambda peer: peer.missing == 0, chain)
        if self._broken:
            raise self._broken
        for peer in self._in():
            peer.tell({"finish": True})
        self._wait(lambda peer: "finished" in peer.said)

    # -- this thread ---------------------------------------------------------------------------------------------------

    def _in(self) -> list[RelayPeer]:
        return [peer for peer in self.peers.values() if peer.takes_part]

    def _wait(self, ready: Callable[[RelayPeer], bool], chain: Sequence[RelayPeer] = ()) -> None:
        """Handle events until all that take part are ready."""
        beat = shown = 0.0
        while not self._broken and any(not ready(peer) for peer in self._in()):
            now = time.monotonic()
            with contextlib.suppress(queue.Empty):
                host, event = self._events.get(timeout=0.1)
                self._take(self.peers[host], event)
            if now - beat > HEARTBEAT_S:
                beat = now
                for peer in self._in():
                    if peer.channel and now - peer.heard > LOST:
                        peer.reason = f"no answer for {LOST:.0f} s"
                    elif not peer.sending.locked():  # else something is on its way to it anyway
                        threading.Thread(target=peer.tell, daemon=True).start()
                self._help_who_is_stalled(chain, now)
            if now - shown > 0.3:
                shown = now
                self._show(list(self.peers.values()))

    def _help_who_is_stalled(self, chain: Sequence[RelayPeer], now: float) -> None:
        """Feed the first in the chain that gets nothing; if that doesn't help, drop it."""
        for peer in chain:
            if peer.takes_part and peer.missing and now - peer.moved > STALL:
                if peer.fed:
                    peer.reason = f"it accepted no data for {STALL:.0f} s"
                else:
                    self._feed(peer, peer.said["plan"]["missing"])
                for other in chain:
                    other.moved = now
                return

    def _take(self, peer: RelayPeer, event: dict[str, Any]) -> None:
        trees = [tree.name for tree in self._chunks.trees] if self._chunks else []
        try:
            peer.accept(event, trees, len(self._chunks.chunks) if self._chunks else 0)
        except ValueError as error:
            peer.reason = f"invalid message: {error}"
            return
        if event["event"] == "orphan":
            self._feed(peer, event["missing"])

    # -- a thread a node that is fed from here -------------------------------------------------------------------------

    def _feed(self, peer: RelayPeer, numbers: Sequence[int]) -> None:
        chunks = self._chunks
        assert chunks

        def feed() -> None:
            for number in numbers:
                if not peer.takes_part or peer.over or self._ended.is_set():
                    return
                try:
                    data = chunks.read(number)
                except TreeError as error:
                    self._broken = error
                    return
                peer.tell({"piece": number, "bytes": len(data)}, data)

        if not peer.fed:
            peer.fed = True
            self._feeders.append(threading.Thread(target=feed, daemon=True))
            self._feeders[-1].start()

    # -- a thread a node -----------------------------------------------------------------------------------------------

    def _reach_all(self, host_key_prompt: HostKeyPrompt | None) -> None:
        def done(node: Node, result: SshError | None) -> None:
            text = str(result).removeprefix(f"{node}: ") if result else "it exited early"
            self._events.put(str(node), {"event": "over", "text": text})

        nodes = [peer.node for peer in self.peers.values()]
        run_on_all(nodes, self._ssh, self._work, host_key_prompt, done, at_once=len(nodes))

    def _work(self, session: Session) -> None:
        peer = self.peers[str(session.node)]
        with contextlib.closing(open_worker(session, "receive_files.py", PYTHON)) as channel:
            peer.heard, peer.channel = time.monotonic(), channel
            messages = JsonChannel(channel, peer.host, "receive_files", longest=LONGEST_LINE_BYTES)
            while not self._ended.is_set() and peer.takes_part and not messages.ended:
                for event in messages.receive(0.5):
                    self._events.put(peer.host, event)
            if peer.reason:
                session.close()  # so that whoever still sends to it gives up
            with peer.sending:  # nobody writes to a channel that is closed
                peer.over = True
            if messages.ended and "hello" not in peer.said:
                raise SshError(peer.host, "Python", f"python3 there: {messages.last_words()}",
                               "sudo apt install python3")
