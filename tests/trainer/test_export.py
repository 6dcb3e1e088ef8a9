"""`invoke export`: a run's model as a GGUF file, with a Modelfile, merged, at the hub; and why not."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import ROOT
from llama_cpp import ask_llama_cpp
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.data.tokenizer import own_tokenizer
from trainer.export.hub_upload import files_of

TOOL = ROOT / "master" / "export_run.py"
SHAPE: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of conversations, an older one of texts, an adapter of the former, and a model of GPT-2's."""
    folder = tmp_path_factory.mktemp("desk")
    tokenizer = own_tokenizer(["some words of a text"] * 3, vocabulary=300)
    torch.manual_seed(0)
    for name, form, family in (("20260101-000000-tiny", "text", "llama"), ("20260102-000000-tiny", "messages", "llama"),
                               ("20260103-000000-small", "messages", "gpt2")):
        run = folder / ("runs" if family == "llama" else "others") / name
        config = AutoConfig.for_model(family, bos_token_id=0, eos_token_id=1, pad_token_id=1, **SHAPE)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(run / "model")
        tokenizer.save_pretrained(run / "model")
        (run / "run.json").write_text(json.dumps({"form": form, "status": "finished"}))
    base = folder / "runs" / "20260102-000000-tiny" / "model"
    plain = AutoModelForCausalLM.from_pretrained(base)
    adapter: Any = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for weight in adapter.parameters():
            if weight.requires_grad:
                weight += 0.2 * torch.randn(weight.shape)
    adapter.save_pretrained(str(folder / "style"))
    tokenizer.save_pretrained(folder / "style")
    return folder


def export(desk: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, TOOL, *words], cwd=desk, capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL, env={**os.environ, **variables})
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_newest_run_becomes_a_file_beside_its_model(desk: Path) -> None:
    done = export(desk, "--check")
    file = "runs/20260102-000000-tiny/tiny.gguf"
    assert done.returncode == 0 and done.stdout.startswith(f"{file}  f16, "), done.stderr
    assert "read back by transformers: its logits differ by 0.00" in done.stdout
    assert done.stderr.endswith(f"to talk with it: llama-cli -m {file}\n")
    text = "some words"
    assert ask_llama_cpp(desk / file, texts=[text])["tokens"] == [
        own_tokenizer(["some words of a text"] * 3, vocabulary=300)(text).input_ids]


@pytest.mark.parametrize(("run", "template"), [("20260102-000000-tiny", '{{ if eq .Role "user" }}user\n{{ .Content }}'),
                                               ("20260101-000000-tiny", 'TEMPLATE """{{ .Prompt }}"""')])
def test_ollama_gets_a_file_and_how_to_talk_with_it(run: str, template: str, desk: Path) -> None:
    done = export(desk, run, "--to", "ollama", "--type", "Q8_0")
    place = f"runs/{run}/Modelfile"
    assert done.stdout.splitlines()[1:] == [place], done.stderr
    assert f"ollama create tiny-q8_0 -f {place} && ollama run tiny-q8_0" in done.stderr or \
        f"ollama create tiny -f {place} && ollama run tiny" in done.stderr
    text = (desk / place).read_text()
    assert text.startswith("FROM ./tiny-q8_0.gguf\n") and template in text and 'PARAMETER stop "<|end|>"' in text


@pytest.mark.slow
def test_an_adapter_is_added_to_its_base(desk: Path) -> None:
    done = export(desk, "style", "--to", "merged")
    assert (done.returncode, done.stdout) == (0, "merged\n"), done.stderr
    whole = AutoModelForCausalLM.from_pretrained(desk / "merged")
    from peft import AutoPeftModelForCausalLM

    ids = torch.arange(2, 40)[None]
    parts = AutoPeftModelForCausalLM.from_pretrained(desk / "style").eval()
    base = AutoModelForCausalLM.from_pretrained(desk / "runs" / "20260102-000000-tiny" / "model")
    with torch.inference_mode():
        assert torch.allclose(whole(ids).logits, parts(ids).logits, atol=1e-4)
        assert not torch.allclose(whole(ids).logits, base(ids).logits, atol=1e-2)
    assert export(desk, "style").stdout.startswith("style.gguf  f16")


