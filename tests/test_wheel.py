"""The wheel: it has every file, and its tools work where no checkout is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("master", "schemas", "trainer", "worker")


def run(*words: str, cwd: Path, **variables: str) -> str:
    """Run a command; return what it prints."""
    done = subprocess.run(words, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", "made", ".",
        cwd=source)
    (found,) = (source / "made").glob("lanspeed-*.whl")
    return found


def test_it_has_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*")
                     if path.is_file() and "__pycache__" not in path.parts}


def test_its_tools_work_from_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(site), str(wheel),
        cwd=elsewhere)
    variables = {"PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    code = "import master.run.run_folder as runs; print(runs.__file__)"
    assert run(sys.executable, "-c", code, cwd=elsewhere, **variables) == f"{site}/master/run/run_folder.py\n"
    run(sys.executable, "-m", "master.validate_ds_config", str(site / "trainer" / "ds_config.json"), cwd=elsewhere,
        **variables)
    assert "@@GPU_REPORT" in run("bash", str(site / "worker" / "detect_gpus.sh"), "--json", cwd=elsewhere)
    shown = run(sys.executable, "-m", "master.launch_training", "--model", "tiny", "--dry-run", "--slots", "2",
                cwd=elsewhere, **variables)
    assert f"{site}/trainer/train.py" in shown and f"{site}/trainer/configs/" in shown
    assert list(elsewhere.iterdir()) == []
