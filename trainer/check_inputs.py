"""Check a training's flags, and what they name, in a second and without training: files, first rows, hub names.

    python trainer/check_inputs.py --model_name_or_path tiny --dataset_path notes/

With --elsewhere as its first word what isn't here is left to the hosts, which may have it. WORLD_SIZE has the number of
ranks, where that is known.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer import hub
from trainer.data import documents
from trainer.data.sources import extractor_of, looks_like_path
from trainer.errors import UserError, usage_error
from trainer.options import Options, parse_options
from trainer.split import allowed

ELSEWHERE = "--elsewhere"
MOST_BYTES = 100 << 20  # of a file whose first row is looked at: some forms are read whole for it
MODEL_FILES = ("config.json", "adapter_config.json", "params.json")  # one of which every model's folder has


def names_of(options: Options) -> Iterator[tuple[str, str, str]]:
    """Yield kind, flag and value of all that is read: models, datasets."""
    yield "model", "--model", options.model_name_or_path
    if options.adapter:
        yield "model", "--adapter", options.adapter
    for part in options.datasets:
        if part.name:
            yield "dataset", "--dataset", part.name
    if options.eval_dataset:
        yield "dataset", "--eval_dataset", options.eval_dataset


def check(options: Options, elsewhere: bool) -> None:
    """Raise a UserError for the first thing that no training can begin with."""
    if options.chat_template and not Path(options.chat_template).expanduser().is_file() and not elsewhere:
        raise usage_error(f"--chat_template {options.chat_template}: no such file")
    for kind, flag, name in names_of(options):
        path = Path(name).expanduser()
        if name == "tiny" and kind == "model":
            continue
        if path.exists() or (kind == "dataset" and looks_like_path(name) and not elsewhere):
            check_here(kind, flag, path, options)
        elif not elsewhere and (why := hub.why_not(kind, name)):
            raise usage_error(f"{flag} {name}: no such file or folder{similar(kind, name)}; {why}")
    if options.split_layers is not None and (ranks := int(os.environ.get("WORLD_SIZE", "0"))):
        allowed.check(options, ranks, allowed.config_of(options.model_name_or_path))


def check_here(kind: str, flag: str, path: Path, options: Options) -> None:
    """Raise a UserError for a folder that is no model, or data of which not even the first row can be read."""
    if kind == "model":
        if path.is_dir() and not any((path / name).exists() for name in MODEL_FILES):
            raise usage_error(f"{flag} {path}: no model in this folder: it has no {MODEL_FILES[0]}")
        return
    try:
        files = documents.find_files(path)
    except UserError as error:
        raise usage_error(f"{flag} {error}") from None
    try:
        if documents.form_of(files[0]) not in documents.TEXT_FORMS and files[0].stat().st_size < MOST_BYTES:
            next(iter(documents.read_documents(files[:1], extractor_of(options))), None)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None


def similar(kind: str, name: str) -> str:
    """Return what was perhaps meant: of what lies here, or the built-in model."""
    known = [*os.listdir(), *(["tiny"] if kind == "model" else [])]
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Check; return 0, 1 for data that can't be read, 2 for wrong usage, after saying what is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    elsewhere = words[:1] == [ELSEWHERE]
    try:
        check(parse_options(words[elsewhere:]), elsewhere)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
