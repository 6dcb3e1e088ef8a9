"""Tell what is wrong with DeepSpeed configs before any host starts, in one line each, with how to fix it.

    invoke validate --config ds_config.json
    python master/validate_ds_config.py --hostfile hostfile.txt ds_config.json
    python master/validate_ds_config.py --fix old_config.json

error: it will be refused or fail, [parse] as DeepSpeed reads it, [init] as the engine is built, [step] at the first
step. warning: it is ignored, or can't mean what was meant. info: harmless. Exit: 0, 1 with errors, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.atomic_write import write_atomically
from master.core.run_cli import UsageError, run_cli
from master.core.terminal import confirm, print_lines, say
from master.core.tool_parser import ToolParser
from master.ds_config.json_text import Document, TextError
from master.ds_config.problem import LEVELS, PARSE, Problem, Target
from master.inventory.cluster_file import ClusterError, read_cluster
from master.inventory.gpu_report import ReportError, check_report
from master.inventory.hostfile import read_hostfile
from master.inventory.slot_selection import only_slots


@dataclass
class Verdict:
    """The findings of one file; `text` is None where it couldn't be read."""

    name: str
    text: str | None
    problems: list[Problem] = field(default_factory=list)
    lines: list[tuple[int, int]] = field(default_factory=list)

    def count(self, level: str) -> int:
        """Return how many findings have a level."""
        return sum(problem.level == level for problem in self.problems)


def build_parser() -> ToolParser:
    """Return the parser of the flags."""
    parser = ToolParser("validate_ds_config.py", __doc__)
    flag = parser.add_argument
    flag("files", nargs="*", metavar="FILE", help="configs; - or nothing reads one from standard input")
    flag("--config", action="append", default=[], metavar="FILE", help="the same as FILE")
    flag("--json", action="store_true", help="print what was found as JSON")
    flag("--strict", action="store_true", help="warnings count as errors")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--plain-deepspeed", action="store_true", help='no Trainer will read it: "auto" is an error')
    target.add_argument("--trainer", action="store_true",
                        help='the Hugging Face Trainer will read it (default: if something it fills is "auto")')
    flag("--hostfile", type=Path, metavar="H", help="these hosts will train: their slots, and cluster.json beside it")
    flag("--cluster", type=Path, metavar="C", help="the hosts of this cluster.json will train")
    flag("--world-size", type=int, metavar="N", help="so many ranks will train")
    flag("--fix", action="store_true", help="fix what has one safe fix: show the change, ask, write the file")
    flag("--yes", action="store_true", help="with --fix: don't ask")
    return parser


def find_target(options: argparse.Namespace) -> Target:
    """Return what the configs are for. Raises HostfileError, ClusterError, ValueError."""
    trainer = False if options.plain_deepspeed else True if options.trainer else None
    if options.world_size is not None and options.world_size < 1:
        raise UsageError(f"--world-size {options.world_size}: at least one rank trains")
    slots = read_hostfile(options.hostfile) if options.hostfile else []
    path = options.cluster or (options.hostfile.with_name("cluster.json") if options.hostfile else None)
    if options.cluster and not options.cluster.is_file():
        raise ClusterError(f"{options.cluster}: no such file: invoke hostfile --nodes ... writes one")
    hosts = [checked(host, path) for host in read_cluster(path)["hosts"]] if path else []
    if slots:
        use = {host.host: host.use for host in slots}
        hosts = [only_slots(host, use[host["name"]]) for host in hosts if host["name"] in use]
        ranks: int | None = sum(len(host.use) for host in slots)
    else:
        ranks = sum(len(host["report"].get("slots_use", [])) for host in hosts) or None
    return Target(trainer, world_size=options.world_size or ranks, hosts=tuple(hosts))


