"""Instruction data: which columns hold it, how the tokenizer's chat template shows it, and which tokens are trained.

Loss is on what the assistant says, with the mark that ends its turn; everything else is only read. Recognised are
`messages` (or ShareGPT's `conversations`), `prompt` + `completion`, and Alpaca's `instruction`, `input`, `output`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.documents import text_of
from trainer.errors import UserError

TEXT, MESSAGES, PAIRS, ALPACA, SHAREGPT = "text", "messages", "prompt + completion", "instruction + output", \
    "conversations"
COLUMNS = {MESSAGES: ("messages",), PAIRS: ("prompt", "completion"), ALPACA: ("instruction", "output"),
           SHAREGPT: ("conversations",)}
# What ShareGPT's files call the speakers, and what templates do.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
         "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool"}
ASSISTANT = "assistant"
UNKNOWN = "\0"  # in place of a text: no other begins with it
Message = dict[str, Any]


@dataclass(frozen=True)
class EncodedDocument:
    """A document as the model sees it: token ids, whether each is trained on (loss_mask), the UTF-8 bytes that each
    stands for."""

    ids: list[int]
    loss_mask: list[bool]
    sizes: list[int]


class DocumentExtractor:
    """Takes the document out of each row of a source: a column's text, or a conversation as JSON.

    Without `column` the first row decides by the names of its columns; all others must be of the same form.
    """

    def __init__(self, column: str | None = None) -> None:
        self.column, self.form = column or "text", TEXT if column else None

    def columns(self, names: Sequence[str], where: str) -> list[str]:
        """Return those of a table's columns that a document is made of; raise UserError if it has none such."""
        form = self._settle(names)
        wanted = [self.column] if form == TEXT else list(columns_of(form))
        if wanted[0] not in names:
            text_of(dict.fromkeys(names), self.column, where)
        return [name for name in wanted if name in names]

    def __call__(self, row: Any, where: str) -> str:
        """Return a row's document, '' for an empty one; raise UserError for a row of another shape."""
        form = self._settle(row if isinstance(row, dict) else ["text"])
        if form == TEXT:
            return text_of(row, self.column, where)
        if not isinstance(row, dict) or form_of(row) != form:
            raise UserError(f"{where}: no {form}, which the rows before it have")
        return normalized(row, form, where)

    def _settle(self, names: Iterable[str]) -> str:
        if self.form is None:
            names = list(names)
            self.form = TEXT if self.column in names else form_of(names) or TEXT
        return self.form


def form_of(columns: Iterable[str]) -> str | None:
    """Return the form of rows with these columns, None for one that isn't known."""
    names = set(columns)
    return next((form for form, wanted in COLUMNS.items() if names.issuperset(wanted)), None)


def columns_of(form: str) -> tuple[str, ...]:
    """Return the columns that rows of a form are read from, those that they must have first."""
    return (*COLUMNS[form], *(("input", "system") if form == ALPACA else ()))


def normalized(row: dict[str, Any], form: str, where: str) -> str:
    """Return a row as JSON: {"messages": [...], "trained": n}, or {"prompt": text, "completion": text}.

    From message `trained` on the assistant's messages are trained. Raises UserError for a row of another shape.
    """
    if form == MESSAGES:
        return packed(checked(row.get("messages"), where, "messages"), 0, where)
    if form == SHAREGPT:
        turns = row.get("conversations")
        if isinstance(turns, list) and all(isinstance(turn, dict) and "from" in turn for turn in turns):
            turns = [{"role": ROLES.get(str(turn["from"]), f"?{turn['from']}"), "content": turn.get("value")}
                     for turn in turns]
        return packed(checked(turns, where, "conversations"), 0, where)
    if form == ALPACA:
        question = "\n\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name))
        messages = [{"role": "system", "content": str(row["system"])}] if row.get("system") else []
        messages += [{"role": "user", "content": question}, {"role": ASSISTANT, "content": str(row["output"] or "")}]
        return packed(messages, 0, where)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return json.dumps({"prompt": prompt, "completion": completion})
    before = checked(prompt, where, "prompt")
    return packed([*before, *checked(completion, where, "completion")], len(before), where)


