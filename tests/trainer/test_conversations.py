"""Instruction data: each form is recognised, and exactly the assistant's tokens are trained, by hand-written lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.chat import conversation_text, encode
from trainer.data.dataset import prepare_dataset
from trainer.data.documents import find_files, read_documents
from trainer.data.rows import normalized
from trainer.data.sources import DocumentExtractor
from trainer.data.tokenizer import TINY_TEMPLATE, own_tokenizer
from trainer.errors import UserError
from trainer.options import parse_options
from trainer.sequences.packing import IGNORED, Collator, PackedSequences

USER = {"role": "user", "content": "how are you ?"}
SAID = {"role": "assistant", "content": "fine , thanks"}
AGAIN = [{"role": "user", "content": "and now ?"}, {"role": "assistant", "content": "still fine"}]
CHATML = ("{% for message in messages %}<s> {{ message.role }} {{ message.content }} </s>\n{% endfor %}"
          "{% if add_generation_prompt %}<s> assistant {% endif %}")
# As some models have it: thoughts are shown in the last turn only.
THINKING = ("{% for message in messages %}<s> {{ message.role }} {% if message.role == 'assistant' and not loop.last %}"
            "{{ message.content.split('/think ')[-1] }}{% else %}{{ message.content }}{% endif %} </s>\n{% endfor %}"
            "{% if add_generation_prompt %}<s> assistant {% endif %}")
MARKED = CHATML.replace(
    "{{ message.content }} </s>\n", "{% if message.role == 'assistant' %}{% generation %}{{ message.content }} </s>"
    "{% endgeneration %}{% else %}{{ message.content }} </s>{% endif %}\n")
VOCABULARY = ("<s>", "</s>", "user", "assistant", "system", "how", "are", "you", "?", "fine", ",", "thanks", "and",
              "now", "still", "be", "brief", "think", "/think", "hm")


def words(template: str | None = CHATML) -> Any:
    """A tokenizer that has a token for each word, and <s> and </s> around a turn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, "hm"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   chat_template=template)


def told(document: str, tokenizer: Any) -> str:
    """The tokens as words, the trained ones in capitals."""
    found = encode(document, tokenizer)
    names = tokenizer.convert_ids_to_tokens(found.ids)
    assert len(found.ids) == len(found.loss_mask) == len(found.sizes)
    return " ".join(name.upper() if learnt else name for name, learnt in zip(names, found.loss_mask, strict=True))


def messages(*turns: dict[str, str]) -> str:
    return normalized({"messages": list(turns)}, "messages", "here")


@pytest.mark.parametrize(("template", "turns", "expected"), [
    (CHATML, [USER, SAID], "<s> user how are you ? </s> <s> assistant FINE , THANKS </S>"),
    (CHATML, [{"role": "system", "content": "be brief"}, USER, SAID, *AGAIN],
     "<s> system be brief </s> <s> user how are you ? </s> <s> assistant FINE , THANKS </S> "
     "<s> user and now ? </s> <s> assistant STILL FINE </S>"),
    (CHATML, [SAID, *AGAIN], "<s> assistant FINE , THANKS </S> <s> user and now ? </s> <s> assistant STILL FINE </S>"),
    (THINKING, [USER, {"role": "assistant", "content": "think hm /think fine"}, *AGAIN],
     "<s> user how are you ? </s> <s> assistant FINE </S> <s> user and now ? </s> <s> assistant STILL FINE </S>"),
    (THINKING, [USER, {"role": "assistant", "content": "fine"}, *AGAIN],
     "<s> user how are you ? </s> <s> assistant FINE </S> <s> user and now ? </s> <s> assistant STILL FINE </S>"),
    (CHATML.replace("</s>", ""), [USER, SAID], "<s> user how are you ? <s> assistant FINE , THANKS </S>"),
])
def test_what_the_assistant_says_carries_loss(template: str, turns: list[dict[str, str]], expected: str) -> None:
    assert told(messages(*turns), words(template)) == expected


def test_a_template_with_marks_of_its_own_gives_the_same() -> None:
    tokenizer = words(MARKED)
    turns = [USER, SAID, *AGAIN]
    own = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    found = encode(messages(*turns), tokenizer)
    assert found.ids == own["input_ids"] and found.loss_mask == [bool(mark) for mark in own["assistant_masks"]]


