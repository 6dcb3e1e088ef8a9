"""Where documents come from: files and folders here, a dataset of the Hugging Face hub, or Python's own text."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data import documents
from trainer.data.documents import Document, text_of
from trainer.data.preferences import normalized_pair
from trainer.data.rows import PREFERENCES, TEXT, columns_of, form_of, normalized, settled_form
from trainer.data.values import table_row
from trainer.errors import UserError, first_line
from trainer.options import Options

END = 1 << 16  # bytes
NOT_COUNTED = 0  # of a note about a column, which concerns every row
EVAL_SPLITS = ("validation", "eval", "dev", "test")  # in which a hub's dataset holds out data, best first
BUILT_IN = "the documentation that comes with Python"


class DocumentExtractor:
    """Takes the document out of each row of a source: a column's text, or a conversation as JSON.

    Without `column` the first row decides by the names of its columns, where they are good for the `method`; all others
    must be of the same form. `renamed`: columns by the names that the data has for them. `notes` counts what was left
    out or replaced, by what it was.
    """

    def __init__(self, column: str | None = None, method: str | None = None, renamed: Mapping[str, str] | None = None
                 ) -> None:
        self.renamed = renamed or {}
        self.column, self.form, self.method = column or "text", TEXT if column else None, method
        self.notes: Counter[str] = Counter()

    def columns(self, names: Sequence[str], where: str) -> list[str]:
        """Return those of a table's columns that a document is made of; raise UserError if it has none such."""
        known = self._known({name: name for name in names})  # ours -> theirs
        form = self._settle(known, where)
        wanted = [self.column] if form == TEXT else list(columns_of(form))
        if wanted[0] not in known:
            text_of(dict.fromkeys(names), self.column, where)
        self._note_unused(known)
        return [known[name] for name in wanted if name in known]

    def __call__(self, row: Any, where: str) -> Document:
        """Return a row's document, '' for an empty one; raise UserError for a row of another shape."""
        row = self._known(row) if isinstance(row, dict) else row
        form = self._settle(row if isinstance(row, dict) else ["text"], where)
        if isinstance(row, dict):
            self._note_unused(row)
        if form == TEXT:
            text = text_of(row, self.column, where)
        elif not isinstance(row, dict) or form_of(row, "dpo" if form == PREFERENCES else "sft") != form:
            raise UserError(f"{where}: no {form}, which the rows before it have")
        elif form == PREFERENCES:
            text = normalized_pair(row, where)
        else:
            text = normalized(row, form, where, self.notes)
        return Document(self._encodable(text), where)

    def _known(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row under the names that are known here."""
        kept = {name: value for name, value in row.items() if name not in self.renamed}
        return kept | {ours: row[theirs] for theirs, ours in self.renamed.items() if theirs in row}

    def _settle(self, names: Iterable[str], where: str) -> str:
        if self.form is None:
            self.form = settled_form(names, self.column, self.method, where)
        return self.form

    def _note_unused(self, names: Iterable[str]) -> None:
        used = (self.column,) if self.form == TEXT else columns_of(str(self.form))
        for name in names:
            if name not in used:
                self.notes[f"column '{name}' isn't used"] = NOT_COUNTED

    def _encodable(self, text: str) -> str:
        """Return a text without halves of surrogate pairs (like the JSON "\\ud83d"), which no encoding can write."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.notes["half of a surrogate pair (\\ud83d...) replaced by U+FFFD"] += 1
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text


@dataclass
class Source:
    """Where documents come from: what to call it, a hash of its content, how to read them.

    `extract` knows their form once the first was read.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterable[Document]]
    extract: DocumentExtractor
    read_from: Callable[[int], Iterator[Document]] | None = None  # where passing over the first documents is cheaper

    def after(self, number: int) -> Iterator[Document]:
        """Return the documents after the first `number`."""
        return self.read_from(number) if self.read_from else itertools.islice(self.read(), number, None)


def looks_like_path(name: str) -> bool:
    """Tell a path from a Hugging Face name, which has at most one slash, no wildcard and no suffix of a data file."""
    wild = any(mark in name for mark in "*?[")
    if name.startswith((".", "/", "~")) or name.endswith("/"):
        return True
    return name.count("/") > 1 or wild or bool(documents.form_of(Path(name)))


def extractor_of(options: Options) -> DocumentExtractor:
    """Return what takes documents out of rows as the flags say."""
    return DocumentExtractor(options.text_column, options.method, options.columns)


def open_source(name: str | None, options: Options, built_in: Callable[[], list[str]], evaluation: bool = False
                ) -> Source:
    """Return the Source that --dataset_path or --eval_dataset names; raise a UserError if it isn't there."""
    extract = extractor_of(options)
    if name is None:
        texts = [Document(text, BUILT_IN) for text in built_in()]
        return Source(BUILT_IN, hashed([text.encode() for text in texts]), lambda: texts, DocumentExtractor("text"))
    path = Path(name).expanduser()
    if path.exists() or looks_like_path(name):
        files = documents.find_files(path)
        what = f"{path} ({documents.describe(files)})"
        fingerprint = ends_hash(files) if options.streaming else files_hash(files)
        return Source(what, fingerprint, lambda: documents.read_documents(files, extract), extract)
    if not evaluation:
        return hub_source(HubName(name, options.dataset_config, options.dataset_split), options, extract)
    trained = name in [part.name for part in options.datasets]
    config = options.eval_config or (options.dataset_config if trained else None)
    return hub_source(HubName(name, config, options.eval_split or eval_split(name, config)), options, extract)


@dataclass(frozen=True)
class HubName:
    """A dataset of the Hugging Face hub: its name, configuration and split."""

    name: str
    config: str | None
    split: str


def eval_split(name: str, config: str | None) -> str:
    """Return the split of a hub's dataset that is there to evaluate on. Raises UserError if it has none such."""
    import datasets

    try:
        found = datasets.get_dataset_split_names(name, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"--eval_dataset {name}: its splits can't be listed ({first_line(error)}): say which one: "
                        "--eval_split NAME") from None
    for split in EVAL_SPLITS:
        if split in found:
            return split
    raise UserError(f"--eval_dataset {name} has the splits {', '.join(map(str, found))}: say which one: "
                    "--eval_split NAME")


def hub_source(hub: HubName, options: Options, extract: DocumentExtractor) -> Source:
    """Return a Hugging Face dataset as a Source."""
    import datasets

    name, fingerprint = hub.name, None

    def load(place: str) -> Any:
        return datasets.load_dataset(place, hub.config, split=hub.split, streaming=options.streaming)

    try:
        try:
            table = load(name)
        except ConnectionError:  # a host without internet, where invoke sync has put the hub's files
            from huggingface_hub import snapshot_download

            folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
            table = load(folder)  # whose fingerprint has the path in it, which each host has its own
            if not options.streaming:
                files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
                fingerprint = hashed([files_hash(files).encode(), f"{hub.config} {hub.split}".encode()])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"dataset '{name}': no such file or folder here, and the hub has none: {reason}") from None
    where = f"dataset '{name}'"
    if not options.streaming:
        rows = table.select_columns(extract.columns(table.column_names, where))
        return Source(f"{name} ({hub.split})", fingerprint or table._fingerprint,
                      lambda: (extract(table_row(row), f"{where}, row {number}")
                               for number, row in enumerate(rows, 1)), extract)

    def read_from(start: int) -> Iterator[Document]:
        try:
            for number, row in enumerate(table.skip(start) if start else table, start + 1):
                yield extract(table_row(row), f"{where}, row {number}")
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"{where} can't be read any further: {error}: is the network down? "
                            "--resume_from_checkpoint auto resumes") from None

    fingerprint = fingerprint or hashed(str(part).encode() for part in (name, hub.config, hub.split))
    return Source(f"{name} ({hub.split})", fingerprint, lambda: read_from(0), extract, read_from)


def hashed(parts: Iterable[bytes]) -> str:
    """Return a hash of byte strings, each with its length, so that no two lists of them meet in one."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def ends_hash(files: list[Path]) -> str:
    """Return a hash of files' names, sizes and ends: to read all of them would take as long as to train."""
    def parts() -> Iterator[bytes]:
        for path in files:
            size = path.stat().st_size
            yield f"{path.name} {size}".encode()
            with path.open("rb") as file:
                yield file.read(END)
                file.seek(max(size - END, 0))
                yield file.read(END)

    return hashed(parts())


def files_hash(files: list[Path]) -> str:
    """Return a hash of files' contents, in order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
