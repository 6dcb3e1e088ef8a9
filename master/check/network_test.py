"""The network between nodes, tested from each to each: worker/probe_network.py on all of them, told what to do.

A port that one node can't reach on another, the rate and the round trip of each pair, and of all pairs at once.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from master.check.finding import Finding
from master.inventory.node_facts import RemoteCheckout
from master.inventory.worker_script import open_worker
from master.ssh.channel import Channel
from master.ssh.json_channel import JsonChannel
from master.ssh.node_names import Node
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import HostKeyPrompt, run_on_all
from master.ssh.session import Session

ANSWER = 15.0  # seconds that a node may take beyond the work itself
SENDING = 2.0  # seconds that each pair sends, after half a second to get warm
RENDEZVOUS = 29500  # DeepSpeed's and torchrun's port of rank 0
FULL_SPEED = 0.75  # of a card's own speed that a pair should reach
ODD = 0.5  # of the median pair's rate, below which a pair is named


@dataclass
class Pair:
    """What one node found of another: the round trip, bytes a second alone and while all send (None unmeasured)."""

    source: str
    target: str
    latency_s: float | None = None
    alone: float | None = None
    together: float | None = None
    faults: list[str] = field(default_factory=list)


class Peer:
    """A node that follows orders; after its connection is lost it answers None."""

    def __init__(self, host: str, channel: Channel) -> None:
        self.host, self._channel = host, JsonChannel(channel, host, "probe_network")
        self._waiting: list[dict[str, Any]] = []
        self.lost: str | None = None
        self.ports: list[int | None] = []

    def tell(self, **order: Any) -> None:
        """Send an order; without one, a heartbeat."""
        if not self.lost:
            try:
                self._channel.send(order)
            except SshError as error:
                self.lost = error.reason

    def hear(self, event: str, seconds: float) -> dict[str, Any] | None:
        """Return the answer, None if none comes in time."""
        end = time.monotonic() + seconds
        while not self.lost:
            while self._waiting:
                if (found := self._waiting.pop(0))["event"] == event:
                    return found
            left = end - time.monotonic()
            try:
                self._waiting = self._channel.receive(left) if left > 0 else []
            except SshError as error:
                self.lost = error.reason
                break
            if self._channel.ended or left <= 0:
                self.lost = self._channel.last_words() if self._channel.ended else "no answer"
        return None


def test_network(places: Mapping[Node, RemoteCheckout], addresses: Mapping[str, str], ssh: SshOptions, rates: bool,
                 host_key_prompt: HostKeyPrompt | None, say: Callable[[str], None]) -> tuple[list[Pair],
                                                                                             dict[str, str]]:
    """Return what each node found of each other one, and the nodes that couldn't take part, with why.

    addresses: by host, the one on which it will be reached. With `rates` each pair sends alone, then all in a ring.
    """
    peers: dict[str, Peer] = {}
    lost: dict[str, str] = {}
    arrived, finished = threading.Semaphore(0), threading.Event()

    def work(session: Session) -> None:
        python = shlex.quote(places[session.node].python)
        with contextlib.closing(open_worker(session, "probe_network.py", python)) as channel:
            peers[str(session.node)] = Peer(str(session.node), channel)
            arrived.release()
            finished.wait()

    def done(node: Node, result: object) -> None:
        if isinstance(result, SshError):
            lost[str(node)] = f"{result.stage}: {result.reason}"
            arrived.release()

    sessions = threading.Thread(target=run_on_all, args=(list(places), ssh, work, host_key_prompt, done),
                                kwargs={"at_once": len(places)}, daemon=True)
    sessions.start()
    try:
        for _ in places:
            arrived.acquire()
        pairs = connect_all([peers[str(node)] for node in places if str(node) in peers], addresses, rates, say)
    finally:
        finished.set()
        sessions.join(timeout=ANSWER)
    return pairs, {**lost, **{host: peer.lost for host, peer in peers.items() if peer.lost}}


def connect_all(peers: Sequence[Peer], addresses: Mapping[str, str], rates: bool, say: Callable[[str], None]
             ) -> list[Pair]:
    """Have every node listen, then reach every other, then send."""
    token = secrets.token_hex(16)
    for peer in peers:
        peer.tell(listen=[RENDEZVOUS, 0], token=token, address=addresses.get(peer.host))
    for peer in peers:
        peer.ports = (peer.hear("ready", ANSWER) or {"ports": []})["ports"]
        if not peer.lost and len(peer.ports) != 2:
            peer.lost = "it doesn't open its ports"
    up = [peer for peer in peers if not peer.lost]
    pairs = {(one.host, other.host): Pair(one.host, other.host) for one in up for other in up if one is not other}
    for one in up:
        one.tell(connect=[[other.host, addresses[other.host], port] for other in up if other is not one
                          for port in other.ports if port])
    for one in up:
        for result in (one.hear("reached", ANSWER) or {"results": []})["results"]:
            pair = pairs.get((one.host, result["name"]))
            if pair is None:
                one.lost = f"it speaks of {result['name'][:40]!r}, which nobody asked for"
                break
            if result["fault"] or result["latency_s"] is None:
                pair.faults.append(f"port {result['port']}: {result['fault']}")
            else:
                pair.latency_s = min(result["latency_s"], pair.latency_s or result["latency_s"])
    if rates:
        measure_rates([peer for peer in up if not peer.lost], addresses, pairs, say)
    return list(pairs.values())


def rounds(up: Sequence[Peer]) -> Iterator[list[tuple[Peer, Peer]]]:
    """Yield groups of pairs that can send side by side, as no host is in two of them; all pairs, in both directions.

    One host stays, the others move on by a place (the circle method of round-robin tournaments).
    """
    ring: list[Peer | None] = [*up, *([None] if len(up) % 2 else [])]
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        group = [(one, other) for one, other in zip(ring[:half], reversed(ring[half:]), strict=True) if one and other]
        yield group
        yield [(other, one) for one, other in group]
        ring = [ring[0], ring[-1], *ring[1:-1]]


def measure_rates(up: Sequence[Peer], addresses: Mapping[str, str], pairs: Mapping[tuple[str, str], Pair],
                  say: Callable[[str], None]) -> None:
    """Let each pair send alone, in both directions, then every node to the next, as an all-reduce's ring does."""
    def rate(one: Peer) -> float | None:
        found = one.hear("rate", SENDING + ANSWER) or {"bytes_per_s": None}
        value: float | None = found["bytes_per_s"]
        return value

    for side_by_side in rounds(up):
        for peer in up:
            peer.tell()
        sending = [(one, other, pairs[one.host, other.host]) for one, other in side_by_side
                   if pairs[one.host, other.host].latency_s is not None and other.ports[-1]]
        for one, other, _ in sending:
            one.tell(send=[addresses[other.host], other.ports[-1]], seconds=SENDING)
        for one, other, pair in sending:
            pair.alone = rate(one)
            if pair.alone:
                say(f"{one.host} -> {other.host}: {pair.alone / 1e6:.1f} MB/s, {(pair.latency_s or 0) * 1e3:.2f} ms")
    ring = [(one, up[(number + 1) % len(up)]) for number, one in enumerate(up)] if len(up) > 1 else []
    ring = [(one, other) for one, other in ring if pairs[one.host, other.host].latency_s is not None]
    for one, other in ring:
        one.tell(send=[addresses[other.host], other.ports[-1]], seconds=SENDING)
    for one, other in ring:
        pairs[one.host, other.host].together = rate(one)


