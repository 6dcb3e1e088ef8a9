"""What all tests share: which of them run here, and ways to start the real trainer.

    invoke test            what this machine can do in a few minutes
    invoke test --all      the slow ones and those that need root too
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.hosts import Lab
from machines import Machine
from ssh_server import INSTALL, find_program

HOME = Path(__file__).resolve().parent.parent
TRAINER = HOME / "trainer" / "train.py"
LEFT_OUT: dict[str, int] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run slow and lab tests too")
    parser.addoption("--differential", type=int, default=3000, metavar="N",
                     help="put so many generated configs to DeepSpeed and to us (3000)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --all leave out slow tests, lab tests unless root, and tests of programs that aren't here.

    With it these run, and fail with what to install.
    """
    everything = config.getoption("--all") or bool(config.getoption("keyword"))
    root = os.geteuid() == 0
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        slow, lab = item.get_closest_marker("slow"), item.get_closest_marker("lab")
        missing = [name for mark in item.iter_markers("needs") for name in mark.args if not find_program(name)]
        reason = None if everything else "slow" if slow else "lab" if lab and not root else \
            f"without {missing[0]}" if missing else None
        (others if reason else chosen).append(item)
        if reason:
            LEFT_OUT[reason] = LEFT_OUT.get(reason, 0) + 1
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = chosen


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say in one line what was left out and how to run it."""
    if LEFT_OUT:
        what = ", ".join(f"{count} {name}" for name, count in LEFT_OUT.items())
        how = "sudo make test ALL=1" if "lab" in LEFT_OUT else "make test ALL=1"
        how = f"{INSTALL}; {how}" if any(name.startswith("without") for name in LEFT_OUT) else how
        terminalreporter.write_line(f"left out: {what} (run them: {how})")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 60 short documents of different lengths, one a file."""
    folder = tmp_path_factory.mktemp("texts")
    words = ("the quick brown fox jumps over a lazy dog while seven wise owls read old books "  # noqa: SIM905
             "by the river").split()
    for number in range(60):
        count = 5 + number * 7 % 90
        (folder / f"{number:02d}.md").write_text(
            f"Document {number}\n\n" + " ".join(words[(number * i + i) % len(words)] for i in range(1, count)) + ".\n")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that keeps tokenized data for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def environment(cache: Path) -> dict[str, str]:
    """An environment for programs under test: no GPU, no hub, a cache of their own, no leftovers of a launcher."""
    kept = {name: value for name, value in os.environ.items()
            if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return {**kept, "LANSPEED_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


class Run:
    """A finished training: its exit code, what it printed, its folder."""

    def __init__(self, done: subprocess.CompletedProcess[str], path: Path) -> None:
        self.code, self.output, self.path = done.returncode, done.stdout + done.stderr, path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def losses(self, key: str = "loss") -> dict[int, float]:
        """Step -> loss."""
        return {row["step"]: row[key] for row in self.metrics if key in row}


Train = Callable[..., Run]


@pytest.fixture
def train(tmp_path: Path, texts: Path, environment: dict[str, str]) -> Train:
    """Run the trainer on CPU with `ranks` ranks: train("--max_steps", "4", ranks=2, config="zero1", name="a")."""

    def start(*words: str, ranks: int = 1, config: str | None = None, name: str = "run", model: str = "tiny",
              data: Path | None = texts, expect: int | None = 0) -> Run:
        path = tmp_path / name
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0",
                        "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
        command += [str(TRAINER), "--model_name_or_path", model, "--output_dir", str(path), "--num_samples", "1"]
        command += ["--dataset_path", str(data)] if data else []
        if config:
            command += ["--deepspeed", "--deepspeed_config", str(HOME / "trainer" / f"{config}.json")]
        done = subprocess.run([*command, "--logging_steps", "1", *words], env=environment, cwd=tmp_path,
                              capture_output=True, text=True, timeout=300)
        run = Run(done, path)
        assert expect is None or run.code == expect, run.output
        return run

    return start


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A made-up machine without GPUs, to which a test adds what it needs."""
    return Machine(tmp_path / "machine")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A network of machines of its own, with a master and whatever a test adds; needs root."""
    whole = Lab(tmp_path)
    yield whole
    whole.end()
