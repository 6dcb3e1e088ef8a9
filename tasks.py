"""The menu: one short task a tool. `invoke --list` shows them, `invoke TASK --help` one's flags."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

from invoke import Context, Exit, task

ROOT = Path(__file__).resolve().parent


def run_tool(module: str, *argv: str) -> None:
    """Run a tool in this process, after showing the command that it stands for."""
    shown = ["python", module.replace(".", "/") + ".py", *argv]
    for number, word in enumerate(shown):  # a password is for nobody's eyes
        if shown[number - 1] == "--ssh-password" and not word.startswith("-"):
            shown[number] = "***"
        elif word.startswith("--ssh-password="):
            shown[number] = "--ssh-password=***"
    print("$", shlex.join(shown), file=sys.stderr)
    code = importlib.import_module(module).main(list(argv))
    if code:
        raise Exit(code=code)


def after_dashes() -> list[str]:
    """Return what the user wrote after --, word by word (invoke joins it to one string and loses the quoting)."""
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []


def flags(**values: object) -> list[str]:
    """Return --name value for every value that was given, --name alone for a True."""
    words: list[str] = []
    for name, value in values.items():
        if value not in (None, False, ""):
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


@task(auto_shortflags=False, help={
    "model": "a Hugging Face name, a folder, or 'tiny', which needs no download",
    "dataset": "a file, a folder or a Hugging Face name (default: Python's own documentation)",
    "config": "DeepSpeed config (presets: trainer/configs/)",
    "hostfile": "train on these hosts (default: on this machine)",
    "nodes": "find the GPUs of these hosts first, then train on them: names, user@host:port, ranges gpu[1-4], @file",
    "slots": "ranks on this machine (default: all GPUs; 1 without any); CPU slots on each of --nodes",
    "script": "your own training script instead of trainer/train.py (with --hostfile)",
    "env": "a variable for all ranks, K=V, or K as it is here",
    "no-local-rank": "start the script without DeepSpeed's --local_rank=N",
    "ssh-user": "login name on the hosts (default: as your ssh configuration says)",
    "host-keys": "unknown host keys: ask, accept-new, yes (refuse)",
    "include": "these hosts and slots of the hostfile, as in gpu1@gpu2:0,2",
    "exclude": "all hosts and slots but these",
    "resume": "resume this run from its newest valid checkpoint",
    "restarts": "after a failure on the hosts begin again, so many times",
    "stall-timeout": "report a hang after so many seconds without progress",
    "on-lost-master": "what the hosts do when this machine is gone: end, continue",
    "detach": "continue without this terminal",
    "grace": "seconds that the ranks get to save after Ctrl-C (60)",
    "dry-run": "print what would be run",
}, iterable=["env"])
def train(c, model="", dataset="", config="", hostfile="", nodes="", slots="", script="", env=None, ssh_user="",  # type: ignore[no-untyped-def]
          host_keys="", include="", exclude="", resume="", restarts="", stall_timeout="", on_lost_master="",
          no_local_rank=False, detach=False, grace="", dry_run=False):
    """Train on this machine, or on a hostfile's hosts; flags of trainer/train.py follow --."""
    if not (model or script or resume):
        raise Exit("which model? invoke train --model tiny (or a Hugging Face name, or a folder)", code=2)
    words = flags(model=model, dataset=dataset, config=config, hostfile=hostfile, slots=slots, script=script,
                  ssh_user=ssh_user, host_keys=host_keys, include=include, exclude=exclude, resume=resume,
                  restarts=restarts, stall_timeout=stall_timeout, on_lost_master=on_lost_master,
                  no_local_rank=no_local_rank, detach=detach, grace=grace, dry_run=dry_run)
    words += ["--nodes", nodes] if nodes else []
    words += [word for each in env or () for word in ("--env", each)]
    run_tool("master.launch_training", *words, "--", *after_dashes())


@task(auto_shortflags=False, help={
    "run": "a run folder (default: the newest)", "once": "print the state once", "json": "look once, and print JSON"})
