"""Follow a run: its progress, how fast, what each host said last. It only reads the run folder.

    invoke watch
    python master/watch_training.py runs/20261124-020457-tiny --once
    python master/watch_training.py --json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from master.console import one_line, say
from master.runs import RunError, find_run, launcher_of

EVERY = 2.0  # seconds between two looks


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object, {} where there is none yet."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def look(run: Path) -> dict[str, Any]:
    """Return the state of a run: status, step of steps, the newest figures, each host's last line and its age."""
    record = read_json(run / "run.json")
    newest: dict[str, Any] = {}
    try:
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):
                newest |= json.loads(line)
    except (OSError, ValueError):
        pass
    status = record.get("status", "starting")
    if status in ("running", "starting") and launcher_of(run) is None:
        status = "not running any more"
    hosts = {}
    for path in sorted((run / "logs").glob("*.log")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        age = round(time.time() - path.stat().st_mtime)
        hosts[path.stem] = {"last": lines[-1] if lines else "", "seconds_ago": age}
    figures = {key: newest.get(key) for key in ("step", "loss", "eval_loss", "tokens_per_second", "learning_rate")}
    return {"run": str(run), "status": status, "steps": record.get("steps"), "world_size": record.get("world_size"),
            **figures, "hosts": hosts}


def in_words(state: dict[str, Any]) -> str:
    """Return a state as one line."""
    steps = f"/{state['steps']}" if state["steps"] else ""
    parts = [f"{state['run']}: {state['status']}"]
    for text, value in ((f"step {state['step']}{steps}", state["step"]), ("loss {:.4f}", state["loss"]),
                        ("evaluation loss {:.4f}", state["eval_loss"]),
                        ("{:,.0f} tokens/s", state["tokens_per_second"])):
        if value is not None:
            parts.append(text.format(value))
    return one_line(", ".join(parts))


def main(argv: Sequence[str] | None = None) -> int:
    """Show a run until it has ended; return 0, 1 if it failed or isn't there."""
    parser = argparse.ArgumentParser(
        prog="watch_training.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", metavar="RUN", help="run folder (default: the newest)")
    parser.add_argument("--once", action="store_true", help="look once")
    parser.add_argument("--json", action="store_true", help="print what is known as JSON, and look once")
    options = parser.parse_args(argv)
    try:
        run = find_run(options.run)
    except RunError as error:
        say(f"error: {error}")
        return 1
    shown = ""
    try:
        while True:
            state = look(run)
            if options.json:
                print(json.dumps(state, indent=1))
            elif (line := in_words(state)) != shown:
                print(shown := line, flush=True)
            if options.once or options.json or state["status"] not in ("running", "starting"):
                break
            time.sleep(EVERY)
    except KeyboardInterrupt:
        return 0
    if not options.json:
        for host, last in state["hosts"].items():
            print(one_line(f"  {host}, {last['seconds_ago']} s ago: {last['last']}"))
    return int(state["status"] in ("failed", "not running any more"))


if __name__ == "__main__":
    raise SystemExit(main())
