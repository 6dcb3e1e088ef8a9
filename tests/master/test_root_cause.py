"""The first cause of a failure, out of what all hosts told."""

from __future__ import annotations

import pytest

from master.inventory.preflight import gpu_problems, node_problems
from master.training.conclusion import launchers_words
from master.training.job import JobResult
from master.training.root_cause import KILLED, RankExit, excerpt, first_cause

LOST_PEER = ["Traceback (most recent call last):", "  File ...", "RuntimeError: [../gloo/transport/tcp/pair.cc:534] "
             "Connection closed by peer [10.0.0.2]:4321"]
BUG = ["loading", "Traceback (most recent call last):", "  File \"mine.py\", line 3", "ValueError: bad"]


@pytest.mark.parametrize(("exits", "lost", "said", "expected"), [
    ([], {}, {}, None),
    ([RankExit("a", 0, 0, 9.0)], {}, {}, None),
    ([RankExit("a", 0, 1, 2.0)], {}, {("a", 0): BUG}, "a, rank 0: exited with code 1"),
    # The peer's complaint came first; the cause is the one that was killed.
    ([RankExit("a", 0, 1, 2.0), RankExit("b", 1, -9, 2.1)], {}, {("a", 0): LOST_PEER}, "b, rank 1: killed by SIGKILL"),
    ([RankExit("a", 0, 1, 2.0), RankExit("b", 1, 1, 2.1)], {}, {("a", 0): LOST_PEER, ("b", 1): BUG},
     "b, rank 1: exited with code 1"),
    ([RankExit("a", 0, 1, 2.0)], {"b": "connection: no answer for 12 s"}, {("a", 0): LOST_PEER},
     "b: connection: no answer for 12 s"),
    ([RankExit("a", 0, 1, 2.0)], {}, {("a", 0): LOST_PEER}, "a, rank 0: exited with code 1"),
    # Who has left the loop early took the connections of the others along.
    ([RankExit("b", 1, 0, 1.9), RankExit("a", 0, 1, 2.0)], {}, {("a", 0): LOST_PEER},
     "b, rank 1: exited with code 0 while the others still trained"),
    ([RankExit("b", 1, 0, 1.9), RankExit("a", 0, 1, 2.0)], {}, {("a", 0): BUG}, "a, rank 0: exited with code 1"),
    ([RankExit("a", 0, -64, 2.0)], {}, {}, "a, rank 0: killed by SIGRTMAX"),
    ([], {"b": "TCP: refused"}, {("b", None): ["sh: no python"]}, "b: TCP: refused"),
])
def test_the_first_cause_is_no_complaint_about_others(
    exits: list[RankExit], lost: dict[str, str], said: dict[tuple[str, int | None], list[str]], expected: str | None,
) -> None:
    cause = first_cause(exits, lost, said)
    assert (str(cause) if cause else None) == expected


@pytest.mark.parametrize(("text", "hint"), [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "a smaller batch or shorter sequences"),
    ("OSError: [Errno 28] No space left on device", "--save_total_limit"),
    ("RuntimeError: The server socket has failed to listen: EADDRINUSE", "--master-port"),
    ("ModuleNotFoundError: No module named 'peft'", "invoke sync"),
    ("ValueError: bad", ""),
])
def test_well_known_faults_have_a_hint(text: str, hint: str) -> None:
    cause = first_cause([RankExit("a", 0, 1, 1.0)], {}, {("a", 0): [text]})
    assert cause and (hint in cause.hint if hint else not cause.hint)


def test_a_kill_that_nobody_asked_for_is_explained() -> None:
    cause = first_cause([RankExit("a", 3, -9, 1.0)], {}, {("a", 3): ["step 1"]})
    assert cause and cause.hint == KILLED and cause.excerpt == ("step 1",)


def test_of_a_long_traceback_the_ends_are_shown() -> None:
    lines = ["before", "Traceback (most recent call last):", *(f"  line {number}" for number in range(40)), "Error: x"]
    shown = excerpt(lines)
    assert shown[0].startswith("Traceback") and shown[1] == "  ..." and shown[-1] == "Error: x" and len(shown) == 12


def test_a_launcher_that_fails_before_its_ranks_is_quoted() -> None:
    result = JobResult(launcher_codes={"a": 0, "b": 1})
    result.output["a", None].append("fine")
    result.output["b", None].extend(["Traceback", "No module named 'deepspeed'"])
    assert launchers_words(result) == "b: No module named 'deepspeed'"
    assert launchers_words(JobResult()) == ""


def test_gpus_that_are_gone_stop_a_start() -> None:
    gpus = {"vendor": "NVIDIA", "use": [0, 2], "busy": {}, "problems": ["NV_GPU_LOST"]}
    assert not gpu_problems("gpu1", (0, 2), gpus)
    (fault,) = gpu_problems("gpu1", (0, 1, 2, 3), gpus)
    assert str(fault).startswith("gpu1: slot 1, 3 can't be used now (NV_GPU_LOST): invoke detect there says more")


def test_ranks_that_were_told_to_end_are_no_cause() -> None:
    exits = [RankExit("gpu1", 0, 1, 5.0), RankExit("gpu2", 1, -15, 5.1, asked=True)]
    said: dict[tuple[str, int | None], list[str]] = {
        ("gpu1", 0): ["error: Gloo connectFullMesh failed: timed out connecting: Connection refused"]}
    cause = first_cause(exits, {}, said)
    assert str(cause) == "gpu1, rank 0: exited with code 1"
    assert cause and cause.hint.startswith("can the hosts reach each other")


def test_what_differs_between_nodes_stops_a_start() -> None:
    own = {"code": "c1", "packages": {"torch": "2.13.0+cpu", "deepspeed": "0.19.8"}, "python": "3.11.2"}
    same = {"code": "c1", "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"}, "python": "3.11.9", "missing": [],
            "free_bytes": 10**12, "port": 29500}
    assert not node_problems({"gpu1": same}, own)
    odd = {"code": None, "packages": {"torch": "2.12.0"}, "python": "3.12.1", "missing": ["/data/x"],
           "free_bytes": 10**9, "port": None}
    assert [str(fault) for fault in node_problems({"gpu1": same, "gpu2": odd}, own)] == [
        "gpu2: no lanspeed in the folder it trains in: invoke sync",
        "gpu2: torch 2.12.0, here 2.13.0+cpu: invoke sync",
        "gpu2: deepspeed is not installed: invoke sync",
        "gpu2: Python 3.12.1, here 3.11.2: invoke sync takes the same",
        "gpu2: /data/x is not there: invoke sync -- --with /data/x",
        "gpu2: 1.0 GB are free on its disk: free some",
        "gpu2: the port is taken: --master-port N picks another"]
