"""Network addresses: this machine's own on the way to another host, and the card that has an address."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any


def own_address_towards(host: str) -> str | None:
    """Return this machine's address on the route to a host (a name or an address), None if there is no route."""
    try:
        family, kind, *_, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # a UDP socket sends nothing here: it only asks for the route
            return str(probe.getsockname()[0])
    except OSError:
        return None


def card_of(facts: Mapping[str, Any], address: str | None) -> dict[str, Any] | None:
    """Return the network card of a node's facts that has an address, None if none does."""
    for card in facts.get("nics") or []:
        if address in [each.split("/")[0] for each in card["addresses"]]:
            found: dict[str, Any] = card
            return found
    return None