@pytest.mark.parametrize(("row", "form", "expected"), [
    ({"prompt": "how are you ? ", "completion": "fine"}, "prompt + completion", "how are you ? FINE </S>"),
    ({"prompt": [USER, SAID], "completion": [AGAIN[0], AGAIN[1]]}, "prompt + completion",
     "<s> user how are you ? </s> <s> assistant fine , thanks </s> <s> user and now ? </s> "
     "<s> assistant STILL FINE </S>"),
    ({"instruction": "be brief", "input": "how are you ?", "output": "fine"}, "instruction + output",
     "<s> user be brief how are you ? </s> <s> assistant FINE </S>"),
    ({"instruction": "be brief", "input": "", "output": "fine", "system": None}, "instruction + output",
     "<s> user be brief </s> <s> assistant FINE </S>"),
    ({"conversations": [{"from": "human", "value": "how are you ?"}, {"from": "gpt", "value": "fine"}], "id": 3},
     "conversations", "<s> user how are you ? </s> <s> assistant FINE </S>"),
])
def test_each_form_is_recognised(row: dict[str, Any], form: str, expected: str) -> None:
    take = DocumentExtractor()
    assert told(take(row, "here"), words()) == expected and take.form == form


def test_a_column_of_text_comes_first_and_a_named_one_before_all() -> None:
    row = {"text": "plain", "prompt": "a", "completion": "b"}
    assert DocumentExtractor()(row, "here") == "plain" and DocumentExtractor("prompt")(row, "here") == "a"
    assert DocumentExtractor().columns(["id", "completion", "prompt"], "here") == ["prompt", "completion"]
    assert conversation_text(messages(USER, SAID)) == "how are you ?\nfine , thanks"


def test_a_table_of_messages_is_read_like_lines_of_them(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"id": 1, "messages": [USER, SAID]}, {"id": 2, "messages": [USER, SAID, *AGAIN]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    as_table, as_lines = (list(read_documents([tmp_path / name], DocumentExtractor()))
                          for name in ("a.parquet", "a.jsonl"))
    assert [json.loads(one) for one in as_table] == [json.loads(one) for one in as_lines] and len(as_table) == 2


@pytest.mark.parametrize(("rows", "fault"), [
    ([{"messages": [USER]}], "a.jsonl:1: no assistant message, so there is nothing to train on"),
    ([{"messages": []}], "a.jsonl:1: column 'messages' is no list of messages"),
    ([{"messages": [{"role": "user"}, SAID]}], "a.jsonl:1: message 1 (user) has no content"),
    ([{"messages": [{"content": "x"}, SAID]}], "a.jsonl:1: message 1 has the role None"),
    ([{"conversations": [{"from": "narrator", "value": "x"}]}], "a.jsonl:1: message 1 has the role 'narrator': system"),
    ([{"messages": [USER, SAID]}, {"text": "plain"}], "a.jsonl:2: no messages, which the rows before it have"),
    ([{"prompt": "a", "completion": None}], "a.jsonl:1: column 'completion' is null, not text"),
    ([{"body": "x"}], "a.jsonl:1: no column 'text'; it has body"),
])
def test_a_row_of_another_shape_is_named(rows: list[dict[str, Any]], fault: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as caught:
        list(read_documents(find_files(tmp_path / "a.jsonl"), DocumentExtractor()))
    assert fault in str(caught.value)


def test_a_tokenizer_without_a_template_is_told_of_with_a_mend() -> None:
    with pytest.raises(UserError, match=r"no chat template.*--chat_template FILE"):
        encode(messages(USER, SAID), words(None))
    with pytest.raises(UserError, match="refuses this conversation: only one turn"):
        encode(messages(USER, SAID), words("{{ raise_exception('only one turn') }}"))


def test_rows_of_conversations_have_labels_where_loss_is(tmp_path: Path) -> None:
    rows = [{"messages": [USER, {"role": "assistant", "content": f"number {n} " + "very " * (n % 40) + "fine"}]}
            for n in range(60)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = parse_options(["--model_name_or_path", "tiny", "--cache_dir", str(tmp_path / "cache"), "--dataset_path",
                             str(tmp_path / "chat.jsonl")])
    made = prepare_dataset(options, "tiny", own_tokenizer, 48, None, say=lambda line: None)  # type: ignore[arg-type]
    tokenizer = own_tokenizer(conversation_text(messages(*row["messages"])) for row in rows)
    assert made.info.form == "messages" and made.info.gzip_bits_per_byte is None
    assert tokenizer.chat_template == TINY_TEMPLATE
    table = PackedSequences(made.train, 48)
    assert table.loss_tokens == sum(sum(piece["loss_mask"]) for piece in made.train) < table.tokens
    batch = Collator(0, 48)([table[number] for number in range(table.filled)])
    labels, ids = batch["labels"], batch["input_ids"]
    assert int((labels != IGNORED).sum()) == table.loss_tokens
    assert bool(((labels == IGNORED) | (labels == ids)).all())
    saved = own_tokenizer([""]).__class__.from_pretrained(str(made.folder / "tokenizer"))
    learnt = saved.decode([int(token) for row in labels for token in row if token != IGNORED])
    assert "how are you" not in learnt and "user" not in learnt and "very fine<|end|>" in learnt
    assert PackedSequences(made.evaluation, 48).text_bytes()
