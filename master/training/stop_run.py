"""The orderly end of a run: by the process that runs it, or, where that has gone, on its hosts themselves.

    python master/launch_training.py --stop runs/20261124-020457-tiny
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import time
from pathlib import Path

from master.core.paths import WORKER
from master.core.terminal import say
from master.inventory.cluster_file import read_cluster
from master.inventory.hostfile import read_hostfile
from master.inventory.node_facts import place_of, streamed
from master.ssh.json_channel import SILENCE, JsonChannel
from master.ssh.node_names import parse_node
from master.ssh.options import access_of, question
from master.ssh.route import SshError
from master.ssh.run_on_all import on_all
from master.ssh.session import Session
from master.training.run_folder import find_run, launcher_of, signed


def stop(name: str | None, options: argparse.Namespace) -> int:
    """Ask whoever runs a run (without a name: the newest that runs) to stop in order; wait; return the exit code."""
    run = find_run(name, running=not name)
    pid = launcher_of(run)
    if pid is None:
        job = signed(run).get("job")
        if not job or not (run / "hostfile.txt").exists():
            say(f"{run}: nobody runs it")
            return 1
        say(f"{run}: nobody here runs it; looking on its hosts")
        return end_on_hosts(run, job, options)
    os.kill(pid, signal.SIGINT)
    say(f"{run}: stopping; the ranks may take {options.grace:.0f} s to save")
    end = time.monotonic() + options.grace + 30
    while launcher_of(run) == pid and time.monotonic() < end:
        time.sleep(0.2)
    if launcher_of(run) == pid:
        say(f"{run}: process {pid} does not end; once more kills its ranks")
        return 1
    say(f"{run}: stopped")
    return 0


def end_on_hosts(run: Path, job: str, options: argparse.Namespace) -> int:
    """End what goes on of a job on a run's hosts, whose ranks save first; return 0, 1 if a host can't be asked."""
    known = {host["name"]: host for host in read_cluster(run / "cluster.json")["hosts"]}
    nodes = [parse_node(host.host) for host in read_hostfile(run / "hostfile.txt")]

    def work(session: Session) -> int:
        host = str(session.node)
        command = f"exec {shlex.quote(place_of(known.get(host, {})).python)} {streamed(WORKER / 'run_node.py')}"
        with contextlib.closing(session.open(command)) as channel:
            channel.send((WORKER / "run_node.py").read_bytes())
            talk = JsonChannel(channel, host)
            talk.send({"end": job, "grace": options.grace})
            return ended(talk, host)

    found = on_all(nodes, access_of(options), work, question())
    for node, result in found.items():
        if isinstance(result, SshError):
            say(str(result))
        else:
            say(f"{node}: {f'{result} processes of it have ended' if result else 'nothing of it runs there'}")
    return int(any(isinstance(result, SshError) for result in found.values()))


def ended(talk: JsonChannel, host: str) -> int:
    """Return how many processes run_node.py has ended; raise SshError if it says nothing for too long."""
    while not talk.ended and time.monotonic() - talk.heard < SILENCE:
        for event in talk.receive(SILENCE):
            if event["event"] == "ended":
                return int(event["processes"])
    raise SshError(host, "stop", talk.complaints()[-300:] or "it gives no answer")