def firewall_finding(addresses: Mapping[str, str]) -> Finding:
    """Return the commands that let only these hosts reach each other's ports, which ask nobody for a key."""
    rules = " && ".join(f"sudo ufw allow from {address}" for address in dict.fromkeys(addresses.values()))
    return Finding("info", tuple(addresses), "the ranks' ports ask nobody for a key",
                   "whoever reaches them can disturb a training",
                   f"On each: sudo ufw allow ssh && {rules} && sudo ufw enable")


def opening(pair: Pair, addresses: Mapping[str, str], target: Mapping[str, Any]) -> str:
    """Return the firewall's command that lets a host reach another's ranks, whose ports are of its port range."""
    command = f"sudo ufw allow from {addresses[pair.source]}"
    if not target.get("port_range") or any(fault.startswith(f"port {RENDEZVOUS}:") for fault in pair.faults):
        return command
    first, last = target["port_range"]
    return f"{command} to any port {first}:{last} proto tcp"


def network_findings(pairs: Sequence[Pair], lost: Mapping[str, str], facts: Mapping[str, Mapping[str, Any]],
                     addresses: Mapping[str, str]) -> list[Finding]:
    """Return which host doesn't reach which, and which pairs are slower than their cards or than the others."""
    found = [Finding("error", (host,), why, "the network can't be tried from there", "") for host, why in lost.items()]
    for pair in pairs:
        for reason in pair.faults:
            found.append(Finding("error", (pair.source,), f"{pair.target} {reason}",
                                 "the ranks can't connect, or hang at the first all-reduce",
                                 f"open {pair.target}'s firewall for {addresses[pair.source]}, as by "
                                 f"{opening(pair, addresses, facts.get(pair.target, {}))} there"))
    rates = sorted(pair.alone for pair in pairs if pair.alone)
    usual = rates[len(rates) // 2] if rates else 0.0
    for pair in pairs:
        cards = [facts[host]["card"] for host in (pair.source, pair.target) if host in facts]
        speeds = [card["mbit"] for card in cards if card and card["mbit"]]
        expected = min(speeds) * 1e6 / 8 if len(speeds) == 2 else None  # bytes a second, by the slower card
        if pair.alone is None:
            continue
        if pair.alone < ODD * usual:
            found.append(Finding("warning", (pair.source, pair.target),
                                 f"{pair.alone / 1e6:.1f} MB/s, the usual pair has {usual / 1e6:.1f}",
                                 "every step waits for the slowest pair", "look at its cable, port and card"))
        elif expected and pair.alone < FULL_SPEED * expected:
            found.append(Finding("warning", (pair.source, pair.target),
                                 f"{pair.alone / 1e6:.1f} MB/s of the {expected / 1e6:.0f} that their cards could",
                                 "communication takes longer than it should",
                                 "look at cables, the switch and other traffic"))
    return found
