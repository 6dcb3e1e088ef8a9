"""What a training can't begin with is told in a second, before torch is loaded: paths, columns, names of the hub."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from trainer import hub
from trainer.check_inputs import main
from trainer.data.documents import find_files, read_documents, what_they_may_be
from trainer.data.sources import DocumentExtractor
from trainer.errors import UserError
from trainer.flags.values import column_names


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with notes, a file of questions, a folder without a model; no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("some words")
    (tmp_path / "qa.jsonl").write_text('{"question": "a?", "answer": "b"}\n')
    (tmp_path / "empty").mkdir()
    return tmp_path


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has the model org/known, and one that asks for a token."""

    def do_HEAD(self) -> None:
        known = {"/api/models/org/known": 200, "/api/datasets/org/known": 200, "/": 200, "/api/models/slow": 503}
        known["/api/models/org/private"] = 200 if self.headers.get("Authorization") == "Bearer mine" else 401
        self.send_response(known.get(self.path, 404))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on a loopback address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(hub, "BASE", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("HF_ENDPOINT", raising=False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield
        server.shutdown()


@pytest.mark.parametrize(("flags", "message"), [
    ("--dataset nots", "--dataset nots: no such file or folder (did you mean notes?); it is not in the Hugging Face "
                       "cache, and HF_HUB_OFFLINE is set"),
    ("--model tinny", "--model tinny: no such file or folder (did you mean tiny?); it is not in"),
    ("--model empty", "--model empty: no model in this folder: it has no config.json"),
    ("--dataset empty", "--dataset empty: no data files in this folder"),
    ("--dataset notes --eval_dataset lost/a.md", "--eval_dataset lost/a.md: no such file or folder"),
    ("--dataset qa.jsonl", "--dataset qa.jsonl:1: no column 'text'; it has question, answer. Say what they are: "
                           "--columns prompt=question,completion=answer"),
    ("--dataset qa.jsonl --text_column body", "no column 'body'"),
    ("--chat_template lost.jinja", "--chat_template lost.jinja: no such file"),
    ("--adapter empty", "--adapter empty: no model in this folder"),
    ("--max_steps ten", "invalid int value: 'ten'")])
def test_what_is_wrong_is_told_in_one_line(flags: str, message: str, place: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    model = [] if "--model" in flags else ["--model", "tiny"]
    assert main([*model, *flags.split()]) == (1 if "qa.jsonl" in flags else 2)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("flags", [
    "", "--dataset notes", "--dataset notes/*.md notes:0.5", "--dataset qa.jsonl --text_column answer",
    "--dataset qa.jsonl --columns prompt=question,completion=answer"])
def test_what_is_right_passes(flags: str, place: Path) -> None:
    assert main(["--model", "tiny", *flags.split()]) == 0


def test_what_other_hosts_may_have_is_left_to_them(place: Path) -> None:
    assert main(["--elsewhere", "--model", "/data/llama", "--dataset", "/data/text.jsonl"]) == 0
    assert main(["--elsewhere", "--model", "tiny", "--dataset", "qa.jsonl"]) == 1


def test_it_takes_no_library(place: Path) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "trainer" / "check_inputs.py"), "--model",
                           "tiny", "--dataset", "qa.jsonl"], capture_output=True, text=True, env={
                               **os.environ, "HF_HUB_OFFLINE": "1"})
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 1 and "argparse" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "huggingface_hub", "pyarrow"}


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name", "why"), [
    ("model", "org/known", None), ("dataset", "org/known", None), ("model", "slow", None),
    ("model", "org/mistyped", "the hub has no model of this name that you may read"),
    ("model", "org/private", "needs HF_TOKEN")])
def test_names_are_looked_up(kind: str, name: str, why: str | None, endpoint: None, place: Path) -> None:
    said = hub.why_not(kind, name)
    assert said is None if why is None else said and why in said
    assert hub.is_reachable()


def test_a_mirror_is_believed(endpoint: None, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may serve files without knowing what the hub is asked."""
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.BASE}/mirror")
    assert hub.why_not("model", "org/mistyped") is None


def test_a_token_opens_what_is_private(endpoint: None, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "hub").mkdir()
    (place / "hub" / "token").write_text("mine\n")
    assert hub.why_not("model", "org/private") is None
    monkeypatch.setenv("HF_TOKEN", "another")
    assert hub.why_not("model", "org/private")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://nowhere.invalid"])
def test_without_a_network_that_is_said_at_once(address: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert not hub.is_reachable()
    assert "can't be reached" in (hub.why_not("model", "gpt2") or "")


def test_what_is_cached_needs_no_network(place: Path) -> None:
    (place / "hub" / "hub" / "models--org--mine" / "snapshots").mkdir(parents=True)
    (place / "hub" / "datasets" / "org___words").mkdir(parents=True)
    assert hub.why_not("model", "org/mine") is hub.why_not("dataset", "org/words") is None
    assert hub.why_not("model", "org/other") == "it is not in the Hugging Face cache, and HF_HUB_OFFLINE is set"


# -- columns -----------------------------------------------------------------------------------------------------------


def test_columns_are_read_under_other_names(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    row = {"question": "a?", "answer": "b", "prompt": "not this"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("question,answer\na?,b\n")
    extract = DocumentExtractor(renamed=column_names("prompt=question,completion=answer"))
    found = [json.loads(text) for text in read_documents(find_files(tmp_path), extract)]
    assert found == [{"prompt": "a?", "completion": "b"}] * 3


@pytest.mark.parametrize("text", ["prompt", "prompt=", "question=prompt", "prompt=a,=b"])
def test_columns_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(Exception, match="write NAME=COLUMN"):
        column_names(text)


@pytest.mark.parametrize(("names", "said"), [
    (["Question", "Answer", "id"], "--columns prompt=Question,completion=Answer"),
    (["query", "response"], "--columns prompt=query,completion=response"), (["a", "b"], "--columns prompt=NAME")])
def test_what_columns_may_be_is_offered(names: list[str], said: str) -> None:
    assert said in what_they_may_be(names)
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        DocumentExtractor()(dict.fromkeys(names, "x"), "here")
