"""The menu: one task per tool, in the order of use. `invoke --list` shows it, `invoke TASK --help` a task's flags.

    invoke train --model tiny

What follows a task's name goes to its tool as it is, which has a parser of its own; `./lanspeed` is the same from any
folder.
"""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from invoke import Context, Exit, Task, task
from invoke.main import program

from master.core import completion
from master.core.run_cli import UsageError
from master.core.task_words import split_tasks, without_secrets
from master.core.terminal import say
from master.core.tool_parser import ToolParser

ROOT = Path(__file__).resolve().parent
GROUPS = {"prepare the hosts": ("up", "setup-keys", "hostfile", "sync", "check"),
          "decide": ("plan", "validate", "detect"),
          "train": ("train", "watch", "stop", "runs", "report", "chat", "export", "drill"),
          "this project": ("demo", "test", "lint", "bench", "completion", "help")}


def run_tool(tool: str, argv: Sequence[str], name: str = "") -> None:
    """Run a tool in this process, after showing the command that it stands for."""
    print("$", shlex.join(without_secrets(["python", f"master/{tool}.py", *argv])), file=sys.stderr)
    ToolParser.typed_as = f"invoke {name}" if name else ""
    code = load(tool).main(list(argv))
    if code:
        raise Exit(code=code)


def load(tool: str) -> Any:
    """Return a tool's module. Raises Exit where what it needs isn't installed in this Python."""
    try:
        return importlib.import_module(f"master.{tool}")
    except ModuleNotFoundError as error:
        raise Exit(f"error: {error.name} is missing in {sys.executable}: {ROOT / 'lanspeed'} in place of invoke takes "
                   f"lanspeed's own Python; make -C {ROOT} install makes it", code=1) from None


class WordsTask(Task):
    """A task that is given the words after its name as they are."""

    def __init__(self, name: str, summary: str, act: Callable[[list[str]], None]) -> None:
        self.words: list[str] = []

        def body(c: Context) -> None:
            act(self.words)

        body.__name__, body.__doc__ = name.replace("-", "_"), summary
        super().__init__(body, name=name, auto_shortflags=False)

    def parser(self) -> ToolParser | None:
        """Return the parser of the words, None if there is none."""
        return None


class ToolTask(WordsTask):
    """A task that passes its words on to a tool in master/; `default`: the words when none are given; `takes_run`: one
    of them is a run folder."""

    def __init__(self, name: str, tool: str, summary: str, default: Sequence[str] = (), takes_run: bool = False
                 ) -> None:
        self.tool, self.takes_run = tool, takes_run
        super().__init__(name, summary, lambda words: run_tool(tool, words or default, name))

    def parser(self) -> ToolParser | None:
        """Return the tool's parser."""
        ToolParser.typed_as = f"invoke {self.name}"
        parser: ToolParser = load(self.tool).build_parser()
        return parser


up = ToolTask("up", "prepare_cluster", "Make a cluster of hosts: do what is missing, step by step, and ask little.")
setup_keys = ToolTask("setup-keys", "setup_keys", "Set up key login on every host, instead of a password.")
hostfile = ToolTask("hostfile", "generate_hostfile", "Find the GPUs of all hosts and write hostfile.txt.")
sync = ToolTask("sync", "sync_nodes", "Copy code, Python environment, model and data to every host.")
check = ToolTask("check", "check_cluster", "Check that every host is ready and consistent.")
plan = ToolTask("plan", "plan_ds_config", "What a training needs, how fast it is, and whether another machine helps.")
validate = ToolTask("validate", "validate_ds_config", "Find and fix problems in a DeepSpeed config.",
                    default=[str(ROOT / "trainer" / "ds_config.json")])
train = ToolTask("train", "launch_training", "Train on this machine, or on the hosts of a hostfile.")
watch = ToolTask("watch", "watch_training", "Follow a run: progress, speed, and each host's GPUs, memory and network.",
                 takes_run=True)
stop = ToolTask("stop", "stop_training", "Stop a run; its ranks save a checkpoint first.", takes_run=True)
chat = ToolTask("chat", "chat_with_run", "Talk with what was trained, or with its base beside it.", takes_run=True)
export = ToolTask("export", "export_run", "Take what was trained elsewhere: GGUF, Ollama, a merged folder, the hub.",
                  takes_run=True)
report = ToolTask("report", "write_report", "Write a run, or several beside each other, as one HTML page.",
                  takes_run=True)