def watch(c, run="", once=False, json=False):  # type: ignore[no-untyped-def]
    """Follow a run: progress, speed, and each host's GPUs, memory, temperature, network, last line."""
    run_tool("master.watch_training", *([run] if run else []), *flags(once=once, json=json), *after_dashes())


@task(auto_shortflags=False, help={"run": "a run folder (default: the newest that runs)"})
def stop(c, run=""):  # type: ignore[no-untyped-def]
    """Stop a run in order: its ranks save first."""
    run_tool("master.launch_training", "--stop", *([run] if run else []), *after_dashes())


@task(auto_shortflags=False, help={
    "nodes": "hosts, separated by commas: names, user@host:port, ranges gpu[1-4], @file",
    "remove": "remove the key from the nodes and the Host blocks from ~/.ssh/config",
    "dry-run": "say what would be done",
})
def setup_keys(c, nodes="", remove=False, dry_run=False):  # type: ignore[no-untyped-def]
    """Make keys do where a password does now, on every node; flags of master/setup_keys.py follow --."""
    words = flags(remove=remove, dry_run=dry_run)
    run_tool("master.setup_keys", *(["--nodes", nodes] if nodes else []), *words, *after_dashes())


@task(auto_shortflags=False, help={
    "nodes": "hosts, separated by commas: names, user@host:port, ranges gpu[1-4], @file, localhost",
    "output": "the hostfile (hostfile.txt); cluster.json stands beside it",
    "vendor": "NVIDIA, AMD or INTEL (default: the one with most usable GPUs)",
    "cpu-slots": "so many CPU slots on every host, whatever GPUs it has",
    "allow-missing": "exit 0 even if a host failed",
})
def hostfile(c, nodes="", output="", vendor="", cpu_slots="", allow_missing=False):  # type: ignore[no-untyped-def]
    """Ask all hosts for their GPUs and write hostfile.txt; flags of master/generate_hostfile.py follow --."""
    words = flags(output=output, vendor=vendor, cpu_slots=cpu_slots, allow_missing=allow_missing)
    run_tool("master.generate_hostfile", *(["--nodes", nodes] if nodes else []), *words, *after_dashes())


@task(auto_shortflags=False, help={
    "nodes": "hosts, separated by commas: names, user@host:port, ranges gpu[1-4], @file",
    "hostfile": "the hosts of a hostfile (default: hostfile.txt)",
    "model": "a folder or Hugging Face name that has to be on every host, and the same",
    "dataset": "a file, folder or Hugging Face name that has to be on every host, and the same",
    "fast": "leave the network between the hosts out",
    "network": "measure each pair's rate and round trip, a few seconds each",
    "json": "what was found as JSON",
})
def check(c, nodes="", hostfile="", model="", dataset="", fast=False, network=False, json=False):  # type: ignore[no-untyped-def]
    """Return whether every node is ready, and the same; flags of master/check_cluster.py follow --."""
    words = flags(hostfile=hostfile, model=model, dataset=dataset, fast=fast, network=network, json=json)
    run_tool("master.check_cluster", *(["--nodes", nodes] if nodes else []), *words, *after_dashes())


@task(auto_shortflags=False, help={
    "nodes": "hosts, separated by commas: names, user@host:port, ranges gpu[1-4], @file",
    "hostfile": "the hosts of a hostfile (default: hostfile.txt)",
    "model": "a folder, or a Hugging Face name",
    "dataset": "a file, a folder, or a Hugging Face name",
    "folder": "where lanspeed goes (default: this path there too, or ~/lanspeed)",
    "no-env": "leave the Python environments alone",
    "index-url": "package index instead of PyPI and PyTorch's",
    "wheelhouse": "for nodes without internet: wheels go from this folder here, which is filled if it lacks some",
    "overwrite": "replace files that are there with other content",
    "dry-run": "print what would be sent",
    "remove": "remove everything that lanspeed put there",
    "json": "what was done as JSON",
})
def sync(c, nodes="", hostfile="", model="", dataset="", folder="", no_env=False, index_url="", wheelhouse="",  # type: ignore[no-untyped-def]
         overwrite=False, dry_run=False, remove=False, json=False):
    """Bring code, environment, model and data to every node; flags of master/sync_nodes.py follow --."""
    words = flags(hostfile=hostfile, model=model, dataset=dataset, folder=folder, no_env=no_env, index_url=index_url,
                  wheelhouse=wheelhouse, overwrite=overwrite, dry_run=dry_run, remove=remove, json=json)
    run_tool("master.sync_nodes", *(["--nodes", nodes] if nodes else []), *words, *after_dashes())


