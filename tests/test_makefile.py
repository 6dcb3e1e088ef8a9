"""`make` on a machine that lacks something says what in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from machines import Machine, nvidia_gpu


def make(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `make install` in a copy of what it reads."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for package in ("master", "trainer"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    shutil.copy(ROOT / "master" / "make_environment.py", folder / "master")
    # The tests may run under `make test` themselves; this make is nobody's child.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", "install", *words], cwd=folder, capture_output=True, text=True,
                          env={**own, **variables})


def fake_python(folder: Path, refuses: str, name: str = "python") -> str:
    """A Python that cannot run programs with a certain word in them."""
    path = folder / name
    path.write_text(f'#!/bin/sh\ncase "$*" in *{refuses}*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("words", "message"), [
    (["PYTHON="], "make: Python 3.11 or newer is needed: sudo apt install python3 python3-venv"),
    (["ROOM_MB=999999999"], "make: .venv needs 999999999 MB here"),
    (["PYTHON={fake}"], "cannot make virtual environments: sudo apt install python3-venv"),
    (["PYTHON={old}"], "is too old, lanspeed needs 3.11 or newer: make PYTHON=python3.12"),
])
def test_what_is_missing_is_told_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    fake, old = fake_python(tmp_path, "ensurepip"), fake_python(tmp_path, "version_info", "old")
    done = make(tmp_path, *[word.format(fake=fake, old=old) for word in words])
    assert done.returncode == 2
    assert message in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_faster_kernels_are_installed_where_a_gpu_is_found(machine: Machine) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def planned() -> str:
        environment = {**own, "PATH": f"{machine.bin}:{os.environ['PATH']}", "GPU_DETECT_SYSROOT": str(machine.root)}
        return subprocess.run(["make", "-n", "--always-make", "install"], cwd=ROOT, capture_output=True, text=True,
                              check=True, env=environment).stdout

    assert "train,dpo,dev " in planned()
    machine.nvidia(nvidia_gpu(0))
    assert "train,dpo,dev,gpu " in planned()


def test_an_index_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    done = make(tmp_path, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1", PIP_CONFIG_FILE=os.devnull,
                PIP_NO_CACHE_DIR="1", PIP_FIND_LINKS="", PIP_EXTRA_INDEX_URL="")
    assert done.returncode == 2
    assert "make: the package index cannot be reached" in done.stdout
    assert not (tmp_path / ".venv" / ".installed").exists()


def test_room_is_looked_for_where_the_environment_goes(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    df = tmp_path / "bin" / "df"
    df.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nprintf "Filesystem\\nx 1 1 5 1 /\\n"\n')
    df.chmod(0o755)
    done = subprocess.run(["make", "install", f"VENV={tmp_path}/not/there"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    assert done.returncode and "needs 3000 MB" in done.stdout + done.stderr
    assert (tmp_path / "asked").read_text().split()[-1] == str(tmp_path)
