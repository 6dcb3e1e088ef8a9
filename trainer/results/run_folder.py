"""The run folder: runs/<time>-<model>/ with run.json, metrics.jsonl, loss.png, logs, checkpoints, model, samples.

metrics.jsonl grows while the training runs: `tail -f runs/*/metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainer.checkpoint.verification import write_atomically
from trainer.flags.run_names import short_name
from trainer.options import Options

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "tokenizers")


def new_run_path(model: str, now: str) -> Path:
    """Return the folder of a run that starts at a time, like 20261124-020457."""
    return Path("runs") / f"{now}-{short_name(model)}"


def find_run(options: Options, now: str = "") -> Path:
    """Return the run folder that the options mean: named, that of the checkpoint to resume, the newest, or a new one.

    `--resume_from_checkpoint auto` without --output_dir takes the newest run of this model.
    """
    resume = options.resume_from_checkpoint
    if options.output_dir:
        return Path(options.output_dir)
    if resume and resume != "auto":
        path = Path(resume)
        return path.parent.parent if path.name.startswith("checkpoint-") else path
    if resume == "auto":
        runs = sorted(Path("runs").glob(f"*-{short_name(options.model_name_or_path)}/checkpoints"))
        if runs:
            return runs[-1].parent
    return new_run_path(options.model_name_or_path, now or time.strftime("%Y%m%d-%H%M%S"))


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result may depend on."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return this checkout's commit, '-dirty' if changed, or None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        asked = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git here
        return None
    return asked.stdout.strip() or None


def as_json(value: Any) -> Any:
    """Return a value with null for every number that isn't finite, which JSON doesn't have."""
    if isinstance(value, dict):
        return {name: as_json(one) for name, one in value.items()}
    if isinstance(value, list):
        return [as_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_private(run: Path) -> None:
    """Make a run folder if it isn't there: samples of private data are read by this user alone."""
    os.makedirs(run, mode=0o700, exist_ok=True)


class RunFolder:
    """The files of one run. Every rank may hold one; only rank 0 writes run.json and metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.adapter = path / "adapter"
        self.metrics = path / "metrics.jsonl"
        self.sample = path / "sample.txt"
        self.samples = path / "samples"
        self.curve = path / "loss.png"
        self._record: dict[str, Any] = {}
        self._cut_off = False

    def start(self, facts: dict[str, Any], resumed_at: int | None) -> None:
        """Write run.json as 'running'; on resume, drop the metrics of steps that will be made again."""
        make_private(self.path)
        self._record = {"command": shlex.join(sys.argv), "plain_command": os.environ.get("LANSPEED_PLAIN"),
                        "started": time.time(), "status": "running", "resumed_at": resumed_at, **facts,
                        "versions": package_versions(), "git_commit": git_commit()}
        self._write_record()
        kept = [row for row in self.read_metrics() if row["step"] <= (resumed_at or 0)] if resumed_at else []
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    @property
    def record(self) -> dict[str, Any]:
        """What run.json says."""
        return dict(self._record)

    def note(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self._record.update(facts)
        self._write_record()

    def finish(self, status: str, exit_code: int, **facts: Any) -> None:
        """Complete run.json: status finished, stopped or failed."""
        self._record.update(status=status, exit=exit_code, ended=time.time(), **facts)
        self._write_record()

    def forget(self) -> None:
        """Remove what a trainer wrote here, and the folder where nothing else is in it."""
        logs = [] if (self.path / "hostfile.txt").exists() else [*self.path.glob("logs/*.log")]  # else the launcher's
        for path in (self.path / "run.json", self.metrics, *logs):
            path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.path / "logs", self.path):
            with contextlib.suppress(OSError):  # somebody else's files
                folder.rmdir()

    def _write_record(self) -> None:
        write_atomically(self.path / "run.json", json.dumps(as_json(self._record), indent=1) + "\n")

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl. Raises OSError; a line that was cut off is left behind then."""
        line = "\n" * self._cut_off + json.dumps(as_json({"time": round(time.time(), 3), **row})) + "\n"
        self._cut_off = True
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(line)
        self._cut_off = False

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all lines of metrics.jsonl; one that a crash cut short is left out."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows
