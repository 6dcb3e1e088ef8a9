"""A conversation in JSON with a command on a host: one object a line, both ways.

    talk = JsonChannel(channel, host)
    talk.send({"stop": 60})
    for event in talk.receive(1.0): ...

A start-up file of the host's shell may print anything: whatever isn't an object with the expected key is ignored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from master.ssh.channel import Channel
from master.ssh.route import SshError

MAX_LINE_BYTES = 64 << 20  # bytes of a line; the longest that is sent lists a large dataset's files
SILENCE_LIMIT_S = 12.0  # seconds without a word after which a host is lost; both sides speak every few


class JsonChannel:
    """`last_heard` is when something came last (time.monotonic), `ended` is True once nothing more will come.

    `key`: what an object must have to count; `mark`: what its line begins with. Raises SshError where the connection
    breaks, or a line doesn't end.
    """

    def __init__(self, channel: Channel, host: str, key: str = "event", mark: bytes = b"") -> None:
        self._channel, self._host, self._key, self._mark = channel, host, key, mark
        self._rest = b""
        self.last_heard = time.monotonic()
        self.ended = False

    def send(self, order: Mapping[str, Any], data: bytes = b"") -> None:
        """Send an object, and the bytes that go with it; {} is an empty line, a heartbeat."""
        self._channel.send((json.dumps(order).encode() if order else b"") + b"\n" + data)

    def receive(self, seconds: float) -> list[dict[str, Any]]:
        """Return the objects that have come, [] if none did within the time."""
        block = self._channel.receive(seconds)
        if not block:
            self.ended = block is not None
            return []
        self.last_heard = time.monotonic()
        *lines, self._rest = (self._rest + block).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise SshError(self._host, "connection", "a line of its output is too long")
        found = (parse_object(line[len(self._mark) :], self._key) for line in lines if line.startswith(self._mark))
        return [event for event in found if event is not None]

    def stderr_tail(self) -> str:
        """Return the last of what the command wrote to standard error."""
        return self._channel.stderr_tail()


def parse_object(line: bytes, key: str) -> dict[str, Any] | None:
    """Return the JSON object of a line if it has this key, else None."""
    try:
        found = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and key in found else None
