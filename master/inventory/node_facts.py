"""Each node's facts: worker/describe_node.py tells them, run by the Python that will train there."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from master.core.json_schema import loads
from master.core.paths import ROOT, WORKER
from master.inventory.gpu_query import query_gpus
from master.inventory.worker_script import load_worker, stdin_loader
from master.ssh.route import SshError
from master.ssh.session import Session, last_words
from master.ssh.worker_message import check_message

MARK = "@@NODE_FACTS "
NOT_FOUND = (126, 127)  # what a shell says of a program that isn't there, or isn't one
BUSY_MIB = 1024  # MiB held on a GPU by other programs, from which it is reported: a desktop takes less


@dataclass(frozen=True)
class RemoteCheckout:
    """Where lanspeed is on a node: the folder of the checkout, the Python that trains, paths (here, there)."""

    folder: str
    python: str
    paths: tuple[tuple[str, str], ...] = ()

    def translate_path(self, word: str) -> str:
        """Return a word of a command as the node has it: this machine's paths become the node's."""
        head, equals, tail = word.partition("=") if word.startswith("--") else ("", "", word)
        for here, there in sorted([*self.paths, (str(ROOT), self.folder)], key=lambda pair: -len(pair[0])):
            if tail == here or tail.startswith((here + "/", here + ":")):  # what follows a colon is a weight
                return head + equals + there + tail[len(here) :]
        return word

    def here_of(self, word: str) -> str:
        """Return a path of the node's as this machine has it; one that it has none for as it is."""
        for here, there in sorted([*self.paths, (str(ROOT), self.folder)], key=lambda pair: -len(pair[1])):
            if word == there or word.startswith(there + "/"):
                return here + word[len(there) :]
        return word


def checkout_of(known: Mapping[str, Any]) -> RemoteCheckout:
    """Return a host's place by what cluster.json says of it; this machine's path where it says nothing.

    On this machine it's always this checkout and this Python, whatever a file says.
    """
    if not known or known.get("name") == "localhost":
        return RemoteCheckout(str(ROOT), sys.executable)
    return RemoteCheckout(known.get("dir") or str(ROOT), known.get("python") or sys.executable,
                          tuple(known.get("paths", {}).items()))


def query_facts(session: Session, place: RemoteCheckout, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node's facts; raise SshError with the fix where they can't be had.

    Paths in `wanted`, and those that are missing there, are this machine's.
    """
    paths = {place.translate_path(path): path for path in wanted.get("paths", [])}
    words = json.dumps({"folder": place.folder, **wanted, "paths": list(paths)})
    command = f"exec {shlex.quote(place.python)} {stdin_loader(WORKER / 'describe_node.py')} {shlex.quote(words)}"
    done = session.run(command, (WORKER / "describe_node.py").read_bytes())
    host = str(session.node)
    for line in done.out.splitlines():
        if line.startswith(MARK):
            try:
                facts: dict[str, Any] = loads(line[len(MARK) :])
            except ValueError as error:
                raise SshError(host, "message", f"facts make no sense: {error}") from None
            check_message("facts", facts, host)
            if wanted.get("more") and "nics" not in facts:
                raise SshError(host, "message", "facts make no sense: half of them are missing")
            if "content" in facts:
                facts["content"] = {paths.get(path, path): value for path, value in facts["content"].items()}
            return {**facts, "missing": [paths.get(path, path) for path in facts["missing"]]}
    if done.code in NOT_FOUND:
        raise SshError(host, "Python", f"no {place.python} there",
                       "invoke sync brings lanspeed and its environment there")
    raise SshError(host, "Python", f"{place.python} does not answer: {last_words(done.out, done.err)[:200]}")


def start_folder(facts: Mapping[str, Any], checkout: RemoteCheckout) -> str:
    """Return the folder in which a node's ranks start: this process's own if the account there may work in it.

    `facts` are the answer to a query with this folder among its "marks".
    """
    here = str(Path.cwd())
    return here if here in facts["there"] else checkout.folder


def query_gpu_use(session: Session) -> dict[str, Any]:
    """Return what a node's GPUs are like now: slots to use, slots that other programs hold (MiB), problems."""
    report = query_gpus(session).report
    busy = {str(gpu.index): gpu.busy_mib for gpu in report.usable if (gpu.busy_mib or 0) > BUSY_MIB}
    return {"vendor": report.vendor, "use": list(report.slots_use), "busy": busy,
            "problems": [problem.code for problem in report.problems if problem.is_fault]}


def local_facts(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return this machine's facts, by the same file."""
    found: dict[str, Any] = load_worker("describe_node").describe(dict(wanted))
    return found


