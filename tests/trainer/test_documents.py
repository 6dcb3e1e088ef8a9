"""Documents out of every form of file, and a file and line for every fault."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from trainer.data.documents import describe, find_files, read_documents
from trainer.data.sources import DocumentExtractor
from trainer.errors import UserError

ROWS: list[dict[str, object]] = [
    {"text": "first\nwith two lines"}, {"text": ""}, {"text": None}, {"text": 'say "ü", twice'}]
EXPECTED = ["first\nwith two lines", "", "", 'say "ü", twice']


def write_parquet(path: Path, rows: list[dict[str, object]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, column: str | None = None) -> list[str]:
    return list(read_documents(find_files(path), DocumentExtractor(column)))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_each_form_gives_the_same_documents(form: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / f"data.{form}"
    if form == "parquet":
        write_parquet(path, ROWS)
    elif form == "csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, ["text"]).writerows([{"text": "text"}, *ROWS])
    else:
        write(path, json.dumps(ROWS) if form == "json" else "\n\n".join(map(json.dumps, ROWS)))
    if packed:
        path = write(path.with_name(path.name + ".gz"), gzip.compress(path.read_bytes()))
    assert read(path) == EXPECTED


def test_json_may_hold_an_object_a_line_or_strings(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n')) == ["a", "b"]
    assert read(write(tmp_path / "b.json", '["a", "b"]')) == ["a", "b"]
    assert read(write(tmp_path / "c.jsonl", '"a"\n"b"')) == ["a", "b"]


def test_a_folder_is_searched_and_told_by_form(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.md", "deep/c.txt", ".git/d.txt", "picture.png"):
        write(tmp_path / name, f"\ufeffin {name}")
    files = find_files(tmp_path)
    assert describe(files) == "1 .md file, 2 .txt files"
    assert list(read_documents(files, DocumentExtractor())) == ["in a.md", "in b.txt", "in deep/c.txt"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl:2: not JSON: Expecting value"),
    ("a.jsonl", '{"text": "a"}\n\n[1]\n', "a.jsonl:3: a row is an object or a string, not a list"),
    ("a.jsonl", '{"body": "a", "id": 1}', "a.jsonl:1: no column 'text'; it has body, id. Choose one: --text_"),
    ("a.jsonl", '{"text": 7}', "a.jsonl:1: column 'text' holds a int, not text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl:2: not UTF-8"),
    ("a.json", '[{"text": "a"},\n {"text": oops}]', "a.json:2: not JSON"),
    ("a.json", '[{"text": "a"}, 5]', "a.json: row 2: a row is an object"),
    ("a.csv", "text,id\nhello,1\nhello\n", "a.csv:3: not 2 fields as in line 1"),
    ("a.csv", "text,id\nhello,1\na,b,c\n", "a.csv:3: not 2 fields as in line 1"),
    ("a.csv", 'text\nfine\n"open\n', "a.csv:3: not CSV: unexpected end of data"),
    ("a.csv", 'text\nfine\n"a"b\n', "a.csv:3: not CSV"),
    ("a.csv", "body\nhello\n", "no column 'text'; it has body"),
    ("a.csv", b"text\nfine\n\xff\xfe\n", "not UTF-8"),
    ("a.txt", b"one\ntwo\n\xc3\x28\n", "a.txt:3: not UTF-8"),
    ("a.txt.gz", b"this is no gzip file", "a.txt.gz: cannot be read"),
    ("a.txt.gz", gzip.compress(bytes(range(256)), mtime=0)[:100], "a.txt.gz: cannot be read"),
    ("a.parquet", b"PAR1 but not really", "a.parquet: not readable as Parquet"),
    ("a.pdf", b"%PDF", "a.pdf: no known form"),
])
def test_a_fault_names_file_and_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert message in str(caught.value)


def test_a_missing_column_of_parquet_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"body": "a"}])
    with pytest.raises(UserError, match="no column 'text'; it has body"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "body") == ["a"]


def test_a_pattern_chooses_files(tmp_path: Path) -> None:
    for name in ("b.md", "a.md", "settings.json"):
        write(tmp_path / name, name)
    assert read(tmp_path / "*.md") == ["a.md", "b.md"]
    with pytest.raises(UserError, match="no such file or folder"):
        find_files(tmp_path / "*.csv")


def test_a_folder_without_data_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data files in this folder"):
        find_files(tmp_path)


def test_a_dataset_of_the_hub_is_read_from_the_cache_without_a_network(tmp_path: Path) -> None:
    folder = tmp_path / "hf" / "hub" / "datasets--org--small"
    for name, text in (("refs/main", "r1"), ("blobs/b", '{"text": "hello"}\n')):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "snapshots" / "r1").mkdir(parents=True)
    (folder / "snapshots" / "r1" / "train.jsonl").symlink_to("../../blobs/b")
    code = ("import sys; from trainer.options import parse_options; from trainer.data.sources import open_source; "
            "source = open_source(sys.argv[1], parse_options(['--model_name_or_path', 'tiny']), list); "
            "print(source.name, len(source.fingerprint), list(source.read()))")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-c", code, "org/small"]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "org/small (train) 64 ['hello']\n", done.stderr
    done = subprocess.run([*run[:3], "org/none"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "UserError: dataset 'org/none': no such file or folder here, and the hub has none" in done.stderr
