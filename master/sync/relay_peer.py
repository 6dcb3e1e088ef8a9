"""A node that gets files: its channel, its messages, its progress. Every message is validated before it is used."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from master.ssh.channel import Channel
from master.ssh.node_names import Node
from master.ssh.route import SshError


@dataclass
class RelayPeer:
    """A node in the chain; `reason` once it is out, `same_home` of another node, which gets the files for both."""

    node: Node
    channel: Channel | None = None
    address: str | None = None  # at which the others may reach it
    said: dict[str, dict[str, Any]] = field(default_factory=dict)  # the last event of each kind
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)  # when it last got something
    missing: int = 0  # pieces
    written: int = 0  # bytes
    same_home: str = ""
    reason: str | None = None
    fed: bool = False  # from here, and not by the node before it
    over: bool = False
    sending: threading.Lock = field(default_factory=threading.Lock)

    @property
    def host(self) -> str:
        """The node as it was named."""
        return str(self.node)

    @property
    def takes_part(self) -> bool:
        """True while it belongs to the chain."""
        return self.reason is None and not self.same_home

    @property
    def total(self) -> int:
        """Bytes that it lacked."""
        return int(self.said.get("plan", {}).get("bytes", 0))

    def tell(self, order: Mapping[str, Any] | bytes = b"", data: bytes = b"") -> None:
        """Send an order (as JSON already, or not yet) and the bytes that go with it; an empty one is a heartbeat.

        A connection that breaks shows elsewhere.
        """
        line = order if isinstance(order, bytes) else json.dumps(order).encode()
        with self.sending, contextlib.suppress(SshError):
            if self.channel and not self.over:
                self.channel.send(line + b"\n" + data)

    def accept(self, event: Mapping[str, Any], trees: Collection[str], chunks: int) -> None:
        """Handle an event of worker_messages.schema.json, or "over"; raise ValueError for one that makes no sense with
        these trees and so many pieces."""
        kind = event["event"]
        if kind in ("plan", "orphan") and any(number >= chunks for number in event["missing"]):
            raise ValueError(f"{kind} with unknown pieces")
        if kind == "plan" and set(event["roots"]) != set(trees):
            raise ValueError("plan with odd roots")
        if kind == "hello" and not event["meet"].startswith(f"{event['home']}/.lanspeed/meet-"):
            raise ValueError("hello with an odd meeting place")
        self.heard = time.monotonic()
        if kind == "hello" and isinstance(address := event.get("address"), str):
            self.address = self.address or address
        elif kind == "plan":
            self.missing, self.reason = len(event["missing"]), "; ".join(event["faults"]) or self.reason
        elif kind == "progress":
            self.moved = self.heard if event["bytes"] != self.written else self.moved
            self.written, self.missing = event["bytes"], event["missing"]
        elif kind in ("failed", "over") and self.takes_part and "finished" not in self.said:
            self.reason = event["text"]
        self.said[kind] = dict(event)
