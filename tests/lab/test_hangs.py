"""Hangs that are planted on two hosts with two ranks each, and what is said of them: which rank, and why."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from patience import wait_until
from programs import program

from lab.desk import SMALL, Desk, assert_nothing_left, launchers, ranks_on, wait_for_steps
from lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]

SEED = int(os.environ.get("LANSPEED_HANG_SEED", "1"))
QUICKLY = ["--stall-timeout", "12", "--on-stall", "end", "--patience", "20"]


@pytest.fixture
def desk(lab: Lab, texts: Path, cache: Path) -> Iterator[Desk]:
    made = Desk(lab, texts, cache, {"gpu1": 2, "gpu2": 2})
    yield made
    assert_nothing_left(made)


def chosen(what: str) -> tuple[int, int]:
    """The rank and the step of a planted hang."""
    dice = random.Random(f"{SEED} {what}")
    return dice.randrange(4), dice.randrange(3, 40)


def place(rank: int) -> str:
    return f"rank {rank} on gpu{rank // 2 + 1}"


def script(desk: Desk, how: str, rank: int, step: int) -> list[str]:
    words = desk.words(*QUICKLY, "--script", str(ROOT / "tests" / "hanging.py"))
    at = words.index("--dataset")
    return [*words[:at], *words[at + 2 :], "--", "--how", how, "--rank", str(rank), "--step", str(step)]


def blamed(desk: Desk) -> tuple[list[int], str]:
    """The ranks and the sentence of the last report in the run folder; a slow start makes one too."""
    record = json.loads(max(desk.run_folder.glob("hangs/*.json")).read_text())
    assert len(record["ranks"]) == 4 and len(record["hosts"]) == 2
    return record["cause"]["ranks"], record["cause"]["sentence"]


def run_script(desk: Desk, how: str, rank: int, step: int) -> tuple[list[int], str, str]:
    done = subprocess.run(script(desk, how, rank, step), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          stdin=subprocess.DEVNULL, timeout=240)
    assert done.returncode == 1 and "NO PROGRESS for" in done.stdout, done.stdout
    ranks, sentence = blamed(desk)
    assert f"it hung: {sentence}" in done.stdout
    return ranks, sentence, done.stdout


def test_a_rank_that_sleeps_is_named_with_the_line_where_it_is(desk: Desk) -> None:
    rank, step = chosen("sleep")
    ranks, sentence, _ = run_script(desk, "sleep", rank, step)
    assert ranks == [rank] and sentence.startswith(f"all ranks wait in all-reduce {step + 1} since "), sentence
    assert f", except {place(rank)}, which is in oversleep (tests/hanging.py:" in sentence


def test_a_rank_in_another_collective_is_named(desk: Desk) -> None:
    rank, step = chosen("otherwise")
    ranks, sentence, _ = run_script(desk, "otherwise", rank, step)
    assert sentence.startswith("ranks are in different collectives: "), sentence
    assert ranks == [rank] and place(rank) in sentence and "broadcast" in sentence and "all-reduce" in sentence


def test_a_rank_that_left_the_loop_early_is_named(desk: Desk) -> None:
    rank, step = chosen("leave")
    ranks, sentence, _ = run_script(desk, "leave", rank, step)
    assert ranks == [rank] and sentence.startswith("ranks are in different collectives: "), sentence
    assert f"{place(rank)} in barrier {step + 1} at leave_early (tests/hanging.py:" in sentence


def test_a_data_worker_that_hangs_is_named_with_its_rank(desk: Desk) -> None:
    rank, step = chosen("worker")
    ranks, sentence, _ = run_script(desk, "worker", rank, step)
    assert ranks == [rank], sentence
    assert f"except {place(rank)}, whose data worker (process " in sentence
    assert ") is in read_slowly (tests/hanging.py:" in sentence


def test_a_rank_of_a_script_that_never_joins_is_named(desk: Desk) -> None:
    rank, step = chosen("before")
    ranks, sentence, _ = run_script(desk, "before", rank, step)
    assert ranks == [rank] and "wait at the rendezvous, except" in sentence, sentence
    assert f"{place(rank)}, which is in oversleep (tests/hanging.py:" in sentence


def test_a_rank_of_a_training_that_never_joins_is_named(desk: Desk) -> None:
    rank, _ = chosen("never joins")
    hidden = desk.folder / "python"  # what a site's own start-up file may do
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        f"import os, time\nif os.environ.get('RANK') == '{rank}':\n    def dawdle():\n        time.sleep(3600)\n"
        "    dawdle()\n")
    code, output = desk.run(*QUICKLY, "--env", f"PYTHONPATH={hidden}", *SMALL, "--max_steps", "100000")
    ranks, sentence = blamed(desk)
    assert code == 1 and ranks == [rank] and "at the rendezvous, except" in sentence, output
    assert f"{place(rank)}, which is in dawdle (python/sitecustomize.py:4)" in sentence


def stopped_rank(desk: Desk, rank: int) -> int:
    found = {int(variables.partition(b"\0RANK=")[2].partition(b"\0")[0]): pid for pid in ranks_on(
        desk, f"gpu{rank // 2 + 1}") for variables in [Path(f"/proc/{pid}/environ").read_bytes()]}
    os.kill(found[rank], signal.SIGSTOP)
    return found[rank]


def test_a_stopped_rank_is_named_and_seen_by_watch(desk: Desk) -> None:
    rank, _ = chosen("stopped")
    job = desk.start("--stall-timeout", "6", "--patience", "20", *SMALL, "--max_steps", "100000")
    wait_for_steps(desk, job)
    time.sleep(random.Random(SEED).random())
    pid = stopped_rank(desk, rank)
    wait_until(lambda: "is stopped" in "".join(path.read_text() for path in desk.run_folder.glob("hangs/*.txt")))
    ranks, sentence = blamed(desk)
    assert ranks == [rank] and f"except {place(rank)}, which is stopped by a signal: kill -CONT" in sentence, sentence
    words = desk.words()
    at = next(number for number, word in enumerate(words) if word.endswith("launch_training.py"))
    watch = [*words[:at], str(ROOT / "master" / "watch_training.py"), "--stacks", "--json", "--host-keys", "accept-new"]
    seen = subprocess.run(watch, capture_output=True, text=True, timeout=60)
    assert json.loads(seen.stdout)["cause"]["ranks"] == [rank], seen.stderr
    os.kill(pid, signal.SIGCONT)
    before = (desk.run_folder / "metrics.jsonl").read_text()
    wait_until(lambda: (desk.run_folder / "metrics.jsonl").read_text() != before)  # nothing was disturbed
    seen = subprocess.run(watch, capture_output=True, text=True, timeout=60)
    assert seen.returncode == 0 and len(json.loads(seen.stdout)["ranks"]) == 4, seen.stderr
    for each in launchers(desk):
        os.kill(each, signal.SIGINT)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and "checkpoint-" in output, output


@pytest.mark.parametrize("deaf", ["gpu2"])
def test_a_cable_that_carries_one_way_only_is_named_with_its_direction(deaf: str, desk: Desk) -> None:
    host, other = desk.hosts[deaf], desk.hosts["gpu2" if deaf == "gpu1" else "gpu1"]
    job = desk.start(*QUICKLY, *SMALL, "--max_steps", "100000")
    wait_for_steps(desk, job)
    nft = program("nft")
    subprocess.run(host.words(nft, "add table ip lan; add chain ip lan in { type filter hook input priority 0; }; "
                              f"add rule ip lan in ip saddr {other.address} drop"), check=True)
    output, _ = job.communicate(timeout=120)
    ranks, sentence = blamed(desk)
    assert job.returncode == 1 and ranks == [], output
    assert f"{deaf} receives nothing from {other.name} (packets repeated " in sentence, sentence
