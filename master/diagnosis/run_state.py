"""The state of a run as its folder has it: status, step and time left, the newest figures, each host's last line."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from master.run.command_record import RECORD as COMMAND
from master.run.launcher_process import RECORD, is_active, read_launcher_record, read_object
from master.run.metrics_file import MetricsFile

ACTIVE = ("running", "starting")
KNOWN = (*ACTIVE, "finished", "stopped", "failed")
MOST_LEFT_S = 1e8  # three years
LAST_BYTES = 64 << 10  # of a log, in which its last line is looked for


def last_line(path: Path) -> str:
    """Return the last line of a log that may be long."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LAST_BYTES))
        return (file.read().decode("utf-8", "replace").splitlines() or [""])[-1]


def figure(value: Any) -> float | None:
    """Return a number of a run folder, None for what is none."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18 else None


def written_at(path: Path) -> float:
    """Return when a file was written, in seconds since 1970; 0 for none."""
    return path.stat().st_mtime if path.exists() else 0.0


def look(run: Path, metrics: MetricsFile | None = None) -> dict[str, Any]:
    """Return the state of a run: status, step of steps, the newest figures, each host's last line and its age.

    `metrics`: of earlier looks, which is then read on.
    """
    record = read_object(run / "run.json")
    metrics = metrics or MetricsFile(run / "metrics.jsonl")
    newest = metrics.newest()
    launcher = read_launcher_record(run)
    status = record.get("status") if record.get("status") in KNOWN else "running" if newest else "starting"
    ended = figure(record.get("ended")) or 0
    if status not in ACTIVE and launcher.is_alive_here and written_at(run / RECORD) > ended:
        status = "starting"  # again: what stands there is of the training that it resumes
    if status in ACTIVE and not is_active(run):
        status = "not running any more"
    hosts = {}
    for path in sorted((run / "logs").glob("*.log")):
        hosts[path.stem] = {"last": last_line(path), "seconds_ago": round(time.time() - path.stat().st_mtime)}
    figures = {key: figure(newest.get(key)) for key in (
        "step", "loss", "eval_loss", "tokens_per_second", "learning_rate", "sent_per_step")}
    steps, pace = figure(record.get("steps")), metrics.seconds_per_step()
    left = max(steps - figures["step"], 0) * pace if steps and pace and figures["step"] is not None else None
    left = left if left is not None and left < MOST_LEFT_S else None  # of figures that make no sense
    return {"run": str(run), "status": status, "launcher": launcher.host if launcher.is_elsewhere else None,
            "steps": steps, "seconds_left": left, "world_size": figure(record.get("world_size")),
            **figures, "hosts": hosts}


def state_line(state: dict[str, Any]) -> str:
    """Return a state as one line."""
    steps = f"/{state['steps']}" if state["steps"] else ""
    where = f" on {state['launcher']}" if state.get("launcher") and state["status"] in ACTIVE else ""
    parts = [f"{state['run']}: {state['status']}{where}"]
    for text, name, unit in ((f"step {state['step']}{steps}", "step", 1), ("loss {:.4f}", "loss", 1),
                             ("evaluation loss {:.4f}", "eval_loss", 1), ("{:,.0f} tokens/s", "tokens_per_second", 1),
                             ("{:,.3g} MB sent a step", "sent_per_step", 1e6)):
        if state.get(name) is not None:
            parts.append(text.format(state[name] / unit))
    if state.get("seconds_left") and state["status"] in ACTIVE:
        parts.append(f"{time_left(state['seconds_left'])} left")
    return ", ".join(parts)


def time_left(seconds: float) -> str:
    """Return a time as a person says it: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def next_commands(state: dict[str, Any]) -> str:
    """Return what can be typed about a run in this state, in a line; '' where there is nothing to do."""
    run = shlex.quote(state["run"])
    if state["status"] in ACTIVE:
        return f"it trains on when this ends; to save and end it: invoke stop {run}"
    repeats = (Path(state["run"]) / COMMAND).exists()  # a script of the user's is started by its own flags
    return f"to continue: invoke train --resume {run}" if repeats and state["status"] != "finished" else ""
