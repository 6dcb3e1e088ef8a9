"""Conversations as tokens: the text that the chat template makes, and which of its tokens are trained.

Loss is on what the assistant says, with the mark that ends its turn; everything else is only read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.bounds import bounded_rendering
from trainer.data.chat_template import Conversation, Span
from trainer.data.documents import Document
from trainer.errors import UserError


@dataclass(frozen=True)
class EncodedDocument:
    """A document as the model sees it: token ids, whether each is trained on (loss_mask), the UTF-8 bytes that each
    stands for."""

    ids: list[int]
    loss_mask: list[bool]
    sizes: list[int]


def conversation_text(document: str) -> str:
    """Return all words of a normalized document, for a tokenizer that is trained on them."""
    found = json.loads(document)
    if "chosen" in found:
        found = {"prompt": found["prompt"], "completion": found["chosen"]} if isinstance(found["prompt"], str) else {
            **found, "messages": [*found["prompt"], *found["chosen"], *found["rejected"]]}
    if "completion" in found:
        return str(found["prompt"]) + str(found["completion"])
    calls = [json.dumps(call["function"]) for message in found["messages"] for call in message.get("tool_calls", [])]
    tools = [json.dumps(tool) for tool in found.get("tools", [])]
    return "\n".join([*tools, *(str(message["content"]) for message in found["messages"]), *calls])


def encode(document: str, tokenizer: Any, notes: Counter[str] | None = None) -> EncodedDocument:
    """Return a normalized document's tokens (see rows.normalized); `notes` counts what the template leaves out.

    Raises UserError, with the row's file and line, where the tokenizer has no template, or none that fits.
    """
    found = json.loads(document)
    if "prompt" in found:
        text = found["prompt"] + found["completion"]
        return tokenized(text, [(len(found["prompt"]), len(text))], tokenizer, special=True)
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: take the model's "
                        "instruct version, --chat_template FILE, or columns prompt and completion")
    try:
        with bounded_rendering():
            text, spans = Conversation(tokenizer, found["messages"], found.get("tools")).trained(
                found["trained"], Counter() if notes is None else notes)
    except UserError as error:
        where = document.where if isinstance(document, Document) else ""
        raise UserError(f"{where}: {error}" if where else str(error)) from None
    return tokenized(text, spans, tokenizer, special=False)


def tokenized(text: str, spans: Sequence[Span], tokenizer: Any, special: bool) -> EncodedDocument:
    """Return the tokens of a text; those that have a part in a span are trained. `special`: it needs begin and end."""
    if not tokenizer.is_fast:
        raise UserError("this tokenizer can't tell where its tokens are in the text: instruction data needs a fast one")
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False,
                      verbose=False)
    ids, places = without_doubles(list(found["input_ids"]), found["offset_mapping"], tokenizer)
    loss_mask, sizes = [], []
    at = counted = 0
    for start, end in places:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        inside = at < len(spans) and start < end and end > spans[at][0] and start < spans[at][1]
        loss_mask.append(inside)
        sizes.append(len(text[max(start, counted) : end].encode()))  # tokens of one character share its place
        counted = max(counted, end)
    end_token = tokenizer.eos_token_id
    spoken = {token for token, learnt in zip(ids, loss_mask, strict=True) if learnt}
    if special and end_token is not None and ids and ids[-1] == end_token:
        loss_mask[-1] = True  # where it ends is learnt too
    elif end_token is not None and ids and (special or (
            end_token not in spoken and spans and spans[-1][1] == len(text.rstrip()))):
        ids, loss_mask, sizes = [*ids, end_token], [*loss_mask, True], [*sizes, 0]
    return EncodedDocument(ids, loss_mask, sizes)


def without_doubles(ids: list[int], places: Sequence[Span], tokenizer: Any) -> tuple[list[int], Sequence[Span]]:
    """Return tokens without the begin and end tokens that a tokenizer adds to a text that brings its own.

    `places`: of each token in the text, (0, 0) for those that were added.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None and ids[:2] == [begin, begin] and places[0][0] == places[0][1]:
        ids, places = ids[1:], places[1:]
    if end is not None and ids[-2:] == [end, end] and places[-1][0] == places[-1][1]:
        ids, places = ids[:-1], places[:-1]
    return ids, places
