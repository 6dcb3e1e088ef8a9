"""Take a trained model elsewhere: a GGUF file, an Ollama Modelfile beside one, a whole model of an adapter, the hub.

    invoke export
    python trainer/export_model.py runs/20261124-020457-tiny/model --out tiny.gguf
    python trainer/export_model.py runs/20261124-020457-tiny/model --to ollama --out tiny.gguf --type q8_0
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.model.trained import TrainedModel


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser("export_model.py", "%(prog)s MODEL --out PATH [flags]", __doc__,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("model", metavar="MODEL", help="a model's folder, an adapter's, or a Hugging Face name")
    flag("--to", choices=("gguf", "ollama", "merged", "hub"), default="gguf", help="what it becomes (gguf)")
    flag("--out", type=Path, metavar="PATH", help="the GGUF file, or the folder of the merged model")
    flag("--type", help="of a GGUF file's numbers: f32, f16, bf16, q8_0, or one of llama-quantize's")
    flag("--name", help="what it is called: the model in its file, the repository of the hub")
    flag("--base", metavar="FOLDER", help="an adapter's base, where it isn't where the adapter says")
    flag("--plain", action="store_true", help="it continues texts; Ollama gets no chat template")
    flag("--check", action="store_true", help="read the GGUF file back and compare its logits")
    flag("--public", action="store_true", help="let everybody read it on the hub")
    flag("--yes", action="store_true", help="send it to the hub without a question")
    return parser


def export(options: argparse.Namespace) -> None:
    """Do it. Raises UserError, OSError."""
    if options.to == "hub":
        from trainer.export.hub_upload import upload

        print(upload(Path(options.model), options.name, options.public, options.yes))
        return
    if options.to == "merged":
        write_merged(whole(options), options.out)
        return
    check(options)
    from trainer.export.gguf_file import default_type, difference, write_gguf

    trained = whole(options)
    kind = options.type or default_type(trained.model)
    write_gguf(options.out, trained, options.name or options.out.stem, kind)
    tell(options, kind, trained)
    if options.check:
        print(difference(options.out, trained))


def check(options: argparse.Namespace) -> None:
    """Raise UserError for what can be known to be impossible before any weights, or libraries, are read."""
    from trainer.export.architecture import family_named
    from trainer.export.number_types import check_type
    from trainer.model.loading import base_of

    if options.type:
        check_type(options.type)
    folder = Path(options.model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
        folder = Path(options.base or base_of(folder))
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # told by whoever loads it
        return
    family_named(str(model_type))


def whole(options: argparse.Namespace) -> TrainedModel:
    """Return the model in its own precision, an adapter added to its base. Raises UserError."""
    import transformers

    from trainer.model.trained import TrainedModel, load_trained

    warnings.simplefilter("ignore")  # of libraries to each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    trained = load_trained(options.model, "cpu", options.base, dtype="auto")
    if not trained.has_adapter:
        return trained
    return TrainedModel(trained.model.merge_and_unload(), trained.tokenizer, has_adapter=False)


def write_merged(trained: TrainedModel, folder: Path) -> None:
    """Write a whole model as from_pretrained reads it; it is there whole or not at all."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        trained.model.save_pretrained(part)
        trained.tokenizer.save_pretrained(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(folder)


def tell(options: argparse.Namespace, kind: str, trained: TrainedModel) -> None:
    """Print what was written, and the command that uses it; write the Modelfile where one is wanted."""
    from trainer.estimate.memory import sized
    from trainer.export.architecture import notes

    path: Path = options.out
    print(f"{path}  {kind}, {sized(path.stat().st_size)}")
    for note in notes(trained.model.config):
        print(f"note: {note}", file=sys.stderr)
    if options.to == "ollama":
        write_modelfile(options, trained)
    else:
        print(f"to talk with it: llama-cli -m {path}", file=sys.stderr)


def write_modelfile(options: argparse.Namespace, trained: TrainedModel) -> None:
    """Write the Modelfile beside the GGUF file."""
    from trainer.checkpoint.verification import write_atomically
    from trainer.export.modelfile import modelfile
    from trainer.model.loading import position_limit
    from trainer.model.trained import ends_of_answer

    path, tokenizer = options.out, trained.tokenizer
    chats = bool(tokenizer.chat_template) and not options.plain
    text, has_template = modelfile(path.name, tokenizer, ends_of_answer(trained, chats), chats,
                                   position_limit(trained.model.config))
    place = path.with_name("Modelfile")
    write_atomically(place, text)
    print(place)
    if not has_template:
        print("note: Ollama has no form for this chat template: it takes the one in the GGUF file if it knows that",
              file=sys.stderr)
    name = options.name or path.stem
    print(f"to talk with it: ollama create {name} -f {place} && ollama run {name}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Export; return 0, 1 for a model that can't be read or written, 2 for wrong usage."""
    parser = build_parser()
    options: Any = parser.parse_args(argv)
    if options.to == "hub" and not options.name:
        parser.error("--to hub needs --name USER/NAME")
    if options.to != "hub" and not options.out:
        parser.error("--out PATH: where to?")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which saving imports, has a word on it
    os.environ.setdefault("TQDM_DISABLE", str(int(options.to != "hub")))  # the bars of transformers' GGUF reader
    try:
        export(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {options.out or options.model}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nnothing was written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
