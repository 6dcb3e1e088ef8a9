"""Where documents come from: files and folders here, a dataset of the Hugging Face hub, or Python's own text."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer import documents
from trainer.conversations import Taker
from trainer.fault import Fault

BUILT_IN = "the documentation that comes with Python"


@dataclass
class Source:
    """Where documents come from: what to call it, a hash of its content, how to read them.

    `take` knows their form once the first was read.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterable[str]]
    take: Taker


def looks_like_path(name: str) -> bool:
    """Tell a path from a Hugging Face name, which has at most one slash, no wildcard and no suffix of a data file."""
    wild = any(mark in name for mark in "*?[")
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or wild or bool(documents.form_of(Path(name)))


def open_source(name: str | None, options: argparse.Namespace, built_in: Callable[[], list[str]]) -> Source:
    """Return the Source that --dataset_path or --eval_dataset names; raise a Fault if it isn't there."""
    take = Taker(options.text_column)
    if name is None:
        texts = built_in()
        return Source(BUILT_IN, hashed([text.encode() for text in texts]), lambda: texts, Taker("text"))
    path = Path(name).expanduser()
    if path.exists() or looks_like_path(name):
        files = documents.find_files(path)
        what = f"{path} ({documents.describe(files)})"
        return Source(what, files_hash(files), lambda: documents.read_documents(files, take), take)
    return hub_source(name, options, take)


def hub_source(name: str, options: argparse.Namespace, take: Taker) -> Source:
    """Return a Hugging Face dataset as a Source."""
    import datasets

    def load(place: str) -> datasets.Dataset:
        return datasets.load_dataset(place, options.dataset_config, split=options.dataset_split)

    try:
        try:
            table, fingerprint = load(name), None
        except ConnectionError:  # a host without internet, where invoke sync has put the hub's files
            from huggingface_hub import snapshot_download

            folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
            table = load(folder)  # whose fingerprint has the path in it, which each host has its own
            fingerprint = files_hash(sorted(path for path in Path(folder).rglob("*") if path.is_file()))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Fault(f"dataset '{name}': neither a file or folder here nor to be had from the hub: {reason}") from None
    rows = table.select_columns(take.columns(table.column_names, f"dataset '{name}'"))
    return Source(f"{name} ({options.dataset_split})", fingerprint or table._fingerprint,
                  lambda: (take(row, f"dataset '{name}', row {number}") for number, row in enumerate(rows, 1)), take)


def hashed(parts: Iterable[bytes]) -> str:
    """Return a hash of byte strings, each with its length, so that no two lists of them meet in one."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def files_hash(files: list[Path]) -> str:
    """Return a hash of files' contents, in order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