runs = ToolTask("runs", "list_runs", "List the runs of this folder: status, losses, speed.")
drill = ToolTask("drill", "drill_cluster", "Try what a training survives on your hosts: kill, break, stop, resume.")


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
        c.run(f"{shlex.quote(str(tools / 'shellcheck'))} lanspeed worker/*.sh master/*.sh .ci/run")
        # Left out: XML (entities are refused), paramiko's exec (callers quote), the hub (its revision is the user's),
        # addresses of other kinds than http (there are none).
        c.run(f"{shlex.quote(str(tools / 'bandit'))} --quiet -r master worker trainer tasks.py --severity-level medium "
              "--skip B310,B314,B601,B615")
        c.run(f"{shlex.quote(str(tools / 'vermin'))} --quiet --no-tips -t=3.8- worker/*.py")


def print_completion(words: Sequence[str]) -> None:
    """Print the script for the shell that is named, or for this user's."""
    shell = words[0] if words else os.path.basename(os.environ.get("SHELL", "bash"))
    if shell not in completion.SCRIPTS:
        raise Exit(f"error: completion for {', '.join(completion.SCRIPTS)}; not for {shell}", code=2)
    print(completion.SCRIPTS[shell])


complete_in_shell = WordsTask("completion", "Print the script that completes tasks and flags in bash, zsh or fish.",
                              print_completion)


@task(name="help", default=True, auto_shortflags=False)
def show_menu(c: Context) -> None:
    """Show this menu."""
    print("lanspeed trains a language model on several machines. The tasks, in the order of use:")
    for group, names in GROUPS.items():
        print(f"\n{group}")
        for name in names:
            print(f"  {name:<11} {(TASKS[name].__doc__ or '').splitlines()[0]}")
    print("\nBegin with one of these; every task explains itself with --help:")
    print("  invoke train --model tiny                trains a small model here, in a minute")
    print("  invoke up --nodes gpu1,gpu2              makes a cluster of machines that you reach by SSH")


TASKS: dict[str, Task] = {value.name: value for value in vars().values() if isinstance(value, Task)}


def after_dashes() -> list[str]:
    """Return what was typed after --, word by word (invoke joins it to one string and loses the quoting)."""
    words = program.argv
    return words[words.index("--") + 1 :] if "--" in words else []


def parser_of(name: str) -> ToolParser | None:
    """Return the parser of a tool's task, None for another task."""
    found = TASKS[name]
    return found.parser() if isinstance(found, WordsTask) else None


def take_words() -> None:
    """Answer what invoke would answer in another way, and give each tool's task its own words, which invoke's parser
    then doesn't see. It runs while invoke loads this file, before it looks at what follows a task's name."""
    given = program.args
    if given.complete.value:
        complete(after_dashes())
        raise Exit
    if given.help.value in TASKS:  # --help TASK is TASK --help
        program.core.unparsed[:] = [given.help.value, "--help"]
        given.help.set_value(None, cast=False)
    if given.list.value is True and given["list-format"].value == "flat":
        program.core.unparsed[:] = ["help"]
        given.list.set_value(False, cast=False)
    found = split_tasks(program.core.unparsed, TASKS, parser_of)
    program.core.unparsed[:] = [word for name, words in found for word in (
        [name] if isinstance(TASKS[name], WordsTask) else [name, *words])]
    for name, words in found:
        if isinstance(own := TASKS[name], WordsTask):
            own.words = words
    if found and isinstance(last := TASKS[found[-1][0]], ToolTask) and "--" in program.argv:
        last.words = [*last.words, *(["--"] if last.name == "train" else []), *after_dashes()]


def complete(words: Sequence[str]) -> None:
    """Print what may stand in the place of the last of these words, which begin with the program's name."""
    if len(words) < 3 or words[1] not in TASKS:
        print("\n".join(TASKS) if len(words) < 3 else "")
        return
    name, own = words[1], TASKS[words[1]]
    more: list[str] = []
    if name == "train":
        from trainer.flags.parser import build_parser

        more = [flag for flag in build_parser()._option_string_actions if flag.startswith("--")]
    print("\n".join(completion.candidates(words[2:], name, parser_of(name), more, getattr(own, "takes_run", False))))


if getattr(program, "core", None) and program.argv:
    try:
        take_words()
    except UsageError as error:
        say(f"error: {error}")
        raise Exit(code=2) from None
