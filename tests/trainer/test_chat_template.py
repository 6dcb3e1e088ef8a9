"""Where the assistant's turns stand in what a chat template makes of them, for the ways in which templates differ."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from trainer.data.chat import encode
from trainer.data.chat_template import Conversation, end_mark
from trainer.data.documents import Document
from trainer.data.rows import normalized
from trainer.data.tokenizer import own_tokenizer
from trainer.errors import UserError

ASK = {"role": "user", "content": "Say ok, or yes."}
OK = {"role": "assistant", "content": "ok"}
MORE = [{"role": "user", "content": "Really?"}, {"role": "assistant", "content": "yes"}]
LOOK = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "price", "arguments": {"item": "pen", "in": None}}}]}
FOUND = [{"role": "tool", "content": "2 EUR"}, {"role": "assistant", "content": "It costs 2 EUR."}]
TOOL = {"type": "function", "function": {"name": "price", "description": "what an item costs", "parameters": {}}}

# Turns with marks: {before the content of an assistant's turn} {after the content}
TURNS = ("{{% for m in messages %}}[{{{{ m.role }}}}]\n{before}{{{{ m.content }}}}{calls}{after}\n{{% endfor %}}{end}"
         "{{% if add_generation_prompt %}}[assistant]\n{opened}{{% endif %}}")
CALLS = ("{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
         "{% endfor %}")


def turns(before: str = "", after: str = "[stop]", calls: str = CALLS, end: str = "", opened: str = "") -> str:
    return TURNS.format(before=before, after=after, calls=calls, end=end, opened=opened)


LAST_THINKS = turns(before="{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}")
OPENED = turns(opened="<think>\n")
END_AT_THE_END = turns(end="{% if not add_generation_prompt %}[end]{% endif %}")
ONLY_AT_THE_END = turns(after="", end="{% if not add_generation_prompt %}[end]{% endif %}")
NO_PROMPT = ("{% for m in messages %}{% if m.role == 'user' %}[ask] {{ m.content }} [/ask]{% else %} {{ m.content }}"
             "[stop]{% endif %}{% endfor %}")
TRIMMED = turns().replace("{{ m.content }}", "{{ m.content | trim | upper }}")
# Thoughts are left out of earlier turns, and of a turn's content.
WITHOUT_THOUGHTS = turns().replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</t>')[-1] }}")
JSON_ARGUMENTS = turns(calls="{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.arguments + '</call>' }}"
                             "{{ c.function.name }}{% endfor %}")
PRINTED_ARGUMENTS = turns(calls="{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}"
                                "{% endfor %}")
MARKED = turns().replace("{{ m.content }}", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}[x]"
                                            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}")


def tokenizer(template: str | None) -> Any:
    return own_tokenizer(["some words to begin with"], template=str(template))


def spans(template: str, *messages: dict[str, Any], notes: Counter[str] | None = None, **row: Any) -> list[str]:
    """The trained stretches of a conversation's text."""
    found = json.loads(normalized({"messages": list(messages), **row}, "messages", "here"))
    text, places = Conversation(tokenizer(template), found["messages"], found.get("tools")).trained(
        found["trained"], Counter() if notes is None else notes)
    return [text[start:end] for start, end in places]


