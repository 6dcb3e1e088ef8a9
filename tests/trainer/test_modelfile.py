"""Ollama's Modelfile: what its template writes is what the chat template writes, or there is none."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from programs import program

from trainer.data.tokenizer import TINY_TEMPLATE, own_tokenizer
from trainer.export.modelfile import ASKED, around, modelfile, rendered

LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "tiny": TINY_TEMPLATE, "chatml": LOOP + ASKS,
    "its own system": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
                      + LOOP + ASKS,
    "headers": "{{ bos_token }}{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}<|eot|>"
               "{% endfor %}{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}",
    "brackets": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
                "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
                "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
    "model's turn": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                    "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
                    "<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
    "braces": "{% for m in messages %}{{ '{{' }}{{ m.role }}}} {{ m.content }}\n{% endfor %}"
              "{% if add_generation_prompt %}{{ '{{' }}assistant}} {% endif %}"}
WITHOUT_SYSTEM = ("brackets", "model's turn")


def tokenizer_of(template: str) -> Any:
    return own_tokenizer(["some words"], template, vocabulary=300)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_written_is_what_the_chat_template_writes(name: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name])
    found = around(tokenizer)
    assert found is not None
    for turns in ASKED:
        if turns[0][0] != "system" or name not in WITHOUT_SYSTEM:
            assert found.written(turns) == rendered(tokenizer, turns)
    assert found.system == ("Be brief." if name == "its own system" else "")


@pytest.mark.needs("go")
def test_go_writes_the_same(tmp_path: Path) -> None:
    """Ollama's templates are Go's."""
    source = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Case struct { Form, System string; Messages []Message }
func main() {
    var cases []Case
    json.NewDecoder(os.Stdin).Decode(&cases)
    for _, each := range cases {
        template.Must(template.New("").Parse(each.Form)).Execute(os.Stdout, each)
        os.Stdout.WriteString("\\x00")
    }
}
"""
    (tmp_path / "main.go").write_text(source)
    cases, wanted = [], []
    for name, template in TEMPLATES.items():
        tokenizer = tokenizer_of(template)
        found = around(tokenizer)
        assert found is not None
        for turns in ASKED:
            if turns[0][0] == "system" and name in WITHOUT_SYSTEM:
                continue
            system = turns[0][1] if turns[0][0] == "system" else found.system
            cases.append({"Form": found.go(), "System": system,
                          "Messages": [{"Role": role, "Content": content} for role, content in turns]})
            wanted.append(rendered(tokenizer, turns))
    done = subprocess.run([program("go"), "run", "main.go"], cwd=tmp_path, input=json.dumps(cases), text=True,
                          capture_output=True, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})
    assert done.stdout.split("\0")[:-1] == wanted, done.stderr


def test_a_template_that_asks_for_more_has_no_form() -> None:
    counts = "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = tokenizer_of(counts)
    assert around(tokenizer) is None
    text, has_template = modelfile("m.gguf", tokenizer, [1], True, 100_000)
    assert not has_template and text == 'FROM ./m.gguf\nPARAMETER stop "<|end|>"\nPARAMETER num_ctx 8192\n'


def test_a_model_of_texts_continues_what_it_is_given() -> None:
    text, has_template = modelfile("m.gguf", tokenizer_of(TINY_TEMPLATE), [1], False, 256)
    assert has_template and text.splitlines()[1:] == ['TEMPLATE """{{ .Prompt }}"""', 'PARAMETER stop "<|end|>"',
                                                      "PARAMETER num_ctx 256"]
