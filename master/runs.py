"""Run folders, as the master sees them: their names, and what became of a run that couldn't say so itself."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from master.files import write_whole


def new_run_path(model: str) -> Path:
    """Return runs/<time>-<model>, the folder of a run that starts now."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-.") or "model"
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"


def mark_failed(run: Path, code: int) -> None:
    """Complete the run.json of a run whose ranks were killed; one that is complete, or isn't there, is left alone."""
    path = run / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if record.get("status") == "running":
        record.update(status="failed", exit=code, ended=time.time())
        write_whole(path, json.dumps(record, indent=1) + "\n")
