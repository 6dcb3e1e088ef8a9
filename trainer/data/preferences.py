"""Pairs of a better and a worse answer: rows with `chosen` and `rejected`, and perhaps `prompt`, in one normal form.

Answers are text or messages; without a prompt it is what both begin with, as in HH-RLHF and UltraFeedback's files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.data import chat
from trainer.data.chat import EncodedDocument
from trainer.data.documents import Document
from trainer.data.rows import ASSISTANT, Message, checked, is_conversation, with_system
from trainer.data.values import plain_text, tool_definitions
from trainer.errors import UserError

PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def normalized_pair(row: dict[str, Any], where: str) -> str:
    """Return a row as JSON: {"prompt", "chosen", "rejected"}, all text or all messages, and perhaps "tools".

    Raises UserError for a row of another shape.
    """
    tools = tool_definitions(row.get("tools"), where)
    prompt, answers = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    if not any(map(is_conversation, answers)):
        if tools or is_conversation(prompt):
            raise UserError(f"{where}: prompt or tools are a conversation, and chosen and rejected plain text")
        return json.dumps(text_pair(prompt, answers, where), ensure_ascii=False)
    before, chosen, rejected = conversations(prompt, answers, where)
    if row.get("system") is not None:
        before = with_system(before, row["system"], where)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1]["role"] != ASSISTANT:
            raise UserError(f"{where}: column '{name}' doesn't end with an answer of the assistant")
    found = {"prompt": before, "chosen": chosen, "rejected": rejected} | ({"tools": tools} if tools else {})
    return json.dumps(found, ensure_ascii=False)


def text_pair(prompt: Any, answers: Sequence[Any], where: str) -> dict[str, str]:
    """Return a pair of texts; without a prompt that is what both begin with."""
    chosen, rejected = (plain_text(answer, where, f"column '{name}'")
                        for name, answer in zip(("chosen", "rejected"), answers, strict=True))
    if prompt is not None:
        return {"prompt": plain_text(prompt, where, "column 'prompt'"), "chosen": chosen, "rejected": rejected}
    start = shared_text(chosen, rejected)
    return {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}


def conversations(prompt: Any, answers: Sequence[Any], where: str
                  ) -> tuple[list[Message], list[Message], list[Message]]:
    """Return the messages before the answers, and those of each."""
    chosen, rejected = (checked(answer, where, name) for name, answer in zip(("chosen", "rejected"), answers,
                                                                             strict=True))
    if is_conversation(prompt):
        before = checked(prompt, where, "prompt")
        start = len(before) if chosen[: len(before)] == rejected[: len(before)] == before else 0
        return before, chosen[start:], rejected[start:]
    start = 0
    while start < min(len(chosen), len(rejected)) - 1 and chosen[start] == rejected[start]:
        start += 1
    if start:
        return chosen[:start], chosen[start:], rejected[start:]
    if prompt is None:
        raise UserError(f"{where}: chosen and rejected begin with no common message, and there is no column 'prompt'")
    return [{"role": "user", "content": plain_text(prompt, where, "column 'prompt'")}], chosen, rejected


def shared_text(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning, up to the last space between words."""
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    while start > 0 and not one[start - 1].isspace():
        start -= 1
    return start


def encode(document: str, tokenizer: Any, longest: int, notes: Counter[str] | None = None) -> dict[str, Any] | None:
    """Return a normalized pair as token ids: prompt_ids, chosen_ids, rejected_ids, and length, of both sequences.

    Answers are cut at `longest` tokens. None for a pair that teaches nothing; `notes` counts why.
    """
    notes, found = Counter() if notes is None else notes, json.loads(document)
    both = [whole(found, name, document, tokenizer, notes) for name in ("chosen", "rejected")]
    start = min(made.loss_mask.index(True) if True in made.loss_mask else len(made.ids) for made in both)
    while start and both[0].ids[:start] != both[1].ids[:start]:  # where the template or the tokenizer joins them
        start -= 1
    chosen, rejected = (made.ids[start : 1 + max((place for place, learnt in enumerate(made.loss_mask) if learnt),
                                                 default=-1)] for made in both)
    room = longest - start
    if chosen == rejected:
        notes["a pair whose answers are the same is left out"] += 1
    elif not (start and chosen and rejected):
        notes["a pair without a prompt or an answer is left out"] += 1
    elif room < 1 or chosen[:room] == rejected[:room]:
        notes["a pair whose answers don't differ within a sequence is left out"] += 1
    else:
        if max(len(chosen), len(rejected)) > room:
            notes["a pair longer than a sequence, whose end is cut off"] += 1
        ids = {"prompt_ids": both[0].ids[:start], "chosen_ids": chosen[:room], "rejected_ids": rejected[:room]}
        return ids | {"length": 2 * start + len(ids["chosen_ids"]) + len(ids["rejected_ids"])}
    return None


def whole(found: dict[str, Any], name: str, document: str, tokenizer: Any, notes: Counter[str]) -> EncodedDocument:
    """Return a pair's prompt with one of its answers as tokens."""
    if isinstance(found["prompt"], str):
        text: dict[str, Any] = {"prompt": found["prompt"], "completion": found[name]}
    else:
        before, answer = found["prompt"], found[name]
        trained = [number for number, message in enumerate(answer, len(before)) if message["role"] == ASSISTANT]
        text = {"messages": [*before, *answer], "trained": trained} | (
            {"tools": found["tools"]} if "tools" in found else {})
    where = document.where if isinstance(document, Document) else ""
    return chat.encode(Document(json.dumps(text, ensure_ascii=False), where), tokenizer, notes)


def pieces(documents: Sequence[str], tokenizer: Any, longest: int, notes: Counter[str] | None
           ) -> Iterator[list[dict[str, Any]]]:
    """Yield each pair, as `encode` makes it, in a list of its own; an empty one for a pair that is left out."""
    for document in documents:
        made = encode(document, tokenizer, longest, notes)
        yield [made] if made else []
