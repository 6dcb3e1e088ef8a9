"""A conversation in JSON with a command on a host: one object a line, both ways.

    talk = JsonChannel(channel, host, "run_node")
    talk.send({"stop": 60})
    for event in talk.receive(1.0): ...

A start-up file of the host's shell may print anything: whatever isn't an object with the expected key is ignored. What
has the key, and isn't what the script says, loses the host.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from master.core.json_schema import loads
from master.ssh.channel import Channel
from master.ssh.route import SshError
from master.ssh.session import last_words
from master.ssh.worker_message import check_event, check_message

MAX_LINE_BYTES = 64 << 10  # of what a host says
SILENCE_LIMIT_S = 12.0  # seconds without a word after which a host is lost; both sides speak every few


class JsonChannel:
    """`last_heard` is when something came last (time.monotonic), `ended` is True once nothing more will come.

    `script`, in worker/, is what speaks there; `key`: what an object must have to count; `mark`: what its line begins
    with; `longest`: bytes of a line. Raises SshError where the connection breaks, a line doesn't end, or an object
    isn't what worker_messages.schema.json has.
    """

    def __init__(self, channel: Channel, host: str, script: str, key: str = "event", mark: bytes = b"",
                 longest: int = MAX_LINE_BYTES) -> None:
        self._channel, self._host, self._key, self._mark = channel, host, key, mark
        self._check = check_event if key == "event" else check_message
        self._script, self._longest = script, longest
        self._rest = self._noise = b""
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
        if max(map(len, [*lines, self._rest])) > self._longest:
            raise SshError(self._host, "message", f"a line of its output has more than {self._longest >> 10} KiB")
        events = []
        for line in lines:
            event = parse_object(line[len(self._mark) :], self._key) if line.startswith(self._mark) else None
            if event is not None:
                events.append(event)
            elif line.strip():
                self._noise = line
        for event in events:
            self._check(self._script, event, self._host)
        return events

    def last_words(self) -> str:
        """Return what the host said last that is no message: why it ended, perhaps."""
        return last_words((self._rest or self._noise).decode("utf-8", "replace"), self._channel.stderr_tail())[-300:]


def parse_object(line: bytes, key: str) -> dict[str, Any] | None:
    """Return the JSON object of a line if it has this key, else None."""
    try:
        found = loads(line.decode("utf-8", "replace"))
    except ValueError:
        return None
    return found if isinstance(found, dict) and key in found else None
