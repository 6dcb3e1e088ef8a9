"""Downloaded models and data: what would run for ever, fill the memory or act on the terminal is one line."""

from __future__ import annotations

import contextlib
import gzip
import json
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer import bounds
from trainer.bounds import bounded_rendering
from trainer.data.documents import find_files, read_documents
from trainer.data.sources import DocumentExtractor
from trainer.errors import UserError
from trainer.model.loading import load_config, load_model
from trainer.options import parse_options
from trainer.results.console import Console, clean

ESCAPES = "a\x1b]52;c;QUFB\x07\x1b[2J\rb\u202ec"


def rendered(template: str) -> None:
    """Have a template show a conversation, in the place of a model's own."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    with bounded_rendering(), contextlib.suppress(ZeroDivisionError):
        ImmutableSandboxedEnvironment().from_string(template).render()


def test_a_template_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "RENDER_LIMIT_S", 0.3)
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match="does not end"):
        rendered("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    rendered("{{ 1 }}")
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before


def test_a_template_that_fills_the_memory() -> None:
    with pytest.raises(UserError, match="more than 2 GiB of memory"):
        rendered("{{ 'a' * (3 * 10**9) }}")


def read(path: Path) -> list[Any]:
    """All documents of a file."""
    return list(read_documents(find_files(path), DocumentExtractor()))


@pytest.mark.parametrize("text", ['{"text": ' + "[" * 100_000, '{"text": ' + "9" * 10_000 + "}"], ids=["deep", "long"])
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_json_that_python_can_not_read(text: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{form}"
    path.write_text(text)
    with pytest.raises(UserError, match=r"data\.jsonl?.*: not JSON: (nested too deep|Exceeds the limit|Expecting)"):
        read(path)


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_a_file_that_unpacks_a_thousandfold(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "UNPACKED_BYTES", 1 << 20)
    path = tmp_path / f"data.{form}.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * (20 << 20)))
    with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
        read(path)
    path.write_bytes(gzip.compress(b'{"text": "abc"}\n'))
    assert len(read(path)) == 1


def model(folder: Path, **config: Any) -> Path:
    """A folder of a small model, without weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8, **config}))
    return folder


@pytest.mark.parametrize("config", [
    {"attn_implementation": "someone/kernel"}, {"_attn_implementation": "someone/kernel"},
    {"experts_implementation": "someone/kernel"}, {"text_config": {"attn_implementation": "someone/kernel"}}], ids=str)
def test_code_of_the_hub_is_not_fetched(config: dict[str, Any], tmp_path: Path) -> None:
    options = parse_options(["--model_name_or_path", str(model(tmp_path / "m", **config))])
    with pytest.raises(UserError, match=r"names code of somebody else .*someone/kernel"):
        load_config(options)


def test_a_named_attention_takes_the_place_of_the_config_s_and_of_nothing_else(tmp_path: Path) -> None:
    def named(**config: Any) -> Any:
        folder = str(model(tmp_path / "m", **config))
        return load_config(parse_options(["--model_name_or_path", folder, "--attn_implementation", "sdpa"]))

    assert named(attn_implementation="someone/kernel") is not None
    with pytest.raises(UserError, match=r"names code of somebody else \(experts_implementation"):
        named(experts_implementation="someone/kernel")


def test_an_adapter_beside_the_weights_is_not_followed(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else", "peft_type": "LORA"}')
    with pytest.raises(UserError, match="has an adapter of someone/else beside its weights"):
        load_config(parse_options(["--model_name_or_path", str(folder)]))


@pytest.mark.parametrize("config", [{"num_hidden_layers": "many"}, {"hidden_size": []}, {"vocab_size": -5},
                                    {"rope_parameters": "x"}, {"torch_dtype": 5}, {"dtype": "evil"}], ids=str)
@pytest.mark.parametrize("weights", [b"", b"\xff" * 100, (10**9).to_bytes(8, "little") + b"{}"])
def test_a_damaged_model_is_one_line(config: dict[str, Any], weights: bytes, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", **config)
    (folder / "model.safetensors").write_bytes(weights)
    options = parse_options(["--model_name_or_path", str(folder)])
    with pytest.raises(UserError, match=r"model '.*': ") as caught:
        load_config(options)
        load_model(options, "float32")
    assert "\n" not in str(caught.value)


def test_what_a_person_sees_does_nothing_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LANSPEED_JOB", raising=False)
    ranks: Any = SimpleNamespace(is_first=True, rank=0, host="h", on_one_machine=True)
    console = Console(ranks)
    console.keep_log(tmp_path)
    for say in (console.say, console.result, console.warn, console.error):
        say(f"x\n\ty {ESCAPES}")
    shown = "".join(capfd.readouterr()) + (tmp_path / "h.log").read_text()
    assert all(one.isprintable() or one in "\n\t" for one in shown) and "a?]52;c;QUFB??[2J?b?c" in shown
    assert clean("ä\n\t") == "ä\n\t"
