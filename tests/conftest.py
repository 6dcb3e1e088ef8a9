"""What all tests share: which of them run here, and ways to start the real trainer.

    invoke test            what this machine can do in a few minutes
    invoke test --all      all of them, the slow ones and those that need root too
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm_trainer
from lab.hosts import Lab
from machines import Machine
from programs import LAB, as_root, find_program, install_command, may_mount, missing_programs
from ssh_server import SshClient, SshServer

ROOT = Path(__file__).resolve().parent.parent
TRAINER = ROOT / "trainer" / "train.py"
WARM = "LANSPEED_WARM_TRAINER"  # the socket of the trainer that is loaded, for all of pytest's processes
CONFIG = tempfile.TemporaryDirectory(prefix="lanspeed-config-")
os.environ["XDG_CONFIG_HOME"] = CONFIG.name  # the secret that signs runs is not the user's own
os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: tests fetch nothing
NO_GPU = "needs a GPU"
SLOW, NO_ROOT, MOUNTS = "slow", "needs root", "needs root that may mount (docker run --privileged)"


# -- which tests run ---------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run slow tests too, and refuse to leave any out")
    parser.addoption("--differential", type=int, metavar="N",
                     help="put so many generated configs to DeepSpeed and to us (500; 3000 with --all)")


def pytest_configure(config: pytest.Config) -> None:
    """With --all, say before the first test what is missing; start what trainings are forked from."""
    if hasattr(config, "workerinput") or config.option.collectonly:
        return  # pytest-xdist's first process has done it
    if config.getoption("--all"):
        missing = missing_programs()
        if missing:
            raise pytest.UsageError(f"--all needs {', '.join(missing)}: {install_command(missing)}")
        if not may_mount():
            raise pytest.UsageError(f"--all {NO_ROOT if os.geteuid() else MOUNTS}: sudo make test ALL=1")
    folder = tempfile.TemporaryDirectory(prefix="lanspeed-tests-")
    os.environ[WARM] = f"{folder.name}/trainer"
    server = warm_trainer.start_server(Path(os.environ[WARM]))

    def end() -> None:
        server.communicate(timeout=20)
        folder.cleanup()

    config.add_cleanup(end)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is slow, unless asked for it, and what this machine can't do."""
    with_slow = config.getoption("--all") or "slow" in config.option.markexpr
    for item in items:
        if reason := why_skipped(item, with_slow):
            item.add_marker(pytest.mark.skip(reason=reason))


