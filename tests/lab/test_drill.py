"""`invoke drill` on two whole machines: every fault ends as it should, and nothing is left."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from lab.desk import Desk, assert_nothing_left
from lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]


@pytest.fixture
def desk(lab: Lab, texts: Path, cache: Path) -> Iterator[Desk]:
    made = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    for host in made.hosts.values():
        subprocess.run(host.words("mount", "-t", "tmpfs", "tmpfs", str(made.folder)), check=True)
    yield made
    assert_nothing_left(made)


def drill(desk: Desk, *more: str) -> subprocess.CompletedProcess[str]:
    words = desk.words()
    at = next(number for number, word in enumerate(words) if word.endswith("launch_training.py"))
    return subprocess.run([*words[:at], str(ROOT / "master" / "drill_cluster.py"), "--host-keys", "accept-new", *more],
                          capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)


def test_every_fault_is_survived_and_nothing_is_left(desk: Desk) -> None:
    done = drill(desk, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    results = {result["fault"]: result for result in said["results"]}
    assert said["left"] == {} and all(result["is_fine"] for result in said["results"])
    assert list(results) == ["start", "break the connection to gpu1", "break the connection to gpu2",
                             "kill the launcher, start another", "Ctrl-C", "resume", "kill a rank on gpu1",
                             "kill a rank on gpu2"]
    assert all(results[f"break the connection to {name}"]["followed"].startswith("connected again")
               and results[f"kill a rank on {name}"]["lost"] >= 1 for name in ("gpu1", "gpu2"))
    assert results["Ctrl-C"]["lost"] == 0
    assert not list((desk.folder / "runs").glob("*"))
    for host in desk.hosts.values():
        seen = subprocess.run(host.words("find", str(desk.folder)), capture_output=True, text=True).stdout
        assert "drill" not in seen
