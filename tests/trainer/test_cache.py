"""The cache of tokenized data: what killed runs leave goes, what is used stays, and it doesn't grow without bound."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Train

from trainer import cache

HOLDS = """
import time
from pathlib import Path
from trainer.cache import half_made, use
%s
print('up', flush=True)
time.sleep(60)
"""


def holder(call: str) -> subprocess.Popen[str]:
    """A process that uses a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS % call], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "up\n"
    return process


def make(root: Path, name: str, used: float, size: int = 1000) -> Path:
    folder = root / name
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "data").write_bytes(bytes(size))
    (folder / "info.json").write_text("{}")
    os.utime(folder / "info.json", (used, used))
    return folder


def test_what_a_killed_run_left_goes_and_what_one_makes_stays(tmp_path: Path) -> None:
    call = f"entered = half_made(Path({str(tmp_path)!r})); entered.__enter__()"
    dead = holder(call)
    (left,) = tmp_path.iterdir()
    dead.kill()
    dead.wait()
    alive = holder(call)  # the next run clears up
    try:
        (made,) = tmp_path.iterdir()
        assert made != left
        with cache.half_made(tmp_path) as mine:
            assert set(tmp_path.iterdir()) == {made, mine}
        assert set(tmp_path.iterdir()) == {made}
    finally:
        alive.kill()
        alive.wait()


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oldest, old, new = (make(tmp_path, name, used) for name, used in (("a", 1e9), ("b", 1.1e9), ("c", 1.2e9)))
    assert cache.shrink(tmp_path) == []
    monkeypatch.setenv("LANSPEED_CACHE_GB", "0.0000022")
    user = holder(f"use(Path({str(oldest)!r}))")
    try:
        assert cache.shrink(tmp_path) == [old]
    finally:
        user.kill()
        user.wait()
    assert new.exists() and oldest.exists() and cache.shrink(tmp_path) == []
    monkeypatch.setenv("LANSPEED_CACHE_GB", "0")
    assert cache.shrink(tmp_path) == [new, oldest]
    monkeypatch.setenv("LANSPEED_CACHE_GB", "many")
    assert cache.limit_bytes() == 50e9


def test_a_run_keeps_its_own_data_however_small_the_cache(train: Train, tmp_path: Path, environment: dict[str, str]
                                                         ) -> None:
    environment |= {"LANSPEED_CACHE": str(tmp_path / "cache"), "LANSPEED_CACHE_GB": "0"}
    run = train("--max_steps", "2", "--sequence_length", "64", expect=0)
    assert "removed" not in run.output
    (kept,) = (tmp_path / "cache" / "data").iterdir()
    assert (kept / "info.json").exists()
