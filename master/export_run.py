"""Take what was trained elsewhere: a GGUF file for llama.cpp, Ollama, a merged folder for others, the Hugging Face hub.

    invoke export
    invoke export runs/20261124-020457-tiny --to ollama --type q8_0
    python master/export_run.py --to hub --name me/my-model

Without a run it is the newest one that has a model. An adapter is added to its base; the hub gets it as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.run_cli import UsageError, run_cli
from master.core.terminal import say
from master.core.tool_parser import ToolParser
from master.run.trained_model import TEXT, find_model, form_of, run_on_model
from trainer.flags.run_names import INSIDE, short_name

FORMS = ("gguf", "ollama", "merged", "hub")


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("export_run.py", __doc__)
    flag = parser.add_argument
    parser.word_or_flag("run", "RUN", "run folder or name, or a model's folder (default: the newest run with a model)")
    flag("--to", choices=FORMS, default="gguf",
         help="gguf: RUN/NAME.gguf; ollama: with a Modelfile beside it; merged: RUN/merged, for from_pretrained; hub")
    flag("--type", metavar="TYPE", help="of a GGUF file's numbers: f32, f16, bf16, q8_0, or, where llama-quantize is "
                                        "installed, one of its own like q4_k_m (default: bf16 of a bf16 model, else "
                                        "f16)")
    flag("--name", metavar="NAME", help="what it is called there; for the hub USER/NAME")
    flag("--base", metavar="FOLDER", help="an adapter's base, where it isn't where the adapter says")
    flag("--check", action="store_true", help="read the GGUF file back by transformers and compare its logits")
    flag("--public", action="store_true", help="let everybody read it on the hub (private)")
    flag("--yes", action="store_true", help="send it to the hub without a question")
    return parser


def words_of(model: Path, options: argparse.Namespace) -> list[str]:
    """Return the trainer's command line for an export. Raises UsageError."""
    words = [str(model), "--to", options.to]
    name = options.name or short_name(str(model))
    if options.to == "hub":
        if options.type or options.check:
            raise UsageError("--type and --check are for GGUF files")
        words += ["--name", name]
    elif options.public or options.yes:
        raise UsageError("--public and --yes go with --to hub")
    else:
        if "/" in name or name.startswith("."):
            raise UsageError(f"--name {name}: a file's name is needed")
        place = model.parent if model.name in INSIDE and model.parent.name else Path()
        kind = f"-{options.type.lower()}" if options.type else ""
        words += ["--name", name, "--out", str(place / ("merged" if options.to == "merged" else f"{name}{kind}.gguf"))]
    if form_of(model) == TEXT:
        words.append("--plain")
    words += [word for flag in ("type", "base") if (value := getattr(options, flag)) for word in (
        f"--{flag}", value.lower() if flag == "type" else value)]
    return words + [f"--{flag}" for flag in ("check", "public", "yes") if getattr(options, flag)]


def export(options: argparse.Namespace) -> int:
    """Start the export and return its exit code."""
    model = find_model(options.run)
    words = words_of(model, options)
    say(f"taking {model}")
    return run_on_model("export_model.py", words)


def main(argv: Sequence[str] | None = None) -> int:
    """Export; return 0, 1 for a model that can't be read or written, 2 for wrong usage."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: export(options))


if __name__ == "__main__":
    raise SystemExit(main())
