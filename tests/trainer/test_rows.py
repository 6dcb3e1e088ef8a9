"""Rows of every accepted form become one normal form, or are refused by file and line; what is dropped is counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trainer.data.documents import read_documents
from trainer.data.rows import form_of, normalized
from trainer.data.sources import DocumentExtractor
from trainer.errors import UserError

HI, HELLO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CALL = {"name": "price", "arguments": {"item": "pen"}}
CALLED = {"type": "function", "function": CALL}


def normal(row: dict[str, Any], notes: Counter[str] | None = None) -> Any:
    text = normalized(row, str(form_of(row)), "a.jsonl:4", notes)
    return json.loads(text) if text else None


@pytest.mark.parametrize(("row", "expected"), [
    ({"messages": [HI, HELLO]}, [HI, HELLO]),
    ({"messages": json.dumps([HI, HELLO])}, [HI, HELLO]),
    ({"messages": [{"role": "User", "content": "hi"}, {"role": "model", "content": "hello"}]}, [HI, HELLO]),
    ({"messages": [{"role": "developer", "content": "be brief"}, HI, HELLO]},
     [{"role": "developer", "content": "be brief"}, HI, HELLO]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, HELLO]},
     [HI, HELLO]),
    ({"messages": [HI, {"role": "assistant", "content": 0}]}, [HI, {"role": "assistant", "content": "0"}]),
    ({"messages": [HI, HELLO], "system": "be brief"}, [{"role": "system", "content": "be brief"}, HI, HELLO]),
    ({"messages": [{"role": "system", "content": "x"}, HI, HELLO], "system": "x"},
     [{"role": "system", "content": "x"}, HI, HELLO]),
    ({"messages": [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
     [HI, {"role": "assistant", "content": "", "tool_calls": [CALLED]}]),
    ({"messages": [HI, {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "price", "arguments": '{"item": "pen"}'}}]}]},
     [HI, {"role": "assistant", "content": "", "tool_calls": [CALLED | {"id": "1"}]}]),
    ({"messages": [HI, {"role": "assistant", "content": None, "function_call": {"name": "price",
                                                                               "arguments": '{"item": "pen"}'}}]},
     [HI, {"role": "assistant", "content": "", "tool_calls": [CALLED]}]),
    ({"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": json.dumps(CALL)},
                        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "hello"}], "system": ""},
     [HI, {"role": "assistant", "content": "", "tool_calls": [CALLED]}, {"role": "tool", "content": "2"}, HELLO]),
    ({"instruction": "hi", "output": "hello", "history": [["a", "b"]], "system": "s"},
     [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, HI,
      HELLO]),
    ({"instruction": "odd?", "input": 0, "output": False},
     [{"role": "user", "content": "odd?\n\n0"}, {"role": "assistant", "content": "false"}]),
    ({"instruction": "hi", "output": 1.5}, [HI, {"role": "assistant", "content": "1.5"}]),
    ({"prompt": [HI], "completion": json.dumps([HELLO])}, [HI, HELLO]),
])
def test_each_form_has_the_same_normal_form(row: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    found = normal(row)
    assert found["messages"] == expected
    assert found["trained"] == [number for number, each in enumerate(expected) if each["role"] == "assistant"]


def test_prompt_and_completion_stay_text() -> None:
    assert normal({"prompt": "[1, 2] sorted:", "completion": "[1, 2]"}) == {
        "prompt": "[1, 2] sorted:", "completion": "[1, 2]"}
    assert normal({"prompt": "1 + 1 =", "completion": 2}) == {"prompt": "1 + 1 =", "completion": "2"}


def test_tools_belong_to_the_conversation() -> None:
    function = {"name": "price", "parameters": {}}
    for tools in ([function], [{"type": "function", "function": function}], json.dumps([function])):
        found = normal({"messages": [HI, HELLO], "tools": tools})
        assert found["tools"] == [{"type": "function", "function": function}]
    assert "tools" not in normal({"messages": [HI, HELLO], "tools": "[]"})


@pytest.mark.parametrize(("row", "fault"), [
    ({"instruction": "a", "output": None}, "column 'output' is null, not text"),
    ({"instruction": "a", "output": float("nan")}, "column 'output' is not a number, not text"),
    ({"instruction": "a", "output": ["b"]}, "column 'output' is a list, not text"),
    ({"instruction": {"a": 1}, "output": "b"}, "column 'instruction' is a dict, not text"),
    ({"instruction": "a", "output": "b", "history": ["c"]}, "column 'history' is no list of [question, answer]"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, HELLO]},
     "message 1: its content has a part that is no text: image"),
    ({"messages": [{"role": "user", "content": {"text": "hi"}}, HELLO]}, "message 1: its content is a dict, not text"),
    ({"messages": [HI, {"role": "assistant", "tool_calls": [{"id": 1}]}]},
     "message 2: a tool call without the name of a function"),
    ({"messages": [HI, HELLO | {"weight": 0.5}]}, "message 2: its weight is 0.5: 0 and 1 are known"),
    ({"messages": ["hi", "hello"]}, "message 1 is a str, not an object with role and content"),
    ({"messages": [HI, {"role": "critic", "content": "no"}]}, "message 2 has the role 'critic'"),
    ({"messages": [{"role": "system", "content": "x"}, HI, HELLO], "system": "y"}, "are two system prompts"),
    ({"messages": [HI, HELLO], "tools": [1]}, "column 'tools' is no list of objects"),
    ({"prompt": "a", "completion": "b", "tools": [CALL]}, "column 'tools' needs a conversation"),
    ({"prompt": None, "completion": "b"}, "column 'prompt' is null, not text"),
])
def test_what_cannot_be_read_without_guessing_is_refused(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=r"^a\.jsonl:4: ") as caught:
        normal(row)
    assert fault in str(caught.value)


def test_weights_of_nought_leave_a_row_out_and_it_is_counted() -> None:
    notes: Counter[str] = Counter()
    assert normal({"messages": [HI, HELLO | {"weight": 0}]}, notes) is None
    assert normal({"instruction": "a", "output": ""}, notes)
    assert notes == {"a row whose messages all have weight 0 is left out": 1,
                     "an empty output: only its end is trained": 1}


def test_halves_of_an_emoji_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b", "id": 1}\n{"text": "\\ud83d\\ude00", "id": 2}\n')
    extract = DocumentExtractor()
    assert list(read_documents([tmp_path / "a.jsonl"], extract)) == ["a \N{REPLACEMENT CHARACTER} b", "\U0001f600"]
    assert extract.notes == {"half of a surrogate pair (\\ud83d...) replaced by U+FFFD": 1, "column 'id' isn't used": 0}


def test_a_table_gives_each_tool_call_only_its_own_arguments(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    calls = [{"item": "pen"}, {"city": "Rome", "days": 2}]
    rows = [{"messages": [HI, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": call}}]}]} for call in calls]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [json.loads(text) for text in read_documents([tmp_path / "a.parquet"], DocumentExtractor())]
    assert [each["messages"][1]["tool_calls"][0]["function"]["arguments"] for each in found] == calls