def checked(messages: Any, where: str, column: str) -> list[Message]:
    """Return messages that have a role and words each; raise UserError for anything else."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: column '{column}' is no list of messages with role and content")
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role.startswith("?"):
            raise UserError(f"{where}: message {number} has the role {role.removeprefix('?') if role else role!r}: "
                            "system, user, assistant or tool are known")
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise UserError(f"{where}: message {number} ({role}) has no content")
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def packed(messages: Sequence[Message], trained: int, where: str) -> str:
    """Return messages as JSON; raise UserError if none of them is the assistant's to learn."""
    if not any(message["role"] == ASSISTANT for message in messages[trained:]):
        raise UserError(f"{where}: no assistant message, so there is nothing to train on")
    return json.dumps({"messages": list(messages), "trained": trained})


def conversation_text(document: str) -> str:
    """Return all words of a normalized document, for a tokenizer that is trained on them."""
    found = json.loads(document)
    if "prompt" in found:
        return str(found["prompt"]) + str(found["completion"])
    return "\n".join(str(message.get("content", "")) for message in found["messages"])


def encode(document: str, tokenizer: Any) -> EncodedDocument:
    """Return a normalized document's tokens. Raises UserError where the tokenizer has no template, or none that
    fits."""
    found = json.loads(document)
    if "prompt" in found:
        text = found["prompt"] + found["completion"]
        return tokenized(text, [(len(found["prompt"]), len(text))], tokenizer, special=True)
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: take the model's "
                        "instruct version, --chat_template FILE, or columns prompt and completion")
    text, spans = shown(found["messages"], found["trained"], tokenizer)
    return tokenized(text, spans, tokenizer, special=False)


def render(messages: Sequence[Message], tokenizer: Any, prompt: bool = False) -> str:
    """Return messages as the template shows them; with `prompt` up to where the assistant begins to speak."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))


def shown(messages: Sequence[Message], trained: int, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and where in it stands what the assistant says from message `trained` on.

    A turn is what is added to the conversation before it. Where a template shows that otherwise later on (without its
    thoughts, as some do), its words are looked for; a turn that isn't shown verbatim isn't trained.
    """
    import jinja2

    try:
        text = render(messages, tokenizer)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses a conversation: {error}") from None
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT or number < trained:
            continue
        try:
            before = render(messages[:number], tokenizer, prompt=True) if number else UNKNOWN
            after = text if number == len(messages) - 1 else render(messages[: number + 1], tokenizer)
        except jinja2.TemplateError:  # it wants to begin otherwise
            before = after = UNKNOWN
        words = str(message.get("content", "")).strip()
        start = len(before) if after.startswith(before) and text.startswith(after) else \
            text.find(words, spans[-1][1] if spans else 0)
        if start >= 0 and (words or after.startswith(before)):
            end = len(after) if text.startswith(after) else start + len(words)
            spans.append((start, start + len(text[start:end].rstrip())))
    if not spans:
        raise UserError("the chat template doesn't show the assistant's messages")
    return text, spans


def tokenized(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, special: bool) -> EncodedDocument:
    """Return the tokens of a text; those that have a part in a span are trained. `special`: it needs begin and end."""
    if not tokenizer.is_fast:
        raise UserError("this tokenizer can't tell where its tokens are in the text: instruction data needs a fast one")
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False,
                      verbose=False)
    ids, loss_mask, sizes = list(found["input_ids"]), [], []
    at = counted = 0
    for start, end in found["offset_mapping"]:
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
    elif end_token is not None and end_token not in spoken and ids and spans and spans[-1][1] == len(text.rstrip()):
        ids, loss_mask, sizes = [*ids, end_token], [*loss_mask, True], [*sizes, 0]
    return EncodedDocument(ids, loss_mask, sizes)
