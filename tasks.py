"""The menu: one short task per tool. `invoke --list` shows them, `invoke TASK --help` a task's flags.

A task has exactly the flags of its tool, read from the tool's own parser when the task is typed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from invoke import Context, Exit, Task, task
from invoke.parser import Argument

ROOT = Path(__file__).resolve().parent


def run_tool(tool: str, argv: Sequence[str]) -> None:
    """Run a tool in this process, after showing the command that it stands for."""
    shown = ["python", f"master/{tool}.py", *argv]
    for number, word in enumerate(shown):  # a password must not be shown
        flag, equals, _ = word.partition("=")
        if is_password(shown[number - 1]) and not word.startswith("-"):
            shown[number] = "***"
        elif equals and is_password(flag):
            shown[number] = f"{flag}=***"
        elif shown[number - 1] == "--env" or word.startswith("--env="):  # nor a token
            name, equals, _ = word.removeprefix("--env=").partition("=")
            shown[number] = word[: word.startswith("--env=") * 6] + name + (equals and "=***")
    print("$", shlex.join(shown), file=sys.stderr)
    code = importlib.import_module(f"master.{tool}").main(list(argv))
    if code:
        raise Exit(code=code)


def is_password(flag: str) -> bool:
    """Return whether a flag's value is a password, however it is mistyped."""
    return flag.replace("_", "-").startswith("--ssh-pa") and not flag.replace("_", "-").startswith("--ssh-password-")


def after_dashes() -> list[str]:
    """Return what the user wrote after --, word by word (invoke joins it to one string and loses the quoting)."""
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []


class ToolTask(Task):
    """A task that passes its flags on to a tool in master/.

    `word`: the name of the tool's positional argument as a flag of the task, since invoke has no optional positional
    arguments; `default`: its value when none is given; `passes_on`: flags that the tool doesn't know are the trainer's.
    """

    def __init__(self, name: str, tool: str, summary: str, word: str = "", default: str = "",
                 passes_on: bool = False) -> None:
        self.tool, self.word, self.default, self.passes_on = tool, word, default, passes_on

        def body(c: Context, **given: Any) -> None:
            run_tool(tool, self.argv(given))

        body.__name__, body.__doc__ = name.replace("-", "_"), summary
        super().__init__(body, name=name, positional=(), auto_shortflags=False)

    def actions(self) -> dict[str, argparse.Action]:
        """Return the tool's flags by their name without dashes."""
        parser = importlib.import_module(f"master.{self.tool}").build_parser()
        return {action.option_strings[-1].lstrip("-"): action for action in parser._actions
                if action.option_strings and action.dest != "help"}

    def get_arguments(self, ignore_unknown_help: bool | None = None) -> list[Argument]:
        """Return the arguments for invoke's parser; none, and no tool is loaded, if the task wasn't typed."""
        if self.name not in sys.argv:
            return []
        actions = self.actions()
        typed = self.typed(actions)
        if self.passes_on or not self.word:
            with_dashes(typed, actions, self.passes_on)
        found = [Argument(name=name, attr_name=name.replace("-", "_") if "-" in name else None, help=action.help,
                          kind=bool if action.nargs == 0 else list if is_list(action) else str,
                          optional=action.nargs == "?", default=[] if is_list(action) else None)
                 for name, action in actions.items()]
        if self.word:
            has_word = any(not word.startswith("-") and not takes_value(before, actions)
                           for before, word in zip([self.name, *typed], typed, strict=False))
            text = f"the same as {self.word.upper()}"
            found.append(Argument(name=self.word, kind=str, positional=has_word, help=text))
        return found

    def typed(self, actions: dict[str, argparse.Action]) -> list[str]:
        """Return the words of this task on the command line: up to -- or the next task."""
        words = sys.argv[sys.argv.index(self.name) + 1 :]
        words = words[: words.index("--")] if "--" in words else words
        for number, word in enumerate(words):
            if word in TASKS and not takes_value(words[number - 1] if number else "", actions):
                return words[:number]
        return words

    def argv(self, given: dict[str, Any]) -> list[str]:
        """Return the tool's command line for what invoke has parsed."""
        words: list[str] = []
        for name, value in given.items():
            flag = f"--{name.replace('_', '-')}"
            if name == self.word:
                words = [*([value or self.default] if value or self.default else []), *words]
            elif isinstance(value, list):
                words += [word for each in value for word in (flag, each)]
            elif value is not None and value is not False:
                words += [flag] if value is True else [flag, str(value)]
        rest = after_dashes()
        return [*words, "--", *rest] if self.passes_on and rest else [*words, *rest]


def is_list(action: argparse.Action | None) -> bool:
    """Return True for a flag that takes several values, or may be given several times."""
    return (action is not None and action.nargs in ("+", "*")) or isinstance(action, argparse._AppendAction)


def takes_value(word: str, actions: dict[str, argparse.Action]) -> bool:
    """Return True if the word after this one is its value."""
    action = actions.get(word.removeprefix("--").replace("_", "-"))
    return word.startswith("--") and "=" not in word and (action is None or action.nargs != 0)


