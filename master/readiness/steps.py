"""The steps to a cluster: each looks whether it is done, says what it does and changes, and runs the tool that does it.

prepare_cluster.py takes them in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from master.core.paths import ROOT
from master.core.run_cli import UserError
from master.core.terminal import confirm, listed, say
from master.inventory.cluster_file import read_cluster
from master.inventory.node_facts import local_facts
from master.readiness.state import (
    files_of,
    hosts_in,
    lacks_alias,
    logins,
    measured_on,
    missing_parts,
    other_errors,
)
from master.ssh.node_names import Node
from master.ssh.options import OWN_KEY, PASSWORD_VARIABLE, ssh_flags
from master.ssh.route import SshOptions

STEPS = ("keys", "hostfile", "copies", "agreement", "network", "plan")


class StepError(UserError):
    """A step that failed; its tool has said why."""


@dataclass(frozen=True)
class Cluster:
    """What is set up: the hosts, by which flags they are reached, the hostfile, and what trains there."""

    nodes: tuple[Node, ...]
    ssh: SshOptions
    options: argparse.Namespace

    @property
    def words(self) -> list[str]:
        """The hosts as words of a command line."""
        return list(map(str, self.nodes))

    @property
    def goods(self) -> list[str]:
        """The flags that name model and data."""
        model = ["--model", self.options.model] if self.options.model else []
        return [*model, *(["--dataset", *self.options.dataset] if self.options.dataset else [])]

    @property
    def hostfile(self) -> Path:
        """The hostfile's path."""
        path: Path = self.options.hostfile
        return path

    def tell(self, step: str, text: str, changes: str = "") -> None:
        """Say how a step stands, and what it will change."""
        say(f"{STEPS.index(step) + 1}/{len(STEPS)} {step:9}  {text}", *([f"    changes: {changes}"] if changes else []))

    def run(self, tool: str, *words: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a tool on this terminal; `quiet`: what it prints is kept instead. Nothing in a dry run but quiet ones."""
        password = {PASSWORD_VARIABLE: self.ssh.password} if self.ssh.password else {}
        command = [f"master/{tool}.py", *words, *ssh_flags(self.options)]
        if self.options.dry_run and not quiet:
            say(f"    would run: python {shlex.join(command)}")
            return subprocess.CompletedProcess(command, 0)
        if not quiet:
            say(f"$ python {shlex.join(command)}")
        return subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], text=True,
                              stdin=subprocess.DEVNULL if quiet else None, capture_output=quiet,
                              env={**os.environ, **password})


def own_key_too(ssh: SshOptions) -> SshOptions:
    """Return the options with the key that setup-keys may just have made."""
    path = OWN_KEY.expanduser()
    return replace(ssh, more_keys=tuple({*ssh.more_keys, path})) if path.exists() else ssh


def set_up_keys(cluster: Cluster, aliases: Mapping[Node, str]) -> None:
    """Have every host take a key of this user's, and be reached by its alias. Raises StepError, SshError."""
    options = cluster.options
    ssh = replace(cluster.ssh, host_keys="accept-new") if options.yes and not options.host_keys else cluster.ssh
    found = logins(cluster.nodes, ssh, may_ask=not options.dry_run)
    unnamed = [str(node) for node in cluster.nodes if lacks_alias(node, aliases[node], ssh)]
    wanted = [name for name in cluster.words if name in (*found.refused, *unnamed)]
    if wanted:
        why = "no key of yours is accepted yet; a password is asked for once" if found.refused else \
            "a hostfile takes neither user nor port: a Host block gives each a plain name"
        cluster.tell("keys", f"{listed(found.refused or wanted)}: {why}",
                     "a line in ~/.ssh/authorized_keys there; a key, known_hosts and Host blocks in ~/.ssh here")
        cluster.run("setup_keys", "--nodes", *wanted, *(["--yes"] if options.yes else []))
        if options.dry_run:
            return
        found = logins(cluster.nodes, own_key_too(ssh), may_ask=False)
        unnamed = [str(node) for node in cluster.nodes if lacks_alias(node, aliases[node], ssh)]
    for error in found.lost:
        say(str(error))
    left = [*found.refused, *(error.host for error in found.lost)]
    if left:
        rest = [name for name in cluster.words if name not in left]
        raise StepError(f"{listed(left)} can't be reached by key. Fix that and run this again"
                        + (f", or leave them out: invoke up --nodes {','.join(rest)}" if rest else ""))
    if unnamed:
        raise StepError(f"{listed(unnamed)}: a hostfile takes plain names alone: run this again and have the Host "
                        "blocks written, or write them yourself")
    cluster.tell("keys", f"done: {listed(cluster.words)} {'takes' if len(cluster.nodes) == 1 else 'take'} your key")


def write_hostfile(cluster: Cluster) -> None:
    """Have a hostfile of these hosts. Raises StepError."""
    options, path = cluster.options, cluster.hostfile
    found = files_of(path, cluster.nodes)
    words = ["--nodes", *cluster.words, "--output", str(path)]
    if found.is_theirs and found.are_known:
        hosts = hosts_in(path)
        cluster.tell("hostfile", f"done: {path} has {len(hosts)} hosts, {sum(len(host.use) for host in hosts)} slots")
        return
    if found.is_theirs:
        cluster.tell("hostfile", f"{path} stays as it is; its hosts are asked for what other tools need to know",
                     "cluster.json here")
        if cluster.run("generate_hostfile", *words, "--keep").returncode:
            raise StepError(f"not all hosts of {path} answered: fix what failed and run this again")
        return
    cluster.tell("hostfile", f"{path} {'has other hosts' if path.exists() else 'is not there'}: all are asked for "
                 "their GPUs", f"{path} and cluster.json here")
    if found.others and not options.yes and not options.dry_run:
        others = listed(found.others)
        if not sys.stdin.isatty():
            raise StepError(f"{path} also names {others}: --yes writes it anew, --hostfile F writes another")
        if not confirm(f"{path} also names {others}. Write it anew without?"):
            raise StepError(f"{path} is left as it was: --hostfile F writes another")
    slots = ["--cpu-slots", str(options.cpu_slots)] if options.cpu_slots else []
    done = cluster.run("generate_hostfile", *words, *slots)
    if done.returncode and not slots and not path.exists() and (options.yes or (
            sys.stdin.isatty() and confirm("Train on the hosts' CPUs, a slot each?"))):
        done = cluster.run("generate_hostfile", *words, "--cpu-slots", "1")
    if done.returncode:
        raise StepError("no hostfile of all these hosts: fix what failed, or leave it out of --nodes")


def ask_check(cluster: Cluster) -> dict[str, Any]:
    """Return what a quick check reports. Raises StepError."""
    done = cluster.run("check_cluster", "--fast", "--json", "--hostfile", str(cluster.hostfile), *cluster.goods,
                       quiet=True)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise StepError(done.stderr.strip().splitlines()[-1].removeprefix("error: ") if done.stderr.strip()
                        else "the check said nothing") from None
    return found


def copy_what_is_missing(cluster: Cluster) -> None:
    """Have lanspeed, its environment, model and data on every host, and all agree. Raises StepError."""
    own = local_facts({"folder": str(ROOT)})["code"]
    report = ask_check(cluster)
    missing = missing_parts(report, own)
    if missing:
        what = "; ".join(f"{listed(list(dict.fromkeys(hosts)))}: {what}" for what, hosts in list(missing.items())[:3])
        cluster.tell("copies", what, "~/lanspeed, ~/lanspeed-data and ~/.lanspeed on each host")
        house = ["--wheelhouse", str(cluster.options.wheelhouse)] if cluster.options.wheelhouse else []
        words = ["--hostfile", str(cluster.hostfile), *cluster.goods, *house]
        done = cluster.run("sync_nodes", *words)
        if cluster.options.dry_run:
            return
        if done.returncode and sys.stdin.isatty() and not cluster.options.yes and confirm(
                "If files there are in the way: replace them by those from here?"):
            done = cluster.run("sync_nodes", *words, "--overwrite")
        if done.returncode:
            raise StepError("not everything was copied: fix what failed and run this again; it resumes")
        report = ask_check(cluster)
        missing = missing_parts(report, own)
    else:
        more = ", its environment, model and data" if cluster.goods else " and its environment"
        cluster.tell("copies", f"done: every host has lanspeed{more}")
    problems = [*(f"{listed(hosts)}: {what}" for what, hosts in missing.items()), *other_errors(report)]
    for line in problems:
        say(f"    {line}")
    if problems:
        raise StepError("the hosts don't agree yet: fix that and run this again")
    cluster.tell("agreement", f"done: {len(report['hosts'])} hosts agree, none has an error")


def measure_network(cluster: Cluster) -> None:
    """Have the rate of every link measured, and all ranks meet once. Raises StepError."""
    hosts = [host.host for host in hosts_in(cluster.hostfile)]
    when = measured_on(hosts, read_cluster(cluster.hostfile.with_name("cluster.json")))
    if when or len(hosts) == 1:
        cluster.tell("network", f"done: measured {when}" if when else "done: one host needs none")
        return
    cluster.tell("network", "not measured yet: each pair sends for some seconds, then all ranks meet",
                 "cluster.json here")
    done = cluster.run("check_cluster", "--network", "--hostfile", str(cluster.hostfile), *cluster.goods)
    if done.returncode:
        raise StepError("the network isn't ready: fix what is reported and run this again")


def show_plan(cluster: Cluster) -> None:
    """Say what the plan says of the model; a model of unknown shape has none."""
    model = cluster.options.model or "tiny"
    data = ["--dataset", *cluster.options.dataset] if cluster.options.dataset else []
    done = cluster.run("plan_ds_config", "--model", model, "--hostfile", str(cluster.hostfile), *data, quiet=True)
    best = next((line for line in (done.stdout or "").splitlines() if line.startswith(("best: ", "can't tell"))), "")
    why = (done.stderr or "").strip().splitlines()[-1:]
    cluster.tell("plan", best or f"none for {model}: {''.join(why).removeprefix('error: ') or 'see invoke plan'}")