def why_skipped(item: pytest.Item, with_slow: bool) -> str | None:
    """Return what keeps a test from running here, None if nothing does."""
    lab = item.get_closest_marker("lab")
    root = lab or item.get_closest_marker("root")
    needs = [name for mark in item.iter_markers("needs") for name in mark.args] + list(LAB if lab else ())
    missing = sorted({name for name in needs if not find_program(name)})
    if item.get_closest_marker("gpu") and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd"))):
        return NO_GPU
    if item.get_closest_marker("slow") and not with_slow:
        return SLOW
    if root and os.geteuid():
        return NO_ROOT
    if missing:
        return f"needs {', '.join(missing)}"
    return MOUNTS if root and not may_mount() else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say in one line what was skipped, why, and the command that runs it all."""
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    kinds = Counter("programs" if reason.startswith("needs ") and reason not in (NO_ROOT, MOUNTS, NO_GPU) else reason
                    for reason in reasons)
    missing = missing_programs()
    names = {SLOW: "are slow", "programs": f"need programs that are missing here ({', '.join(missing)})",
             NO_GPU: "need a GPU", NO_ROOT: NO_ROOT.replace("needs", "need"), MOUNTS: MOUNTS.replace("needs", "need")}
    if kinds:
        told = ", ".join(f"{count:,} {names.get(kind, kind)}" for kind, count in kinds.most_common())
        if set(kinds) == {NO_GPU}:
            terminalreporter.write_line(f"skipped: {told}. On a machine that has one: python -m pytest tests/gpu -n 8")
            return
        command = f"{install_command(missing)} && " if missing else ""
        terminalreporter.write_line(f"skipped: {told}. Run all: {command}{as_root()}make test ALL=1")


# -- what they use -----------------------------------------------------------------------------------------------------


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
def environment(cache: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """An environment for programs under test: no hub, a cache of their own, no leftovers of a launcher, no GPU.

    Tests of tests/gpu see the GPUs.
    """
    kept = {name: value for name, value in os.environ.items()
            if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    hidden = {} if request.node.get_closest_marker("gpu") else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {**kept, **hidden, "LANSPEED_CACHE": str(cache), "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SshServer]:
    """A real sshd."""
    with SshServer(tmp_path / "server") as running:
        yield running


@pytest.fixture
def client(tmp_path: Path, server: SshServer) -> SshClient:
    """Who reaches it as gpu1."""
    return SshClient(tmp_path / "client", gpu1=server)


class Run:
    """A finished training: its exit code, what it printed, its folder."""

    def __init__(self, code: int, output: str, path: Path) -> None:
        self.code, self.output, self.path = code, output, path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def losses(self, key: str = "loss") -> dict[int, float]:
        """Step -> loss."""
        return {row["step"]: row[key] for row in self.metrics if key in row}


LAUNCHERS: dict[str, list[str]] = {
    "python": [], "torchrun": ["-m", "torch.distributed.run", "--master-port=0", "--rdzv-backend=c10d",
                               "--rdzv-endpoint=127.0.0.1:0"]}
Train = Callable[..., Run]
RunRanks = Callable[..., list[Any]]


@pytest.fixture
def run_ranks(tmp_path: Path, environment: dict[str, str]) -> RunRanks:
    """Run a piece of Python in two ranks, run_ranks(code, "its", "words"): what each puts into `told`, by rank.

    The code finds `ranks`, which have met and have a process group on their CPUs.
    """
    whole = ("import json, os, sys\nfrom trainer.distributed.ranks import Ranks\nranks, told = Ranks(), {}\n"
             "ranks.rendezvous()\n"
             "ranks.start_process_group('cpu')\n%s\n"
             "with open(f'told.{ranks.rank}', 'w') as file:\n    json.dump(told, file)\nos._exit(0)\n")

    def start(code: str, *words: str) -> list[Any]:
        (tmp_path / "ranks.py").write_text(whole % code)
        log = tmp_path / "ranks.log"
        with warm_trainer.Job(os.environ[WARM], [str(tmp_path / "ranks.py"), *words], environment, tmp_path, log,
                              ranks=2) as job:
            assert job.wait(120) == 0, log.read_text()
        return [json.loads((tmp_path / f"told.{rank}").read_text()) for rank in range(2)]

    return start


@pytest.fixture
def train(tmp_path: Path, texts: Path, environment: dict[str, str]) -> Train:
    """Run the trainer on CPU with `ranks` ranks: train("--max_steps", "4", ranks=2, config="zero1", name="a").

    They are forked from a process that has loaded the libraries; `launcher` python or torchrun starts them anew.
    """

    def start(*words: str, ranks: int = 1, config: str | None = None, name: str = "run", model: str = "tiny",
              data: Path | None = texts, expect: int | None = 0, launcher: str = "") -> Run:
        path, log = tmp_path / name, tmp_path / f"{name}.log"
        told = [str(TRAINER), "--model_name_or_path", model, "--output_dir", str(path), "--num_samples", "1"]
        told += ["--dataset_path", str(data)] if data else []
        if config:
            told += ["--deepspeed", "--deepspeed_config", str(ROOT / "trainer" / f"{config}.json")]
        told += ["--logging_steps", "1", *words]
        if launcher:
            command = [sys.executable, *LAUNCHERS[launcher], *([f"--nproc-per-node={ranks}"] if ranks > 1 else [])]
            with log.open("w") as file:
                code = subprocess.run([*command, *told], env=environment, cwd=tmp_path, stdout=file,
                                      stderr=file, timeout=300).returncode
        else:
            with warm_trainer.Job(os.environ[WARM], told, environment, tmp_path, log, ranks) as job:
                code = job.wait(300)
        run = Run(code, log.read_text(), path)
        assert expect is None or run.code == expect, run.output
        return run

    return start


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A made-up machine without GPUs, to which a test adds what it needs."""
    return Machine(tmp_path / "machine")


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A network of machines of its own, with a master and whatever a test adds; needs root.

    Its folder is not below pytest's, which other accounts may not enter once another pytest has started.
    """
    with tempfile.TemporaryDirectory(prefix="lanspeed-lab-") as folder:
        whole = Lab(Path(folder))
        try:
            yield whole
        finally:
            whole.end()
