"""Whose files are obeyed: hostfile, cluster.json and run folder belong to this user, and nobody else may write them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from master.core import trust
from master.core.trust import TrustError, refuse_foreign
from master.inventory.hostfile import read_hostfile

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("mode", "reason"), [(0o666, "every user may write it"), (0o602, "every user may write it")])
def test_what_others_may_write_is_refused(mode: int, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "hostfile.txt"
    path.write_text("gpu1 slots=1\n")
    path.chmod(mode)
    with pytest.raises(TrustError, match=f"{reason}.*chmod go-w {path}, or --trust-folder"):
        read_hostfile(path)
    path.chmod(0o644)
    assert read_hostfile(path)[0].host == "gpu1"
    refuse_foreign(tmp_path / "missing")


@pytest.mark.root
def test_what_another_user_owns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text("{}")
    os.chown(path, 4321, 0)
    with pytest.raises(TrustError, match="it belongs to user 4321"):
        refuse_foreign(path)
    os.chown(path, 0, 4321)
    path.chmod(0o664)
    with pytest.raises(TrustError, match="the group 4321 may write it"):
        refuse_foreign(path)


def test_a_file_system_without_modes_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:5 / {tmp_path}/my\\040disk rw - 9p C: rw\n")
    monkeypatch.setattr(trust, "MOUNTS", mounts)
    place = tmp_path / "my disk"
    place.mkdir()
    for name in ("a", "b"):
        (place / name).write_text("")
        (place / name).chmod(0o777)
        refuse_foreign(place / name)
    assert capsys.readouterr().err.count("file system without modes") == 1
    assert trust.file_system(tmp_path / "my") == "ext4"


@pytest.mark.parametrize(("more", "code"), [([], 1), (["--trust-folder"], 1)])
def test_stop_and_watch_refuse_a_run_of_others(more: list[str], code: int, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "20260101-000000-tiny"
    run.mkdir(parents=True)
    run.chmod(0o777)
    for tool in ("stop_training.py", "watch_training.py"):
        done = subprocess.run([sys.executable, str(ROOT / "master" / tool), str(run), *more], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == code
        assert ("every user may write it" in done.stderr) is not bool(more), done.stderr


def test_a_planted_program_is_not_started(tmp_path: Path) -> None:
    """RUN/cluster.json names a program of its own as this machine's Python, RUN/launcher.json a living process."""
    run = tmp_path / "runs" / "20260101-000000-tiny"
    run.mkdir(parents=True)
    program = run / "python3"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/planted\n")
    program.chmod(0o755)
    (run / "hostfile.txt").write_text("localhost slots=1\n")
    (run / "cluster.json").write_text(
        '{"schema": "cluster/1", "pairs": [], "hosts": [{"name": "localhost", "reached": null, "address": null, '
        f'"host_key": null, "macs": [], "report": {{}}, "facts": {{}}, "dir": "{run}", "python": "{program}", '
        '"read_at": 0}]}')
    with subprocess.Popen(["sleep", "60"]) as victim:
        started = Path(f"/proc/{victim.pid}/stat").read_text().rpartition(")")[2].split()[19]
        (run / "launcher.json").write_text(
            f'{{"pid": {victim.pid}, "started": "{started}", "host": null, "job": "20260101-000000-tiny-abcdef"}}')
        for words in (["watch_training.py", "--once"], ["stop_training.py"]):
            subprocess.run([sys.executable, str(ROOT / "master" / words[0]), str(run), *words[1:]], cwd=tmp_path,
                           capture_output=True, text=True, timeout=60)
        assert victim.poll() is None  # what a forged record names is not interrupted
        victim.kill()
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_what_is_written_others_may_not_change(umask: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import os, sys; os.umask({umask}); sys.path.insert(0, {str(ROOT)!r})\n"
         "from pathlib import Path\nfrom master.core.run_cli import run_cli\n"
         "from master.core.atomic_write import write_atomically\n"
         "from master.run.launcher_process import write_launcher_record\n"
         "def work():\n    write_atomically(Path('a'), 'x'); write_launcher_record(Path('runs/r')); return 0\n"
         "run_cli(work)"], cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~(umask | 0o022)
    assert (tmp_path / "runs/r").stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "runs/r/launcher.json").stat().st_mode & 0o022
