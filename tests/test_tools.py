"""Every tool answers --help at once, from anywhere, without the libraries that take seconds; tasks are a menu."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_architecture import HEAVY, is_tool, name_of, sources

TOOLS = [path for path in sources("master", "worker", "trainer") if is_tool(path) and "argparse" in path.read_text()]


@pytest.mark.parametrize("tool", TOOLS, ids=name_of)
def test_help_is_told_from_any_folder(tool: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, tool, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {tool.name}")


@pytest.mark.parametrize("tool", TOOLS, ids=name_of)
def test_help_opens_with_an_example(tool: Path) -> None:
    shown = subprocess.run([sys.executable, tool, "--help"], capture_output=True, text=True).stdout
    before = shown[: shown.index("\noptions:") if "\noptions:" in shown else None]
    assert re.search(rf"^ +.*({tool.stem}|invoke|deepspeed)\b", before.partition("\n")[2], re.M), before


@pytest.mark.parametrize("words", [[str(tool), "--help"] for tool in TOOLS] + [["-m", "invoke", "--list"]], ids=str)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded or "invoke" in loaded
    assert not loaded & (HEAVY | {"rich", "numpy"})


@pytest.mark.parametrize("tool", TOOLS, ids=name_of)
def test_a_wrong_flag_is_exit_code_2_without_a_traceback(tool: Path) -> None:
    done = subprocess.run([sys.executable, tool, "--no-such-flag"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


PACKAGES = sorted({path.name for folder in ("master", "trainer") for path in (ROOT / folder).iterdir()
                   if (path / "__init__.py").exists()})


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool.parent.name in ("master", "trainer")], ids=name_of)
def test_a_tool_hides_no_installed_package(tool: Path, tmp_path: Path) -> None:
    for name in PACKAGES:  # of which some exist: `distributed` is dask's
        (tmp_path / f"{name}.py").write_text("")
    code = ("import importlib, runpy, sys\nsys.path[0], sys.argv = sys.argv[1].rpartition('/')[0], sys.argv[1:]\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit:\n    pass\n"
            f"print([importlib.import_module(name).__file__ for name in {PACKAGES}])")
    done = subprocess.run([sys.executable, "-c", code, str(tool), "--help"], capture_output=True, text=True, cwd="/",
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.stdout.splitlines()[-1] == str([str(tmp_path / f"{name}.py") for name in PACKAGES]), done.stderr


def invoke(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "invoke", *words], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("words", "to", "code"), [
    ("master/show_launch.py --hostfile {hosts}", "> /dev/full", 1), ("master/show_launch.py --hostfile {hosts}", "", 0),
    ("master/show_launch.py --hostfile {hosts}", ">&-", 0), ("master/validate_ds_config.py {config}", "> /dev/full", 1),
    ("master/validate_ds_config.py --json {config}", "| true", 0)])
def test_output_that_cannot_be_written_is_one_line(words: str, to: str, code: int, unbuffered: str,
                                                   tmp_path: Path) -> None:
    (tmp_path / "h").write_text("gpu1 slots=2\n")
    words = words.format(hosts=tmp_path / "h", config=ROOT / "trainer" / "ds_config.json")
    done = subprocess.run(["sh", "-c", f"{sys.executable} {words} {to}"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == code and "Traceback" not in done.stderr and "ignored" not in done.stderr, done.stderr
    assert done.stderr == ("error: No space left on device\n" if code else "")


def test_the_menu_is_complete_and_each_task_has_help() -> None:
    listed = invoke("--list").stdout
    for task in ("up", "setup-keys", "hostfile", "check", "sync", "validate", "detect", "train", "watch", "stop",
                 "demo", "test", "lint", "bench"):
        assert f"  {task} " in listed
        shown = invoke(task, "--help")
        assert shown.returncode == 0 and shown.stdout.lower().startswith("usage: inv"), shown.stderr


def test_a_task_hands_on_flags_as_they_were_quoted(tmp_path: Path) -> None:
    (tmp_path / "my notes").mkdir()
    (tmp_path / "my notes" / "a.txt").write_text("words")
    done = invoke("train", "--model", "tiny", "--dataset", str(tmp_path / "my notes"), "--dry-run", "--",
                  "--text_column", "the body")
    assert done.returncode == 0, done.stderr
    assert f"--dataset_path '{tmp_path / 'my notes'}'" in done.stdout
    assert "--text_column 'the body'" in done.stdout


def test_a_flag_takes_several_values_before_others(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("words")
    files = [f"{tmp_path}/a.txt:0.3", f"{tmp_path}/b.txt"]
    done = invoke("train", "--model", "tiny", "--dataset", *files, "--lora", "--lora_targets", "q_proj", "v_proj",
                  "--dry-run")
    assert f"--dataset_path {' '.join(files)} " in done.stdout, done.stderr
    assert "--lora --lora_targets q_proj v_proj" in done.stdout
    asked = invoke("hostfile", "--nodes", "one.invalid", "two.invalid")
    assert {"one.invalid", "two.invalid"} <= set((asked.stdout + asked.stderr).split())


@pytest.mark.parametrize("words", [["--ssh-password", "hunter2"], ["--ssh-password=hunter2"]])
def test_a_task_shows_no_password(words: list[str]) -> None:
    done = invoke("hostfile", "--nodes", "no-such-host.invalid", "--", *words)
    assert done.returncode == 1
    assert "hunter2" not in done.stdout + done.stderr and "***" in done.stderr


def test_a_task_shows_no_token() -> None:
    done = invoke("train", "--model", "tiny", "--dry-run", "--env", "HF_TOKEN=hunter2", "--env=A=hunter2")
    assert "hunter2" not in done.stdout + done.stderr and "HF_TOKEN=***" in done.stderr


def test_a_task_without_its_model_says_how() -> None:
    done = invoke("train")
    assert done.returncode == 2
    assert "which model? invoke train --model tiny" in done.stderr
