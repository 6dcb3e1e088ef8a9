"""Stops a run: through its launcher, or, if that has exited, on its hosts directly.

    python master/stop_training.py runs/20261124-020457-tiny
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import time
from pathlib import Path

from master.core.terminal import say
from master.inventory.cluster_file import known_by_name, read_cluster, with_logins
from master.inventory.hostfile import read_hostfile
from master.inventory.node_facts import checkout_of
from master.inventory.worker_script import open_worker
from master.run.launcher_process import read_launcher_record
from master.run.run_folder import find_run
from master.ssh.json_channel import SILENCE_LIMIT_S, JsonChannel
from master.ssh.node_names import parse_node
from master.ssh.options import host_key_prompt, ssh_options
from master.ssh.route import SshError
from master.ssh.run_on_all import run_on_all
from master.ssh.session import Session
from master.training.supervisor import SAVE_LIMIT_MIN


def stop(name: str | None, options: argparse.Namespace) -> int:
    """Have a run's launcher (without a name: the newest active run's) stop it; wait; return the exit code.

    Where the launcher has exited, or is on another machine, the run's processes are ended on its hosts.
    """
    run = find_run(name, running=not name)
    launcher = read_launcher_record(run)
    if launcher.is_alive_here and launcher.pid:
        return stop_launcher(run, launcher.pid, options.grace)
    hosts = read_hostfile(run / "hostfile.txt") if (run / "hostfile.txt").exists() else []
    if launcher.is_elsewhere and any(parse_node(host.host).is_local for host in hosts):
        say(f"{run}: it was started on {launcher.host}: invoke stop there")
        return 1
    if not launcher.job or not hosts:
        say(f"{run}: not running")
        return 1
    say(f"{run}: started on {launcher.host}; ending it on its hosts" if launcher.is_elsewhere else
        f"{run}: its launcher isn't running; looking on its hosts")
    return end_on_hosts(run, launcher.job, options)


def stop_launcher(run: Path, pid: int, grace: float) -> int:
    """Interrupt a run's launcher and wait until it has ended; return 0, 1 if it doesn't end."""
    try:
        os.kill(pid, signal.SIGINT)
    except PermissionError:
        say(f"{run}: process {pid}, which trains it, is another user's")
        return 1
    say(f"{run}: stopping; the ranks save first, {grace:.0f} s at most to begin and to end; a save that has begun may "
        f"take {SAVE_LIMIT_MIN} min")
    end = time.monotonic() + grace + SAVE_LIMIT_MIN * 60
    while read_launcher_record(run).is_alive_here and time.monotonic() < end:
        time.sleep(0.2)
    if read_launcher_record(run).is_alive_here:
        say(f"{run}: process {pid} does not exit; run this again to kill its ranks")
        return 1
    say(f"{run}: stopped. Resume it: invoke train --resume {shlex.quote(str(run))}")
    return 0


def end_on_hosts(run: Path, job: str, options: argparse.Namespace) -> int:
    """End a job on a run's hosts, whose ranks save first; return 0, 1 if a host can't be reached."""
    cluster = read_cluster(run / "cluster.json")
    known = known_by_name(cluster)
    nodes = [parse_node(host.host) for host in read_hostfile(run / "hostfile.txt")]

    def work(session: Session) -> int:
        host = str(session.node)
        python = shlex.quote(checkout_of(known.get(host, {})).python)
        with contextlib.closing(open_worker(session, "run_node.py", python)) as channel:
            messages = JsonChannel(channel, host, "end_job")
            messages.send({"end": job, "node": nodes.index(session.node), "grace": options.grace})
            return wait_for_end(messages, host)

    found = run_on_all(nodes, with_logins(ssh_options(options), cluster), work, host_key_prompt())
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
    raise SshError(host, "stop", messages.last_words())
