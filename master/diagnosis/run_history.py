"""What happens to a run while it trains, kept in its folder for `invoke report`: events.jsonl and hosts.jsonl.

events.jsonl has what the launcher says (a host lost, a stall, a restart), hosts.jsonl how busy each host was.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from master.core.terminal import one_line, say
from master.diagnosis.host_metrics import measure_once
from master.ssh.session import Session

EVENTS, HOSTS = "events.jsonl", "hosts.jsonl"
FIRST_S, OFTEN_S, SELDOM_S = 8.0, 15.0, 60.0  # seconds until the first look, and between looks, then
OFTEN_UNTIL_S = 900.0
PATIENCE_S = 10.0  # in which a host answers
MOST = 64  # hosts that are asked: as many as a report shows
GPU_KEYS = ("use_percent", "memory_used_mib", "memory_total_mib", "temperature_c", "power_w")


def noting(run: Path) -> Callable[[str], None]:
    """Return a function that says something and keeps it among a run's events."""
    def note(text: str) -> None:
        say(text)
        append(run / EVENTS, {"text": one_line(text)[:500]})

    return note


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line with its time to a file of a run folder that is there; a full disk costs no training."""
    with contextlib.suppress(OSError):
        if path.parent.is_dir():
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 1), **row}) + "\n")


@contextlib.contextmanager
def measured_hosts(run: Path, pythons: Mapping[str, str], sessions: Callable[[], Mapping[str, Session | None]]
                   ) -> Iterator[None]:
    """Keep in a run's folder how busy its hosts are, while the block lasts; a host that gives no answer is left out.

    `pythons`: of each host; `sessions`: the connections that there are.
    """
    over, asked = threading.Event(), dict[str, threading.Thread]()

    def look(host: str, session: Session, found: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):  # no answer, or a connection that is closed meanwhile
            if told := figures(measure_once(session, pythons[host])):
                found[host] = told

    def watch() -> None:
        started, wait = time.monotonic(), FIRST_S
        while not over.wait(wait):
            found: dict[str, Any] = {}
            for host, session in list(sessions().items())[:MOST]:
                if session and not (host in asked and asked[host].is_alive()):  # else it hasn't answered the last time
                    asked[host] = threading.Thread(target=look, args=(host, session, found), daemon=True)
                    asked[host].start()
            end = time.monotonic() + PATIENCE_S
            for thread in list(asked.values()):
                thread.join(max(0.0, end - time.monotonic()))
            if found:
                append(run / HOSTS, {"hosts": dict(found)})
            wait = OFTEN_S if time.monotonic() - started < OFTEN_UNTIL_S else SELDOM_S

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of worker/measure_node.py's answer; {} for none."""
    if "gpus" not in measured:
        return {}
    nics = measured["nics"]
    ram, available = measured["ram_mib"], measured["ram_available_mib"]
    return {"cpu_percent": measured["cpu_percent"], "ram_mib": ram,
            "ram_used_mib": ram - available if None not in (ram, available) else None,
            "in": nics[0]["in"] if nics else 0, "out": nics[0]["out"] if nics else 0,
            "gpus": [{key: gpu[key] for key in GPU_KEYS} for gpu in measured["gpus"]]}
