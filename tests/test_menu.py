"""What a person types after `invoke` or `./lanspeed`: tasks, their words, spellings, mistakes, completion."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from programs import program

from master.core.run_cli import UsageError
from master.core.task_words import split_tasks, without_secrets
from master.core.tool_parser import ToolParser
from master.launch_training import build_parser as train_parser

BIN = Path(sys.executable).parent
TASKS = ("check", "sync", "test", "train", "watch")


def lanspeed(*words: str, cwd: Path = ROOT, tool: Path = ROOT / "lanspeed", **variables: str
             ) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LANSPEED_VENV": str(BIN.parent), **variables}
    return subprocess.run([str(tool), *words], cwd=cwd, capture_output=True, text=True, env=environment)


def parser() -> ToolParser:
    """One of a tool with flags of every kind."""
    made = ToolParser("tool.py", "Does things.", leading=("--model", "--dataset"))
    made.add_argument("--model")
    made.add_argument("--dataset", nargs="+", action="extend", default=[])
    made.add_argument("--max-hosts", type=int)
    made.add_argument("--yes", action="store_true")
    return made


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "expected"), [
    ("check --model x sync", [("check", ["--model", "x"]), ("sync", [])]),
    ("check --model sync", [("check", ["--model", "sync"])]),  # a value
    ("check --yes sync", [("check", ["--yes"]), ("sync", [])]),  # a flag without one
    ("check --unknown train", [("check", ["--unknown", "train"])]),
    ("train a b check", [("train", ["a", "b"]), ("check", [])])])
def test_each_task_gets_the_words_that_follow_it(words: str, expected: list[tuple[str, list[str]]]) -> None:
    assert split_tasks(words.split(), TASKS, lambda name: parser()) == expected


def test_a_folder_with_the_name_of_a_task_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").mkdir()
    assert split_tasks(["train", "--dataset", "a", "test"], TASKS, lambda name: parser()) == [
        ("train", ["--dataset", "a", "test"])]


def test_a_word_that_is_no_task_is_told_with_what_is_near() -> None:
    with pytest.raises(UsageError, match=r"no task trian: did you mean train\? \(invoke --list\)"):
        split_tasks(["trian", "--model", "x"], TASKS, lambda name: None)


@pytest.mark.parametrize(("words", "model", "dataset"), [
    ("tiny", "tiny", []), ("tiny a b --yes", "tiny", ["a", "b"]), ("--model tiny --dataset a", "tiny", ["a"]),
    ("--model_name_or_path tiny --dataset_path a b", "tiny", ["a", "b"]),
    ("--model-name-or-path=tiny", "tiny", [])])
def test_words_and_flags_say_the_same(words: str, model: str, dataset: list[str]) -> None:
    found = parser().parse_args(words.split())
    assert (found.model, found.dataset) == (model, dataset)


@pytest.mark.parametrize("flag", ["--max-hosts", "--max_hosts", "--max-hosts=3", "--max_hosts=3"])
def test_hyphens_and_underscores_are_the_same(flag: str) -> None:
    assert parser().parse_args([flag, *([] if "=" in flag else ["3"])]).max_hosts == 3


@pytest.mark.parametrize(("words", "message"), [
    (["--modle", "x"], "error: no flag --modle: did you mean --model? (tool.py --help)"),
    (["--max-hosts", "ten"], "error: --max-hosts: invalid int value: 'ten' (tool.py --help)"),
    (["--qqqq=hunter2"], "error: no flag --qqqq (tool.py --help)")])
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(words)
    assert stopped.value.code == 2 and capsys.readouterr().err == message + "\n"


def test_a_script_of_the_users_keeps_its_own_spellings() -> None:
    done = lanspeed("train", "--script", "lanspeed", "--dry-run", "--model_name_or_path", "x", "--max_steps", "3")
    assert f"{ROOT / 'lanspeed'} --model_name_or_path x --max_steps 3" in done.stdout, done.stderr


def test_trainer_flags_may_be_spelled_as_the_launchers() -> None:
    done = lanspeed("train", "tiny", "--dry-run", "--", "--max-steps", "3", "--resume", "nowhere")
    assert done.returncode == 0 and "--max-steps 3" in done.stdout, done.stderr


@pytest.mark.parametrize(("words", "shown"), [
    ("--ssh-password x --env A=b", "--ssh-password *** --env 'A=***'"), ("--ssh-pa=x", "--ssh-pa=***"),
    ("--env=A=b", "--env=A=***"), ("--env A", "--env A"), ("--ssh-password-file f", "--ssh-password-file f")])
def test_secrets_are_not_shown(words: str, shown: str) -> None:
    assert " ".join(without_secrets(words.split())) == shown.replace("'", "")


def test_trainings_parser_lists_no_other_name() -> None:
    assert "--model_name_or_path" not in train_parser().format_help()


# -- the menu ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--list",), ("-l",), ("help",), ("--help",)])
def test_the_menu_is_in_order_of_use_and_says_how_to_begin(words: tuple[str, ...]) -> None:
    shown = lanspeed(*words).stdout
    order = [shown.index(f"\n  {name} ") for name in ("up", "setup-keys", "hostfile", "sync", "check", "plan", "train",
                                                       "watch", "stop", "demo")]
    assert order == sorted(order) and "invoke train --model tiny" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_invoke_alone_shows_the_menu_too() -> None:
    done = subprocess.run([str(BIN / "invoke")], cwd=ROOT, capture_output=True, text=True)
    assert "prepare the hosts" in done.stdout and "--complete" not in done.stdout


def test_help_of_a_task_begins_with_examples() -> None:
    shown = lanspeed("check", "--help").stdout
    assert shown.startswith("usage: invoke check [flags]")
    assert shown.index("    invoke check --nodes") < shown.index("options:")
    assert shown == lanspeed("check", "-h").stdout == lanspeed("--help", "check").stdout
    assert lanspeed("--version").stdout.startswith("lanspeed 0.")


def test_a_mistyped_task_is_told_at_once() -> None:
    started = time.monotonic()
    done = lanspeed("chekc")
    assert done.returncode == 2 and done.stderr == "error: no task chekc: did you mean check? (invoke --list)\n"
    assert time.monotonic() - started < 5


# -- the launcher ------------------------------------------------------------------------------------------------------


def test_the_launcher_works_from_any_folder_and_through_links(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "lanspeed").symlink_to(ROOT / "lanspeed")
    (tmp_path / "again").symlink_to(tmp_path / "bin" / "lanspeed")
    (tmp_path / "invoke.py").write_text("raise SystemExit('another program')")  # what lies here hides nothing
    done = lanspeed("stop", "nope", cwd=tmp_path, tool=tmp_path / "again")
    assert done.returncode == 1 and "error: nope: no such run" in done.stderr


def test_without_an_environment_the_launcher_says_what_makes_one(tmp_path: Path) -> None:
    done = lanspeed("train", LANSPEED_VENV=str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stderr == (f"error: lanspeed is not installed in {tmp_path / 'none'}: make -C '{ROOT}' install\n")


def test_a_python_without_the_packages_is_named(tmp_path: Path) -> None:
    """An invoke of another environment, which finds tasks.py and not what the tools import."""
    code = ("import sys\nfrom importlib.machinery import PathFinder\n"
            "class Without(PathFinder):\n"
            "    @classmethod\n"
            "    def find_spec(cls, name, path=None, target=None):\n"
            "        if name.split('.')[0] in ('filelock', 'jsonschema', 'rich', 'trainer'):\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            "sys.meta_path.insert(0, Without)\n"
            "from invoke.main import program\nsys.argv = ['invoke', 'check']\nprogram.run()\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "lanspeed in place of invoke takes lanspeed's own Python" in done.stderr


# -- completion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("typed", "expected", "absent"), [
    (["lanspeed", "tr"], "train", "--model"), (["lanspeed", "check", "--n"], "--nodes", "train"),
    (["lanspeed", "train", "--max_"], "--max_steps", "check"), (["invoke", "hostfile", "--vendor", ""], "NVIDIA", "-"),
    (["lanspeed", "watch", ""], "runs/20260101-000000-tiny", "--once")])
def test_what_may_follow_is_listed(typed: list[str], expected: str, absent: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "20260101-000000-tiny").mkdir(parents=True)
    found = lanspeed("--complete", "--", *typed, cwd=tmp_path).stdout.split()
    assert expected in found and absent not in found


@pytest.mark.needs("bash", "zsh", "fish")
@pytest.mark.parametrize(("shell", "ask"), [
    ("bash", 'COMP_WORDS=(lanspeed che); COMP_CWORD=1; _lanspeed; echo "${COMPREPLY[@]}"'),
    ("fish", 'complete -C "lanspeed che"'),
    ("zsh", 'words=(lanspeed che); CURRENT=2; compadd() { echo "$@"; }; _lanspeed')])
def test_shells_take_the_script_and_complete(shell: str, ask: str, tmp_path: Path) -> None:
    (tmp_path / "lanspeed").symlink_to(ROOT / "lanspeed")
    script = lanspeed("completion", shell).stdout
    done = subprocess.run([program(shell), *(["-f"] if shell == "zsh" else []), "-c", f"{script}\n{ask}"],
                          capture_output=True, text=True, cwd=tmp_path, env={
                              **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path),
                              "LANSPEED_VENV": str(BIN.parent)})
    found = done.stdout.split()
    assert "check" in found, done.stdout + done.stderr
    assert shell == "zsh" or "train" not in found  # which leaves it to compadd


def test_another_shell_is_refused() -> None:
    done = lanspeed("completion", "csh")
    assert done.returncode == 2 and "bash, zsh, fish" in done.stderr
