"""Stops a run: through its launcher, or, if that has exited, on its hosts directly.

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
from master.inventory.node_facts import checkout_of, stdin_loader
from master.ssh.json_channel import SILENCE_LIMIT_S, JsonChannel
from master.ssh.node_names import parse_node
from master.ssh.options import question, ssh_options
from master.ssh.route import SshError
from master.ssh.run_on_all import run_on_all
from master.ssh.session import Session
from master.training.run_folder import find_run, read_launcher_record, running_launcher


def stop(name: str | None, options: argparse.Namespace) -> int:
    """Have a run's launcher (without a name: the newest active run's) stop it; wait; return the exit code."""
    run = find_run(name, running=not name)
    pid = running_launcher(run)
    if pid is None:
        job = read_launcher_record(run).get("job")
        if not job or not (run / "hostfile.txt").exists():
            say(f"{run}: not running")
            return 1
        say(f"{run}: not running here; looking on its hosts")
        return end_on_hosts(run, job, options)
    os.kill(pid, signal.SIGINT)
    say(f"{run}: stopping; the ranks may take {options.grace:.0f} s to save")
    end = time.monotonic() + options.grace + 30
    while running_launcher(run) == pid and time.monotonic() < end:
        time.sleep(0.2)
    if running_launcher(run) == pid:
        say(f"{run}: process {pid} does not exit; run this again to kill its ranks")
        return 1
    say(f"{run}: stopped")
    return 0


def end_on_hosts(run: Path, job: str, options: argparse.Namespace) -> int:
    """End a job on a run's hosts, whose ranks save first; return 0, 1 if a host can't be reached."""
    known = {host["name"]: host for host in read_cluster(run / "cluster.json")["hosts"]}
    nodes = [parse_node(host.host) for host in read_hostfile(run / "hostfile.txt")]

    def work(session: Session) -> int:
        host = str(session.node)
        command = f"exec {shlex.quote(checkout_of(known.get(host, {})).python)} {stdin_loader(WORKER / 'run_node.py')}"
        with contextlib.closing(session.open(command)) as channel:
            channel.send((WORKER / "run_node.py").read_bytes())
            messages = JsonChannel(channel, host)
            messages.send({"end": job, "grace": options.grace})
            return wait_for_end(messages, host)

    found = run_on_all(nodes, ssh_options(options), work, question())
    for node, result in found.items():
        if isinstance(result, SshError):
            say(str(result))
        else:
            say(f"{node}: {f'{result} processes ended' if result else 'none of its processes are running there'}")
    return int(any(isinstance(result, SshError) for result in found.values()))


def wait_for_end(messages: JsonChannel, host: str) -> int:
    """Return how many processes run_node.py has ended; raise SshError if it says nothing for too long."""
    while not messages.ended and time.monotonic() - messages.last_heard < SILENCE_LIMIT_S:
        for event in messages.receive(SILENCE_LIMIT_S):
            if event["event"] == "ended":
                return int(event["processes"])
    raise SshError(host, "stop", messages.stderr_tail()[-300:] or "no answer")
