"""The model of a run, or the folder of one: where it is, and whether it was trained with conversations or texts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from master.core.paths import TRAINER
from master.core.run_cli import UserError
from master.core.trust import refuse_foreign
from master.run.launcher_process import read_object
from master.run.run_folder import RunError, find_run
from trainer.flags.run_names import INSIDE

TEXT = "text"  # run.json's word for data that are no conversations


def find_model(name: str | None) -> Path:
    """Return the model's folder that a run or path means, without one the newest run's. Raises UserError."""
    if name and any((Path(name) / each).exists() for each in ("config.json", "adapter_config.json")):
        refuse_foreign(Path(name))
        return Path(name)
    if not name:
        found = sorted(path for path in Path("runs").glob("*-*-*/model") if path.is_dir())
        if not found:
            raise RunError("no run here has a model yet: invoke train --model tiny")
        refuse_foreign(found[-1].parent)
        return found[-1]
    run = find_run(name)
    if not (run / "model").is_dir():
        raise UserError(f"{run} has no model yet: invoke train --resume {run}")
    return run / "model"


def record_of(model: Path) -> dict[str, object]:
    """Return run.json of the run that a model lies in, {} for another folder."""
    return read_object(model.parent / "run.json") if model.name in INSIDE else {}


def form_of(model: Path) -> object:
    """Return what a model was trained with, TEXT for texts; None where that isn't known."""
    return record_of(model).get("form")


def run_on_model(program: str, words: Sequence[str]) -> int:
    """Run a program of the trainer's and return its exit code; Ctrl-C is the program's, which handles it."""
    process = subprocess.Popen([sys.executable, str(TRAINER.with_name(program)), *words])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