@pytest.mark.parametrize(("template", "messages", "expected"), [
    (turns(), [ASK, OK, *MORE], ["ok[stop]", "yes[stop]"]),
    (LAST_THINKS, [ASK, OK, *MORE], ["ok[stop]", "<think></think>yes[stop]"]),
    (LAST_THINKS, [{"role": "system", "content": "You answer yes or ok."}, ASK, OK, *MORE],
     ["ok[stop]", "<think></think>yes[stop]"]),
    (OPENED, [ASK, OK], ["ok[stop]"]),
    (OPENED, [ASK, {"role": "assistant", "content": "<think>\nhm</think>ok"}], ["hm</think>ok[stop]"]),
    (OPENED, [ASK, {"role": "assistant", "content": "<b>ok</b>"}], ["<b>ok</b>[stop]"]),
    (END_AT_THE_END, [ASK, OK, *MORE], ["ok[stop]", "yes[stop]\n[end]"]),
    (ONLY_AT_THE_END, [ASK, OK, *MORE], ["ok", "yes[end]"]),
    (NO_PROMPT, [ASK, OK, *MORE], ["ok[stop]", "yes[stop]"]),
    (TRIMMED, [ASK, {"role": "assistant", "content": " ok "}, *MORE], ["OK[stop]", "YES[stop]"]),
    (WITHOUT_THOUGHTS, [ASK, {"role": "assistant", "content": "<t>Say ok</t>ok"}, *MORE], ["ok[stop]", "yes[stop]"]),
    (turns(), [OK, *MORE], ["ok[stop]", "yes[stop]"]),
    (turns(), [ASK, LOOK, *FOUND],
     ['<call>price {"item": "pen", "in": null}</call>[stop]', "It costs 2 EUR.[stop]"]),
    (LAST_THINKS, [ASK, LOOK, *FOUND],
     ['<call>price {"item": "pen", "in": null}</call>[stop]', "<think></think>It costs 2 EUR.[stop]"]),
    (JSON_ARGUMENTS, [ASK, LOOK, *FOUND],
     ['<call>{"item": "pen", "in": null}</call>price[stop]', "It costs 2 EUR.[stop]"]),
    (PRINTED_ARGUMENTS, [ASK, LOOK, *FOUND], ['price{"item": "pen", "in": null}[stop]', "It costs 2 EUR.[stop]"]),
    (MARKED, [ASK, OK, *MORE], ["ok[x]", "yes[x]"]),
    (MARKED, [ASK, OK | {"weight": 0}, *MORE], ["yes[x]"]),
    (turns(), [ASK, OK | {"weight": 0}, *MORE], ["yes[stop]"]),
    (turns(), [ASK, OK, MORE[0], MORE[1] | {"train": False}], ["ok[stop]"]),
    (turns(), [{"role": "Human", "content": "Hm?"}, {"role": "gpt", "content": "ok"}], ["ok[stop]"]),
    (turns(), [ASK, {"role": "assistant", "content": ""}, *MORE], ["[stop]", "yes[stop]"]),
])
def test_a_turn_is_what_the_assistant_says_with_its_end(template: str, messages: list[dict[str, Any]],
                                                        expected: list[str]) -> None:
    assert spans(template, *messages) == expected


@pytest.mark.parametrize(("alone", "tail", "expected"), [
    ("[stop]\n[end]", "[stop]\n[user]\n", "[stop]"), ("<eos>", "<eos><bos>hi", "<eos>"), ("", "\nuser", ""),
    ("<|end|>\n<|endoftext|>", "<|end|>\n<|user|>", "<|end|>"), ("<end>\n", "<end>\nuser: 2 < 3", "<end>"),
])
def test_the_mark_that_ends_a_turn_is_whole(alone: str, tail: str, expected: str) -> None:
    assert end_mark(alone, tail, tokenizer("")) == expected


@pytest.mark.parametrize(("template", "messages", "reason"), [
    (turns().replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
     [ASK, LOOK, *FOUND], r"doesn't show message 3 \(tool\)"),
    (turns(calls=""), [ASK, LOOK, *FOUND], "doesn't show the tool calls of message 2"),
    (turns(calls=""), [{"role": "user", "content": "the price, please"}, LOOK, *FOUND], "the tool calls of message 2"),
    (turns().replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), [ASK, OK], None),
    (turns() + "{{ messages[1].content }}", [ASK, OK, *MORE], "leaves open where message 2"),
    ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", [ASK, OK], "refuses this conversation:"),
    ("{{ 1 + 'a' }}", [ASK, OK], "refuses this conversation: unsupported operand"),
    ("{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}", [ASK, OK, *MORE],
     "marks 1 turns as generated, of 2"),
])
def test_what_a_template_leaves_open_is_refused_by_file_and_line(template: str, messages: list[dict[str, Any]],
                                                                 reason: str | None) -> None:
    document = Document(normalized({"messages": messages}, "messages", "here"), "data.jsonl:7")
    if reason is None:
        assert spans(template, *messages) == ["okok[stop]"]
        return
    with pytest.raises(UserError, match=rf"^data.jsonl:7: .*{reason}"):
        encode(document, tokenizer(template))


def test_what_a_template_leaves_out_is_counted() -> None:
    notes: Counter[str] = Counter()
    spans(turns(), ASK, OK | {"thinking": "I think so"}, tools=[TOOL], notes=notes)
    assert notes == {"tools aren't shown by the chat template": 1,
                     "'thinking' of a message isn't shown by the chat template": 1}
    assert not spans("{{ tools | tojson }}" + turns(), ASK, OK, tools=[TOOL])[0].startswith("price")


def test_tiny_shows_tools_and_calls() -> None:
    from trainer.data.tokenizer import TINY_TEMPLATE

    found = json.loads(normalized({"messages": [ASK, LOOK, *FOUND], "tools": json.dumps([TOOL])}, "messages", "here"))
    made = Conversation(tokenizer(TINY_TEMPLATE), found["messages"], found["tools"])
    text, places = made.trained(found["trained"], Counter())
    assert "what an item costs" in text
    assert [text[start:end] for start, end in places] == [
        '{"name": "price", "arguments": {"item": "pen", "in": null}}\n<|end|>', "It costs 2 EUR.<|end|>"]
