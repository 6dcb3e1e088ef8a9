"""The training that a drill breaks: a launcher as a process of its own, whose output and metrics are watched."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from master.core.paths import ROOT
from master.core.run_cli import UserError
from master.run.launcher_process import read_launcher_record
from master.run.metrics_file import MetricsFile
from master.run.run_folder import job_prefix
from master.ssh.options import PASSWORD_VARIABLE

SETTINGS = ("--sequence_length", "64", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--eval_steps",
            "0", "--num_samples", "0", "--save_steps", "100", "--max_steps", "10000000", "--lr_scheduler_type",
            "constant")
CHECKPOINT = re.compile(r"last checkpoint: step (\d+)|saved \S+/checkpoint-(\d+)")
STEP = re.compile(r"^step +(\d+)/", re.MULTILINE)
POLL_S = 0.05
END_S = 30.0  # seconds that a launcher gets to end when the drill is over


class DrillError(UserError):
    """A drill that can't go on."""


class DrilledRun:
    """`run` is the run folder, `base` the launcher's flags for hosts and ssh, `password` that of the hosts, if there is
    one; `limit`: seconds to wait for anything. Raises DrillError where nothing comes."""

    def __init__(self, run: Path, base: Sequence[str], password: str | None, limit: float) -> None:
        self.run, self._base, self._limit = run, list(base), limit
        self._variables = {**os.environ, **({PASSWORD_VARIABLE: password} if password else {})}
        self._metrics = MetricsFile(run / "metrics.jsonl")
        self._log = run.with_name(f"{run.name}.log")
        self._from = 0  # where the output of the launcher at hand begins
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *words: str, train: bool = True) -> None:
        """Start a launcher; `words`: flags beside those of all; `train`: also the trainer's."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        flags = ["--", "--output_dir", str(self.run), *SETTINGS] if train else []
        with self._log.open("ab") as log:
            self._from = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "master" / "launch_training.py"), *words, *self._base, *flags],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env=self._variables)

    @property
    def job(self) -> str:
        """The job's name on its hosts."""
        return read_launcher_record(self.run).job or ""

    @property
    def prefix(self) -> str:
        """What the names of all of the run's jobs begin with."""
        return job_prefix(self.run)

    @property
    def step(self) -> int:
        """The last step that has come."""
        found = self._metrics.newest().get("step")
        return found if isinstance(found, int) else 0

    def output(self) -> str:
        """Return what the launcher at hand has printed."""
        with self._log.open("rb") as log:
            log.seek(self._from)
            return log.read().decode("utf-8", "replace")

    def wait(self, condition: Callable[[], object], what: str, times: int = 1) -> None:
        """Wait until a condition holds; raise DrillError if it takes too long, or the launcher has ended."""
        started, limit = time.monotonic(), times * self._limit
        while not condition():
            if time.monotonic() - started > limit:
                raise DrillError(f"{what}: not within {limit:.0f} s")
            if not self.is_running and not condition():
                raise DrillError(f"{what}: the launcher has ended: {self.last_line()}")
            time.sleep(POLL_S)

    def wait_for_steps(self, count: int) -> None:
        """Wait until so many more steps have come."""
        before = self.step
        self.wait(lambda: self.step >= before + count, "steps")

    def wait_for_end(self) -> int:
        """Wait for the launcher to end and return its exit code. Raises DrillError."""
        assert self._process
        try:
            return self._process.wait(self._limit)
        except subprocess.TimeoutExpired:
            raise DrillError(f"the launcher has not ended within {self._limit:.0f} s") from None

    @property
    def is_running(self) -> bool:
        """True while the launcher lives."""
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send the launcher a signal."""
        assert self._process
        self._process.send_signal(number)

    def last_line(self) -> str:
        """Return the last line of the launcher's output."""
        return (self.output().strip().splitlines() or ["it printed nothing"])[-1]

    def first_step(self) -> int | None:
        """Return the first step that the launcher at hand has shown, None before it."""
        found = STEP.search(self.output())
        return int(found[1]) if found else None

    @property
    def saved(self) -> int:
        """The step of the checkpoint that a training named as it ended. Raises DrillError if it named none."""
        found = CHECKPOINT.findall(self.output())
        if not found:
            raise DrillError(f"no checkpoint was named: {self.last_line()}")
        return int("".join(found[-1]))

    def end(self) -> None:
        """End the launcher, and through it the ranks."""
        for _ in range(2):  # the first one has the ranks save
            if self.is_running:
                self.signal(signal.SIGINT)
                assert self._process
                try:
                    self._process.wait(END_S)
                except subprocess.TimeoutExpired:
                    continue

    def forget(self) -> None:
        """Delete the launcher's output."""
        self._log.unlink(missing_ok=True)