@task(auto_shortflags=False, help={
    "config": "DeepSpeed config (trainer/ds_config.json)",
    "hostfile": "the hosts that will train: their slots, and cluster.json beside it",
    "plain-deepspeed": 'no Trainer will read it: "auto" is an error',
    "strict": "warnings count as errors",
    "fix": "mend what has one safe mend: show the change, ask, write",
})
def validate(c, config="", hostfile="", plain_deepspeed=False, strict=False, fix=False):  # type: ignore[no-untyped-def]
    """Tell what is wrong with a DeepSpeed config, and mend it; flags of master/validate_ds_config.py follow --."""
    words = flags(hostfile=hostfile, plain_deepspeed=plain_deepspeed, strict=strict, fix=fix)
    run_tool("master.validate_ds_config", config or str(ROOT / "trainer" / "ds_config.json"), *words, *after_dashes())


@task(auto_shortflags=False, help={"json": "the report as the one line that other tools read"})
def detect(c: Context, json=False):  # type: ignore[no-untyped-def]
    """Show this machine's GPUs, what is wrong with them and how to fix it."""
    script = [str(ROOT / "worker" / "detect_gpus.sh"), "--json" if json else "--table"]
    print("$", shlex.join(["bash", *script]), file=sys.stderr, flush=True)
    raise Exit(code=subprocess.run(["bash", *script]).returncode)


@task(auto_shortflags=False)
def demo(c: Context) -> None:
    """Train a tiny model on Python's documentation, for about a minute, and show what it learned."""
    slots = ["--slots", str(min(2, len(os.sched_getaffinity(0))))] if not os.path.exists("/dev/nvidiactl") else []
    settings = ["--max_steps", "550", "--sequence_length", "128", "--logging_steps", "25"]
    run_tool("master.launch_training", "--model", "tiny", *slots, "--", *settings, *after_dashes())


@task(auto_shortflags=False, help={"all": "all of them: the slow ones and those that need root or other programs too"})
def test(c: Context, all=False):  # type: ignore[no-untyped-def]
    """Run the tests, on all cores; flags of pytest follow --."""
    cores = ["-n", str(min(len(os.sched_getaffinity(0)), 8)), "--dist", "worksteal"]
    words = [sys.executable, "-m", "pytest", *cores, *(["--all"] if all else []), *after_dashes()]
    with c.cd(ROOT):
        done = c.run(shlex.join(words), pty=sys.stdout.isatty(), warn=True)
    if not done or done.exited:
        raise Exit(code=done.exited if done else 1)


@task(auto_shortflags=False)
def bench(c: Context) -> None:
    """Run the benchmarks: each prints ratios against a named peer."""
    with c.cd(ROOT):
        for path in sorted((ROOT / "benchmarks").glob("*.py")):
            print(f"\n{path.name}", flush=True)
            c.run(shlex.join([sys.executable, str(path)]))


@task(auto_shortflags=False)
def lint(c: Context) -> None:
    """Check style and types."""
    with c.cd(ROOT):
        c.run(f"{shlex.quote(sys.executable)} -m ruff check .")
        c.run(f"{shlex.quote(sys.executable)} -m mypy")
        tools = Path(sys.executable).parent
        c.run(f"{shlex.quote(str(tools / 'shellcheck'))} worker/*.sh master/*.sh .ci/run")
        # Left out: XML (entities are refused), paramiko's exec (callers quote), the hub (its revision is the user's).
        c.run(f"{shlex.quote(str(tools / 'bandit'))} --quiet -r master worker trainer tasks.py --severity-level medium "
              "--skip B314,B601,B615")
        c.run(f"{shlex.quote(str(tools / 'vermin'))} --quiet --no-tips -t=3.8- worker/*.py")
