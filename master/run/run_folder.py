"""Run folders, as the master sees them: their names, who runs them now, how to repeat one, and how it ended."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from master.core.atomic_write import write_atomically
from master.core.run_cli import UserError
from master.core.trust import refuse_foreign
from master.inventory.cluster_file import known_by_name, write_cluster
from master.inventory.hostfile import Slots, render_hostfile
from master.run.launcher_process import is_active, make_private, read_launcher_record, read_object
from trainer.flags.run_names import short_name


class RunError(UserError):
    """A run that isn't there, or can't be repeated."""


def new_run_path(model: str) -> Path:
    """Return runs/<time>-<model>, the folder of a run that starts now; with a number where another began just now."""
    path = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{short_name(model)}"
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], others) if not each.exists())


def job_prefix(run: Path) -> str:
    """Return what the names of a run's jobs begin with; it stands in environment variables and file names.

    Another run of the same name, of whatever folder, user or machine, has another one.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", run.resolve().name)[:200]
    run_id = read_launcher_record(run).run_id
    return f"{name}-{run_id}" if run_id else name


def mark_failed(run: Path, code: int) -> None:
    """Complete the run.json of a run whose ranks were killed; one that is complete, or isn't there, is left alone."""
    path = run / "run.json"
    record = read_object(path)
    if record.get("status") == "running":
        record.update(status="failed", exit=code, ended=time.time())
        write_atomically(path, json.dumps(record, indent=1) + "\n")


def mark_script(run: Path, status: str, code: int) -> None:
    """Write run.json for a script of the user's: how it ended last. One that the script wrote itself is left alone."""
    record = {"status": status, "exit": code, "ended": time.time()}
    if run.is_dir() and not set(read_object(run / "run.json")) - set(record):
        write_atomically(run / "run.json", json.dumps(record, indent=1) + "\n")


def memory_advice(run: Path) -> list[str]:
    """Return what run.json says would save a host's memory, [] where it says nothing."""
    memory = read_object(run / "run.json").get("memory")
    found = memory.get("host") if isinstance(memory, dict) else None
    return [str(line) for line in found] if isinstance(found, list) else []


def save_hosts(run: Path, hosts: Sequence[Slots], cluster: Mapping[str, Any]) -> None:
    """Write hostfile.txt and cluster.json as used into a run folder, by which it is watched, stopped and resumed."""
    make_private(run)
    write_atomically(run / "hostfile.txt", render_hostfile(hosts, {}))
    known = known_by_name(cluster)
    trains = [known[host.host] for host in hosts if host.host in known]
    write_cluster(run / "cluster.json", {**cluster, "hosts": trains, "absent": []})


def find_run(name: str | None, running: bool = False) -> Path:
    """Return the run that a path or name means, without one the newest (that runs now). Raises RunError, TrustError."""
    if name:
        for path in (Path(name), Path("runs") / name):
            if path.is_dir():
                refuse_foreign(path)
                return path
        raise RunError(f"{name}: no such run: ls runs")
    found = sorted(path for path in Path("runs").glob("*-*-*")
                   if path.is_dir() and (not running or is_active(path)))
    if not found:
        raise RunError("no run is active here" if running else "no runs in this folder")
    refuse_foreign(found[-1])
    return found[-1]
