"""What hosts say, checked against schemas/worker_messages.schema.json before it counts: a host may say anything."""

from __future__ import annotations

import functools
from typing import Any

from master.core.json_schema import definitions, first_error
from master.core.paths import SCHEMAS
from master.ssh.route import SshError

SCHEMA = SCHEMAS / "worker_messages.schema.json"


@functools.cache
def kinds() -> frozenset[str]:
    """Return the names of all messages: facts, run_node.line, ..."""
    return frozenset(definitions(SCHEMA))


def check_message(kind: str, value: Any, host: str) -> None:
    """Raise SshError for a message that isn't what its kind has."""
    if fault := first_error(SCHEMA, value, kind):
        raise SshError(host, "message", f"{kind} makes no sense: {fault}")


def check_event(script: str, event: Any, host: str) -> None:
    """Raise SshError for an event that a script of worker/ doesn't have, or not so."""
    kind = f"{script}.{event.get('event')}"
    if kind not in kinds():
        raise SshError(host, "message", f"{script} has no event {str(event.get('event'))[:40]!r}")
    check_message(kind, event, host)
