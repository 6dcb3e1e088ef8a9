"""worker/inspect_ranks.py asks processes that observe_rank.py has prepared, whatever those do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from patience import wait_until

from master.core.json_schema import first_error
from master.ssh.worker_message import SCHEMA

JOB = f"inspected-{os.getpid()}"
PROGRAM = """
import os, sys, time, threading
def wait():
    print("ready", flush=True)
    time.sleep(600)
"""
HOLDS_LOCK = """
import ctypes
def hold():
    print("ready", flush=True)
    while True:
        ctypes.PyDLL(None).sleep(600)  # a call that keeps Python's lock, and that each signal ends
hold()
"""
COMPUTES = """
def count():
    print("ready", flush=True)
    while True:
        sum(range(1000))
count()
"""
FORKS = """
def serve():
    time.sleep(600)
if os.fork() == 0:
    serve()
wait()
"""
COLLECTIVES = """
import torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
for _ in range(12):
    dist.all_reduce(torch.ones(3))
wait()
"""


class Rank:
    """A process that is started as a rank is, and ends with the test."""

    def __init__(self, folder: Path, program: str, *words: str, rank: int = 3, **variables: str) -> None:
        self.stacks, code = folder / "stacks", folder / "python"
        for each in (self.stacks, code):
            each.mkdir(exist_ok=True)
        (code / "sitecustomize.py").write_text((ROOT / "worker" / "observe_rank.py").read_text())
        (folder / "program.py").write_text(PROGRAM + program)
        environment = {**os.environ, "LANSPEED_JOB": JOB, "RANK": str(rank), "LANSPEED_STACKS": str(self.stacks),
                       "PYTHONPATH": str(code), **variables}
        self.process = subprocess.Popen([sys.executable, str(folder / "program.py"), *words], env=environment,
                                        stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    started: list[Rank] = []
    yield started
    for rank in started:
        rank.end()


def inspect(job: str = JOB) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-I", str(ROOT / "worker" / "inspect_ranks.py"), job], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("@@RANKS ")[2])
    assert first_error(SCHEMA, found, "ranks") is None
    return found


def told() -> tuple[dict[str, Any], dict[str, Any]]:
    """What is told of the one rank, and of its own process."""
    (rank,) = inspect()["ranks"]
    return rank, rank["processes"][0]


def innermost(process: dict[str, Any]) -> str:
    return process["stacks"][0][0]["name"] if process["stacks"] else ""


def test_a_rank_shows_its_stack_again_and_again(ranks: list[Rank], tmp_path: Path) -> None:
    ranks.append(Rank(tmp_path, "wait()"))
    for _ in range(3):
        rank, own = told()
        assert (rank["rank"], own["pid"], own["state"]) == (3, ranks[0].process.pid, "S")
        assert [frame["name"] for frame in own["stacks"][0]] == ["wait", "<module>"] and len(own["stacks"]) == 1


@pytest.mark.parametrize(("program", "name"), [(HOLDS_LOCK, "hold"), (COMPUTES, "count")])
def test_a_rank_that_keeps_pythons_lock_or_computes_answers_too(
        program: str, name: str, ranks: list[Rank], tmp_path: Path) -> None:
    ranks.append(Rank(tmp_path, program))

    def is_seen() -> bool:  # a rank that sleeps may be waking up as it is looked at
        _, own = told()
        return innermost(own) == name and (own["state"] == "R") == (name == "count")

    wait_until(is_seen)


def test_a_stopped_rank_costs_no_wait_and_is_not_disturbed(ranks: list[Rank], tmp_path: Path) -> None:
    ranks.append(Rank(tmp_path, "wait()"))
    os.kill(ranks[0].process.pid, signal.SIGSTOP)
    started = time.monotonic()
    _, own = told()
    assert own["state"] == "T" and own["stacks"] == [] and time.monotonic() - started < 3
    os.kill(ranks[0].process.pid, signal.SIGCONT)
    assert innermost(told()[1]) == "wait"


def test_what_a_rank_has_forked_is_told_beside_it(ranks: list[Rank], tmp_path: Path) -> None:
    ranks.append(Rank(tmp_path, FORKS))
    wait_until(lambda: [innermost(each) for each in told()[0]["processes"][1:]] == ["serve"])  # once it is there
    rank, own = told()
    assert innermost(own) == "wait" and rank["processes"][1]["pid"] != own["pid"]


def test_a_process_that_was_not_prepared_is_not_signalled(ranks: list[Rank], tmp_path: Path) -> None:
    ranks.append(Rank(tmp_path, "wait()", PYTHONNOUSERSITE="1", PYTHONPATH=""))  # without the file: it would die of it
    (ranks[0].stacks / str(ranks[0].process.pid)).write_text("")
    _, own = told()
    assert own["stacks"] == [] and ranks[0].process.poll() is None


def test_the_collectives_are_those_of_torchs_flight_recorder(ranks: list[Rank], tmp_path: Path) -> None:
    ranks.append(Rank(tmp_path, COLLECTIVES, str(tmp_path / "meeting")))
    rank, _ = told()
    assert [one["sequence"] for one in rank["collectives"]] == list(range(5, 13))  # the last eight
    last = rank["collectives"][-1]
    assert (last["operation"], last["backend"], last["is_over"], last["sizes"]) == ("all_reduce", "gloo", True, "[[3]]")
    assert last["group"] == "0" and not last["is_p2p"]


def test_a_start_up_file_of_the_users_own_still_runs(ranks: list[Rank], tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import os\nos.environ['OWN_FILE_RAN'] = 'yes'\n")
    program = "print(os.environ.get('OWN_FILE_RAN'), file=sys.stderr)\nwait()"
    code = tmp_path / "python"
    ranks.append(Rank(tmp_path, textwrap.dedent(program), PYTHONPATH=f"{code}{os.pathsep}{own}"))
    environ = Path(f"/proc/{ranks[0].process.pid}/environ").read_bytes()
    assert str(own).encode() in environ
    done = subprocess.run([sys.executable, "-c", "import os; print(os.environ['OWN_FILE_RAN'])"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": f"{code}{os.pathsep}{own}"})
    assert done.stdout == "yes\n", done.stderr


def test_of_a_job_that_is_not_there_nothing_is_told() -> None:
    found = inspect("another-job")
    assert found["ranks"] == [] and found["node"]["cores"] >= 1
