"""Talk with what was trained: the newest run that has a model, or the one that is named.

    invoke chat
    invoke chat runs/20261124-020457-tiny --compare
    python master/chat_with_run.py --prompt "What is a pump?"

A run of conversations answers by its chat template, one of texts continues yours. Ctrl-C ends an answer, Ctrl-D the
chat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.run_cli import UserError, run_cli
from master.core.terminal import say
from master.core.tool_parser import ToolParser
from master.run.trained_model import TEXT, find_model, form_of, record_of, run_on_model

OWN = ("run", "compare", "plain")  # flags that aren't passed on as they are


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("chat_with_run.py", __doc__)
    flag = parser.add_argument
    parser.word_or_flag("run", "RUN", "run folder or name, or a model's folder (default: the newest run with a model)")
    flag("--compare", action="store_true", help="let the base model answer too, before the trained one")
    flag("--prompt", metavar="TEXT", help="answer this and end; - reads it from standard input")
    flag("--plain", action="store_true", help="continue the text, whatever template the model has")
    flag("--base", metavar="FOLDER", help="an adapter's base, where it isn't where the adapter says")
    flag("--system", metavar="TEXT", help="what the conversation begins with, as the system's message")
    flag("--max-new-tokens", metavar="N", help="tokens of an answer at most (512)")
    flag("--temperature", metavar="T", help="0: always the likeliest token (0.7)")
    flag("--top-p", metavar="P", help="choose among the likeliest tokens of this share (0.95)")
    flag("--seed", metavar="S", help="make answers repeatable")
    return parser


def words_of(model: Path, options: argparse.Namespace) -> list[str]:
    """Return the trainer's command line for a chat. Raises UserError."""
    words = [str(model)]
    if options.plain or form_of(model) == TEXT:
        words.append("--plain")
    if options.compare and (model / "adapter_config.json").exists():
        words.append("--compare")
    elif options.compare:
        base = record_of(model).get("model")
        if not isinstance(base, str) or base == "tiny":
            raise UserError(f"{model}: --compare needs a base, and this one was made from scratch" if base else
                            f"{model} doesn't say what it was trained from: python trainer/chat_with_model.py {model} "
                            "--compare-with MODEL")
        words += ["--compare-with", base]
    given = {name: value for name, value in vars(options).items() if name not in OWN and value is not None}
    return words + [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]


def chat(options: argparse.Namespace) -> int:
    """Start the chat and return its exit code."""
    model = find_model(options.run)
    say(f"loading {model}")
    return run_on_model("chat_with_model.py", words_of(model, options))


def main(argv: Sequence[str] | None = None) -> int:
    """Chat; return 0, 1 for a model that isn't there or can't be loaded, 2 for wrong usage."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: chat(options))


if __name__ == "__main__":
    raise SystemExit(main())
