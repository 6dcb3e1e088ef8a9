"""Configs' text: read as Hjson reads it, with the place of each key; made strict without changing a value."""

from __future__ import annotations

import json
from typing import Any

import hjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from master.ds_config.json_text import Document, TextError, put, remove, rename, strict_error

LOOSE = """\ufeff{
  // a note
  "a": 1, # and one more
  'b': "x" /* between */
  c: [1, 2.5e8, true, null,],
  "d": {"e": off, f
  }}
"""
SCALARS = st.none() | st.booleans() | st.integers(-9, 10**12) | st.text(max_size=5) | st.floats(
    allow_nan=False, allow_infinity=False)
VALUES = st.recursive(SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part,
                                                                                         max_size=3))


@given(VALUES, st.sampled_from([None, 0, 2, "\t"]))
def test_all_json_is_read_as_json(value: Any, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    document = Document(text)
    assert document.value == value and not document.slips and document.strict() == text


@pytest.mark.parametrize("text", [
    '{"a": 1,}', '{"a": [1, 2,],}', "{'a': 'it\\'s \"b\"'}", "{a: 1}", "{a: word\n}", "{a: two words\n b: 1}",
    '{"a": 1 // one\n}', '{"a": 1 # one\n}', '{/* x */"a": /* y */ 1}', '{"a": 1\n"b": 2}', '{"a": "x" "b": 2}',
    '{"a": -1.5e-3, b: 1e, c: 01\n}', '{"a": null # x\n}', "{a: ${x},\n b: [y\n]}",
    '{"a": {"b": {}}, "c": []} // end', "# first\n{}", '{"a" : tru}\n}', "{a: 1 b: 2\n}",
])
def test_what_hjson_reads_is_read_alike_and_can_be_made_strict(text: str) -> None:
    document = Document(text)
    assert document.value == hjson.loads(text)
    assert document.slips
    assert json.loads(document.strict()) == document.value


@pytest.mark.parametrize(("text", "words"), [
    ("", "empty"), ("  // nothing", "empty"), ("{", "no } for the { of line 1"), ('{"a": [1, 2}', "found '}'"),
    ('{"a" 1}', "expected :"), ('{"a": }', "expected a value"), ('{"a": "x}', "closing quote"),
    ('{"a": 1} }', "after the end"), ('{"a": "x\ny"}', "control character"), ('{"a": "\\q"}', "backslash"),
    ("{/* x", "never ends"), ("a: 1", "begins with {"), ("{a: '''x'''}", "not for configs"),
    ("[" * 100, "nested deeper"), ('{"a": 1e999}', "out of range"), ('{"a": ' + "9" * 5000 + "}", "out of range"),
    ("{}\u00a0", "after the end"), ("{}\x0c", "after the end"),
    ('{,"a": 1}', "expected a key"), ('{"a": 1,, "b": 2}', "expected a key"),
])
def test_what_nobody_reads_is_told_with_its_place(text: str, words: str) -> None:
    with pytest.raises(TextError, match=words.replace("{", r"\{").replace("}", r"\}")) as caught:
        Document(text)
    assert 0 <= caught.value.at <= len(text)


def test_places_and_slips_of_a_loose_text() -> None:
    document = Document(LOOSE)
    assert document.value == {"a": 1, "b": "x", "c": [1, 2.5e8, True, None], "d": {"e": "off, f"}}
    assert document.line(document.place(("d", "e"))) == (6, 9)
    assert document.line(document.place(("d", "missing"))) == (6, 3)
    assert document.line(document.place(("c", 1))) == (5, 3)
    assert {slip.what.split(":")[0] for slip in document.slips} == {
        "a byte order mark", "a comment", "single quotes", "no comma after this", "a key without quotes",
        "a comma before the closing bracket", "a word without quotes"}
    assert document.strict() == ('{\n  "a": 1,\n  "b": "x",\n  "c": [1, 2.5e8, true, null],\n'
                                 '  "d": {"e": "off, f"\n  }}\n')
    assert strict_error(LOOSE) and strict_error(document.strict()) is None


def test_python_words_are_told_as_such() -> None:
    document = Document('{"a": True, "b": [None, False], "c": {"d": True}}')
    assert document.value == {"a": True, "b": [None, False], "c": {"d": True}}
    assert [slip.what.split()[1] for slip in document.slips] == ["True", "None", "False", "True"]
    assert json.loads(document.strict()) == document.value
    assert Document('{"a": Truest\n}').value == {"a": "Truest"}


def test_windows_lines_stay_whole() -> None:
    text = '{\r\n  // one\r\n  "a": 1, // two\r\n  "b": 2\r\n}\r\n'
    assert Document(text).strict() == '{\r\n  "a": 1,\r\n  "b": 2\r\n}\r\n'


def test_duplicate_keys_have_their_places() -> None:
    document = Document('{"a": 1,\n "b": {"c": 1, "c": 2},\n "a": 3}')
    assert [(path, document.line(at)[0]) for path, at in document.duplicates] == [(("b", "c"), 2), (("a",), 3)]
    assert document.value == {"a": 3, "b": {"c": 2}}


@pytest.mark.parametrize(("path", "left"), [
    (("a",), '{"b": {"c": [1]},\n  "d": 2 }'), (("b",), '{ "a": 1,\n  "d": 2 }'),
    (("d",), '{ "a": 1,\n  "b": {"c": [1]} }'), (("b", "c"), '{ "a": 1,\n  "b": {},\n  "d": 2 }'),
])
def test_a_key_goes_with_one_comma(path: tuple[str, ...], left: str) -> None:
    document = Document('{ "a": 1,\n  "b": {"c": [1]},\n  "d": 2 }')
    assert json.loads(remove(document, path)) == json.loads(left)


def test_edits_touch_nothing_else() -> None:
    text = '{\n\t"a":   1,\n\t"b": {"c":[ 1 ]}\n}\n'
    assert rename(Document(text), ("a",), "z") == text.replace('"a"', '"z"')
    assert put(Document(text), ("b", "c"), {"x": True}) == text.replace("[ 1 ]", '{"x": true}')
    assert remove(Document('{"a": 1, "a": 2}'), ("a",), first=True) == '{"a": 2}'
    with pytest.raises(KeyError):
        put(Document(text), ("nope",), 1)
