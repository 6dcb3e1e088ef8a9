#!/usr/bin/env python3
"""Try the network between nodes: which ports of the others can be reached, how fast, how far.

The master streams this file to every node and tells each, a JSON object a line, what to do:
{"listen": [29500, 0], "token": T}      open these ports (0: any) -> {"event": "ready", "ports": [29500, 41234]}
{"connect": [[name, address, port]]}    reach these               -> {"event": "reached", "results": [...]}
{"send": [address, port], "seconds": 3} send as fast as it goes   -> {"event": "rate", "bytes_per_s": ...}
Whoever connects has to know the token; what comes is counted or sent back, and forgotten. It ends with its input, or
after a minute without any. Standard library only, Python 3.8 or newer.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from typing import Any

TOKEN_BYTES = 32
CONNECT_LIMIT = 4.0  # seconds
CONNECTIONS = 256  # at once; strangers among them are gone after CONNECT_LIMIT
PATIENCE = 60.0  # seconds without an order
BLOCK = 1 << 18
WARMING = 0.5  # seconds that a sender may take to reach its speed, and a shaper's bucket to empty
PINGS = 11
RESULT = struct.Struct("!Qd")  # bytes counted, seconds


def say(**fields: object) -> None:
    """Print one event."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def exactly(link: socket.socket, count: int) -> bytes:
    """Return so many bytes; raise OSError if the other side ends before."""
    data = b""
    while len(data) < count:
        block = link.recv(count - len(data))
        if not block:
            raise OSError("closed")
        data += block
    return data


def answer(link: socket.socket, token: bytes) -> None:
    """Serve one connection: b"p" and bytes, which are sent back; or b"s" and bytes, which are counted."""
    try:
        with link:
            link.settimeout(CONNECT_LIMIT)
            if exactly(link, TOKEN_BYTES) != token:
                return
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if exactly(link, 1) == b"p":
                for _ in range(PINGS):
                    link.sendall(exactly(link, 1))
                return
            link.settimeout(PATIENCE)
            link.sendall(RESULT.pack(*counted(link)))
    except OSError:
        return


def counted(link: socket.socket) -> tuple[int, float]:
    """Return how many bytes come once the sender is warm, and in how many seconds."""
    count, began, last = 0, 0.0, 0.0
    first = time.monotonic()
    while True:
        block = link.recv(BLOCK)
        now = time.monotonic()
        if not block:
            return count, max(last - began, 0.0)
        if began:
            count, last = count + len(block), now
        elif now - first > WARMING:
            began = last = now


def open_port(address: str | None, port: int) -> socket.socket:
    """Return a socket on the address that the other nodes know; on all where it isn't this node's. Raises OSError."""
    if address:
        try:
            kind = socket.SOCK_STREAM  # a name might lead to this node's loopback address here
            family, _, _, _, target = socket.getaddrinfo(address, port, type=kind, flags=socket.AI_NUMERICHOST)[0]
            return socket.create_server(target[:2], family=family, backlog=128)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    try:  # IPv6 and IPv4
        return socket.create_server(("::", port), family=socket.AF_INET6, backlog=128, dualstack_ipv6=True)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise
        return socket.create_server(("", port), backlog=128)  # a kernel without IPv6


def listen(address: str | None, ports: list[int], token: bytes) -> tuple[list[int | None], list[str]]:
    """Open ports and serve them in the background; return which were opened (None: not), and why one wasn't."""
    opened: list[Any] = []
    faults = []
    for port in ports:
        try:
            server = open_port(address, port)
        except OSError as error:
            opened.append(None)
            faults.append(f"port {port}: {error.strerror}")
            continue
        opened.append(server.getsockname()[1])

        def serve(server: socket.socket = server) -> None:
            places = threading.BoundedSemaphore(CONNECTIONS)

            def work(link: socket.socket) -> None:
                try:
                    answer(link, token)
                finally:
                    places.release()

            while True:
                try:
                    link, _ = server.accept()
                    if not places.acquire(blocking=False):
                        link.close()
                        continue
                    threading.Thread(target=work, args=(link,), daemon=True).start()
                except (OSError, RuntimeError):  # too many files, or threads, at once
                    time.sleep(0.1)

        threading.Thread(target=serve, daemon=True).start()
    return opened, faults


def reach(name: str, address: str, port: int, token: bytes) -> dict[str, Any]:
    """Return the round trip in seconds (the median) to a port of another node, or why it can't be reached."""
    found: dict[str, Any] = {"name": name, "port": port, "latency_s": None, "fault": None}
    try:
        with socket.create_connection((address, port), timeout=CONNECT_LIMIT) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.sendall(token + b"p")
            times = []
            for _ in range(PINGS):
                before = time.monotonic()
                link.sendall(b".")
                exactly(link, 1)
                times.append(time.monotonic() - before)
            found["latency_s"] = sorted(times)[PINGS // 2]
    except socket.timeout:
        found["fault"] = "no answer"
    except OSError as error:
        found["fault"] = error.strerror or str(error)
    return found


def reach_all(targets: list[Any], token: bytes) -> list[dict[str, Any]]:
    """Reach all targets at once."""
    results: list[Any] = [None] * len(targets)

    def one(number: int) -> None:
        name, address, port = targets[number]
        results[number] = reach(name, address, port, token)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(targets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def send(address: str, port: int, seconds: float, token: bytes) -> dict[str, Any]:
    """Send to another node for some seconds; return the bytes a second that it counted, or the fault."""
    block = memoryview(os.urandom(BLOCK))
    try:
        with socket.create_connection((address, port), timeout=CONNECT_LIMIT) as link:
            link.sendall(token + b"s")
            link.settimeout(seconds + CONNECT_LIMIT)
            end = time.monotonic() + WARMING + seconds
            while time.monotonic() < end:
                link.send(block)
            link.shutdown(socket.SHUT_WR)
            count, took = RESULT.unpack(exactly(link, RESULT.size))
            return {"bytes_per_s": count / took if took > 0 else None, "fault": None}
    except OSError as error:
        return {"bytes_per_s": None, "fault": error.strerror or str(error)}


def main() -> int:
    """Follow orders until they end."""
    token, rest = b"", b""
    while select.select([0], [], [], PATIENCE)[0]:
        data = os.read(0, 65536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in filter(None, lines):
            order = json.loads(line.decode("utf-8"))
            if "listen" in order:
                token = order["token"].encode("ascii")
                ports, faults = listen(order.get("address"), order["listen"], token)
                say(event="ready", ports=ports, faults=faults)
            elif "connect" in order:
                say(event="reached", results=reach_all(order["connect"], token))
            elif "send" in order:
                address, port = order["send"]
                say(event="rate", **send(address, port, order["seconds"], token))
    return 0


if __name__ == "__main__":
    sys.exit(main())