def with_dashes(typed: list[str], actions: dict[str, argparse.Action], passes_on: bool) -> None:
    """Run the same command again as invoke takes it: --flag a b as --flag a --flag b, and the trainer's flags after --,
    where it leaves them alone."""
    own: list[str] = []
    others: list[str] = []
    target = own
    for word in typed:
        if word.startswith("-"):
            name = word.partition("=")[0].removeprefix("--").replace("_", "-")
            target = own if name in (*actions, "help", "-h") or not passes_on else others
        elif target is own and own[1:] and not own[-1].startswith("-") and own[-2].startswith("--") and is_list(
                actions.get(own[-2].removeprefix("--").replace("_", "-"))):
            own.append(own[-2])
        target.append(word)
    if own + others != typed:
        before = sys.argv[: len(sys.argv) - len(typed) - (len(after_dashes()) + 1 if "--" in sys.argv else 0)]
        rest = [*others, *after_dashes()]
        words = [*before[1:], *own, *(["--", *rest] if rest else [])]
        os.execv(sys.executable, [sys.executable, "-m", "invoke", *words])  # noqa: S606, the same program again


train = ToolTask("train", "launch_training", "Train on this machine, or on the hosts of a hostfile.", passes_on=True)
watch = ToolTask("watch", "watch_training", "Follow a run: progress, speed, and each host's GPUs, memory and network.",
                 word="run")
stop = ToolTask("stop", "stop_training", "Stop a run; its ranks save a checkpoint first.", word="run")
setup_keys = ToolTask("setup-keys", "setup_keys", "Set up key login on every node, instead of a password.")
hostfile = ToolTask("hostfile", "generate_hostfile", "Find the GPUs of all hosts and write hostfile.txt.")
check = ToolTask("check", "check_cluster", "Check that every node is ready and consistent.")
sync = ToolTask("sync", "sync_nodes", "Copy code, Python environment, model and data to every node.")
plan = ToolTask("plan", "plan_ds_config", "What a training needs, how fast it is, and whether another machine helps.")
drill = ToolTask("drill", "drill_cluster", "Try what a training survives on your hosts: kill, break, stop, resume.")
validate = ToolTask("validate", "validate_ds_config", "Find and fix problems in a DeepSpeed config.",
                    word="config", default=str(ROOT / "trainer" / "ds_config.json"))


@task(auto_shortflags=False, help={"json": "the report as the one line that other tools read"})
def detect(c: Context, json=False):  # type: ignore[no-untyped-def]
    """Show this machine's GPUs, what is wrong with them and how to fix it."""
    script = [str(ROOT / "worker" / "detect_gpus.sh"), "--json" if json else "--table"]
    print("$", shlex.join(["bash", *script]), file=sys.stderr, flush=True)
    raise Exit(code=subprocess.run(["bash", *script]).returncode)


@task(auto_shortflags=False)
def demo(c: Context) -> None:
    """Train a tiny model on Python's documentation, for a minute or two, and show what it learned."""
    slots = ["--slots", str(min(2, len(os.sched_getaffinity(0))))] if not os.path.exists("/dev/nvidiactl") else []
    settings = ["--max_steps", "550", "--sequence_length", "128", "--per_device_train_batch_size", "8",
                "--logging_steps", "25", "--eval_max_sequences", "1000"]
    run_tool("launch_training", ["--model", "tiny", *slots, *settings, *after_dashes()])


@task(auto_shortflags=False, help={"all": "all of them: the slow ones and those that need root or other programs too"})
def test(c: Context, all=False):  # type: ignore[no-untyped-def]
    """Run the tests, on all cores; flags of pytest follow --."""
    cores = ["-n", str(min(len(os.sched_getaffinity(0)), 8)), "--dist", "worksteal"]
    words = [sys.executable, "-m", "pytest", *cores, *(["--all"] if all else []), *after_dashes()]
    with c.cd(ROOT):
        done = c.run(shlex.join(words), pty=sys.stdout.isatty(), warn=True)
    if not done or done.exited:
        raise Exit(code=done.exited if done else 1)


@task(auto_shortflags=False, help={"gpu": "the one of a GPU's speed, alone"})
def bench(c: Context, gpu=False):  # type: ignore[no-untyped-def]
    """Run the benchmarks: each prints ratios against a named peer."""
    on_gpu = ROOT / "benchmarks" / "gpu.py"
    with c.cd(ROOT):
        for path in [on_gpu] if gpu else sorted({*(ROOT / "benchmarks").glob("*.py")} - {on_gpu}):
            print(f"\n{path.name}", flush=True)
            c.run(shlex.join([sys.executable, str(path)]))


@task(auto_shortflags=False)
def lint(c: Context) -> None:
    """Check style and types."""
    with c.cd(ROOT):
        c.run(f"{shlex.quote(sys.executable)} -m ruff check .")
        c.run(f"{shlex.quote(sys.executable)} -m mypy")
        tools = Path(sys.executable).parent
        c.run(f"{shlex.quote(str(tools / 'shellcheck'))} worker/*.sh master/*.sh .ci/run")
        # Left out: XML (entities are refused), paramiko's exec (callers quote), the hub (its revision is the user's).
        c.run(f"{shlex.quote(str(tools / 'bandit'))} --quiet -r master worker trainer tasks.py --severity-level medium "
              "--skip B314,B601,B615")
        c.run(f"{shlex.quote(str(tools / 'vermin'))} --quiet --no-tips -t=3.8- worker/*.py")


TASKS = {value.name for value in vars().values() if isinstance(value, Task)}