@pytest.mark.slow
def test_types_of_llama_cpps_own_are_made_by_its_program(desk: Path, tmp_path: Path) -> None:
    lacking = export(desk, "--type", "q4_k_m")
    assert lacking.returncode == 2 and "llama-quantize, which is not on the PATH" in lacking.stderr
    program = tmp_path / "llama-quantize"  # it only copies
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] || { echo "unknown type $3" >&2; exit 1; }\ncp "$1" "$2"\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = export(desk, "--type", "q4_k_m", PATH=path)
    assert done.stdout.startswith("runs/20260102-000000-tiny/tiny-q4_k_m.gguf  q4_k_m, "), done.stderr
    failing = export(desk, "--type", "q9", PATH=path)
    assert failing.returncode == 1 and "llama-quantize Q9 fails: unknown type Q9" in failing.stderr
    assert not [path.name for path in (desk / "runs" / "20260102-000000-tiny").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("words", "code", "line"), [
    (["others/20260103-000000-small"], 1, "its architecture, gpt2, is none of llama"),
    (["nowhere"], 1, "nowhere: no such run"),
    (["--to", "hub", "--type", "f16"], 2, "--type and --check are for GGUF files"),
    (["--public"], 2, "--public and --yes go with --to hub"),
    (["--name", "a/b"], 2, "a file's name is needed")])
def test_what_cannot_be_is_told_in_a_line(words: list[str], code: int, line: str, desk: Path) -> None:
    done = export(desk, *words)
    assert done.returncode == code and line in done.stderr.splitlines()[-1], done.stderr


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload of small files takes."""

    committed: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[tuple[str, Any]]] = []

    def do_GET(self) -> None:
        self.reply({"name": "me", "type": "user", "id": "1", "modelId": "me/mine", "sha": "0" * 40, "siblings": [],
                    "private": "open" not in self.path})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert self.headers["Authorization"] == "Bearer hf_secret"
        lines = [json.loads(line) for line in body.splitlines() if line]
        self.asked.append((self.path, lines))
        if self.path.endswith("/preupload/main"):
            self.reply({"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                                  for each in lines[0]["files"]]})
        elif "/commit/main" in self.path:
            self.committed.update({line["value"]["path"]: base64.b64decode(line["value"]["content"])
                                   for line in lines if line["key"] == "file"})
            self.reply({"commitUrl": "https://huggingface.co/me/mine/commit/0", "commitOid": "0" * 40, "success": True})
        else:
            self.reply({"url": "https://huggingface.co/me/mine", "name": "me/mine"})

    def reply(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.committed, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_hub_gets_the_models_files_and_no_others(desk: Path, hub: str, tmp_path: Path) -> None:
    model = desk / "runs" / "20260102-000000-tiny" / "model"
    (model / ".private").write_text("no")
    (model / "notes.bin").write_text("no")
    variables = {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    unasked = export(desk, "--to", "hub", "--name", "me/mine", **variables)
    assert unasked.returncode == 1 and "nothing was sent" in unasked.stderr and not Hub.asked
    done = export(desk, "--to", "hub", "--name", "me/mine", "--yes", **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub}/me/mine\n" and "(private)" in done.stderr
    assert set(Hub.committed) == {path.name for path in files_of(model)} >= {"model.safetensors", "tokenizer.json"}
    assert Hub.committed["config.json"] == (model / "config.json").read_bytes()
    (created,) = (lines[0] for path, lines in Hub.asked if path.endswith("/api/repos/create"))
    assert created["visibility"] == "private" and "hf_secret" not in done.stdout + done.stderr


def test_a_repository_that_everybody_reads_gets_nothing_by_mistake(desk: Path, hub: str, tmp_path: Path) -> None:
    done = export(desk, "--to", "hub", "--name", "me/open", "--yes", HF_ENDPOINT=hub, HF_TOKEN="hf_secret",
                  HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
    assert done.returncode == 1 and "me/open is there and public: --public" in done.stderr and not Hub.committed


def test_somebody_whom_the_hub_does_not_know_is_told_how_to_log_in(desk: Path, tmp_path: Path) -> None:
    done = export(desk, "--to", "hub", "--name", "mine", HF_HOME=str(tmp_path), HF_TOKEN="")
    assert done.returncode == 1 and done.stderr.endswith("error: the hub doesn't know you: hf auth login\n")