def checked(host: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a host of cluster.json whose report is one. Raises ClusterError."""
    try:
        check_report(host["report"])
    except ReportError as error:
        raise ClusterError(f"{path}: {host['name']}: {error}: delete it; it will be written again") from None
    return host


def look_at(name: str, target: Target) -> Verdict:
    """Read and check one config; a file that can't be read is a finding too."""
    from master.ds_config.checker import check

    shown = "stdin" if name == "-" else name
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        advice = "name a file that is there" if isinstance(error, FileNotFoundError) else "name a file that can be read"
        return Verdict(shown, None, [Problem("unreadable", "error", (), error.strerror or str(error), advice, PARSE)],
                       [(1, 1)])
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        return Verdict(shown, None, [Problem("not-json", "error", (), "not UTF-8", "save it as UTF-8", PARSE)],
                       [(line, 1)])
    try:
        document = Document(text)
    except TextError as error:
        line = text.count("\n", 0, error.at) + 1
        problem = Problem("not-json", "error", (), f"not JSON: {error}", "correct it", PARSE)
        return Verdict(shown, text, [problem], [(line, error.at - text.rfind("\n", 0, error.at))])
    problems = check(document, target)
    return Verdict(shown, text, problems, [document.line(document.place(problem.path)) for problem in problems])


def print_text(verdicts: Sequence[Verdict]) -> None:
    """Print a line for each finding, and the numbers."""
    for verdict in verdicts:
        for problem, (line, _) in zip(verdict.problems, verdict.lines, strict=True):
            print_lines(problem.line(verdict.name, line))
        if not verdict.problems:
            print_lines(f"{verdict.name}: ok")
    total = Counter({level: sum(verdict.count(level) for verdict in verdicts) for level in LEVELS})
    files = f"{len(verdicts)} file{'s' * (len(verdicts) > 1)}"
    numbers = ", ".join(f"{total[level]} {level}{'s' * (total[level] != 1)}" for level in ("error", "warning"))
    if sum(total.values()):
        print(f"{files}: {numbers}, {total['info']} info")


def print_json(verdicts: Sequence[Verdict]) -> None:
    """Print the findings for another program."""
    print(json.dumps([{"file": verdict.name, "problems": [
        {"level": problem.level, "code": problem.code, "path": problem.json_path, "line": line, "column": column,
         "message": problem.message, "fix": problem.how_to_fix, "phase": problem.phase or None,
         "fixable": problem.fix is not None}
        for problem, (line, column) in zip(verdict.problems, verdict.lines, strict=True)]}
                      for verdict in verdicts], indent=1))


def fixable(verdict: Verdict, target: Target) -> bool:
    """Return whether --fix would change a file."""
    from master.ds_config.fixes import apply_fixes

    if not verdict.text or not any(problem.fix for problem in verdict.problems):
        return False
    return bool(apply_fixes(verdict.text, target)[1])


def offer_fixes(verdict: Verdict, target: Target, ask: bool) -> Verdict:
    """Show what --fix would change in a file, ask, write it; return what is left."""
    from master.ds_config.fixes import apply_fixes

    try:
        text, done = apply_fixes(verdict.text or "", target)
    except TextError:
        done = []
    if not done or verdict.text is None:
        if verdict.count("error") or verdict.count("warning"):
            say(f"{verdict.name}: none of this has one safe fix: change it by hand, as each line says")
        return verdict
    change = difflib.unified_diff(verdict.text.splitlines(), text.splitlines(), verdict.name,
                                  f"{verdict.name} (fixed)", lineterm="")
    say(*change)
    path = Path(verdict.name)
    if not os.access(path, os.W_OK) or not path.stat().st_mode & 0o200:
        say(f"{verdict.name} is read-only: chmod u+w {verdict.name}")
        return verdict
    if ask and not confirm(f"write this to {verdict.name}?"):
        say(f"{verdict.name} is left as it was")
        return verdict
    try:
        if path.read_bytes() != verdict.text.encode():
            say(f"{verdict.name} was changed meanwhile, and is left as it is: once more")
            return verdict
        write_atomically(path, text)
    except OSError as error:
        say(f"{verdict.name} can't be written: {error.strerror}")
        return verdict
    say(f"{verdict.name}: {len(done)} fixed")
    return look_at(verdict.name, target)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` and check; return 0, 1 with errors, 2 on wrong usage."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: answer(options), "\nnothing was written")


def answer(options: argparse.Namespace) -> int:
    """Do what the flags say; return the exit code."""
    names = [*options.files, *options.config] or ["-"]
    if names == ["-"] and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("which config? invoke validate --config ds_config.json")
    if options.fix and "-" in names:
        raise UsageError("--fix writes files: name them")
    if options.fix and ( not options.yes and not sys.stdin.isatty()):
        raise UsageError("--fix asks on the terminal before it writes a file; --yes goes without")
    target = find_target(options)
    verdicts = [look_at(name, target) for name in names]
    if options.fix:
        verdicts = [offer_fixes(verdict, target, not options.yes) for verdict in verdicts]
    (print_json if options.json else print_text)(verdicts)
    sys.stdout.flush()
    if not (options.fix or options.json) and any(fixable(verdict, target) for verdict in verdicts):
        say("--fix fixes some of it: invoke validate --fix " + shlex.join(names))
    levels = ("error", "warning") if options.strict else ("error",)
    return int(any(verdict.count(level) for verdict in verdicts for level in levels))


if __name__ == "__main__":
    raise SystemExit(main())
