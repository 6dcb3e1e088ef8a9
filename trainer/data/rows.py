"""Rows in one normal form: which columns hold a document, and what may stand in them. Nothing after it guesses.

Plain text is a column `text`. Conversations are `messages` (or ShareGPT's `conversations`), `prompt` + `completion`,
and Alpaca's `instruction`, `input`, `output`, with the columns that belong to them: `system`, `tools`, `history`. Pairs
of answers are `chosen` and `rejected` (preferences.py). A row that fits none of these is refused by file and line; what
is left out or replaced is counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from trainer.data.values import content_text, object_or_json, plain_text, tool_call, tool_definitions
from trainer.errors import UserError

TEXT, MESSAGES, PAIRS, ALPACA, SHAREGPT = "text", "messages", "prompt + completion", "instruction + output", \
    "conversations"
PREFERENCES = "chosen + rejected"
COLUMNS = {MESSAGES: ("messages",), PAIRS: ("prompt", "completion"), ALPACA: ("instruction", "output"),
           SHAREGPT: ("conversations",), PREFERENCES: ("chosen", "rejected")}
# Columns that belong to a form's rows where they are there.
MORE_COLUMNS = {MESSAGES: ("system", "tools", "functions"), PAIRS: ("tools",),
                ALPACA: ("input", "system", "history", "tools"), SHAREGPT: ("system", "tools", "functions"),
                PREFERENCES: ("prompt", "system", "tools")}
# What files call the speakers, in lower case, and what templates do. `developer` is the chat template's matter.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
         "model": "assistant", "assistant": "assistant", "system": "system", "developer": "developer", "tool": "tool",
         "observation": "tool", "function_response": "tool", "function": "tool", "ipython": "tool",
         "function_call": "function_call"}
ASSISTANT = "assistant"
WEIGHTS = ("weight", "train", "loss")  # keys of a message that say whether it is trained
Message = dict[str, Any]


def form_of(columns: Iterable[str], method: str | None = None) -> str | None:
    """Return the form of rows with these columns, None for one that isn't known; `method`: sft or dpo, None: any."""
    names = set(columns)
    return next((form for form, wanted in COLUMNS.items() if names.issuperset(wanted)
                 and method in (None, "dpo" if form == PREFERENCES else "sft")), None)


def settled_form(columns: Iterable[str], column: str, method: str | None, where: str) -> str:
    """Return the form that rows with these columns are read in; text in a `column` of its own comes first.

    Raises UserError where they are good for two methods, or not for the one that was asked for.
    """
    names = set(columns)
    text = TEXT if column in names and method != "dpo" else None
    pairs, other = form_of(names, "dpo"), text or form_of(names, "sft")
    if method == "dpo" and not pairs:
        raise UserError(f"{where}: --method dpo needs columns chosen and rejected, and perhaps prompt; here are "
                        + ", ".join(sorted(map(str, names))[:20]))
    if method is None and pairs and other:
        raise UserError(f"{where}: columns for two methods, {other} and {pairs}: say which: --method sft or --method "
                        "dpo")
    return (pairs if method != "sft" else None) or other or TEXT


def columns_of(form: str) -> tuple[str, ...]:
    """Return the columns that rows of a form are read from, those that they must have first."""
    return COLUMNS[form] + MORE_COLUMNS[form]


def normalized(row: dict[str, Any], form: str, where: str, notes: Counter[str] | None = None) -> str:
    """Return a row as JSON: {"messages": [...], "trained": [numbers], "tools": [...]}, or {"prompt", "completion"}.

    `trained` are the numbers (from 0) of the messages that are trained. '' for a row whose weights leave none. Raises
    UserError for a row of another shape.
    """
    notes = Counter() if notes is None else notes
    tools = tool_definitions(row.get("tools") or row.get("functions"), where)
    if form == PAIRS:
        prompt, completion = row.get("prompt"), row.get("completion")
        if not is_conversation(prompt) and not is_conversation(completion):
            if tools:
                raise UserError(f"{where}: column 'tools' needs a conversation: prompt and completion are plain text")
            texts = {"prompt": plain_text(prompt, where, "column 'prompt'"),
                     "completion": plain_text(completion, where, "column 'completion'")}
            return json.dumps(texts, ensure_ascii=False)
        before = checked(prompt, where, "prompt")
        return packed([*before, *checked(completion, where, "completion")], len(before), tools, where, notes)
    if form == ALPACA:
        return packed(alpaca(row, where, notes), 0, tools, where, notes)
    messages = checked(row.get(COLUMNS[form][0]), where, COLUMNS[form][0])
    return packed(with_system(messages, row.get("system"), where), 0, tools, where, notes)


def alpaca(row: dict[str, Any], where: str, notes: Counter[str]) -> list[Message]:
    """Return the messages of a row with an instruction, perhaps an input, what was said before, and an output."""
    texts = {name: plain_text(row[name], where, f"column '{name}'") for name in ("instruction", "input")
             if row.get(name) is not None}
    answer = plain_text(row.get("output"), where, "column 'output'")
    if not answer:
        notes["an empty output: only its end is trained"] += 1
    question = "\n\n".join(text for text in texts.values() if text)
    messages: list[Message] = []
    history = object_or_json(row.get("history")) or []
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise UserError(f"{where}: column 'history' is no list of [question, answer]")
    for asked, said in [*history, (question, answer)]:
        messages += [{"role": "user", "content": plain_text(asked, where, "column 'history'")},
                     {"role": ASSISTANT, "content": plain_text(said, where, "column 'history'")}]
    return with_system(messages, row.get("system"), where)


def with_system(messages: list[Message], system: Any, where: str) -> list[Message]:
    """Return messages with the column `system` in front; raise UserError if they begin with another one."""
    text = "" if system is None else plain_text(system, where, "column 'system'")
    if not text:
        return messages
    if messages[0]["role"] in ("system", "developer"):
        if messages[0].get("content") != text:
            raise UserError(f"{where}: column 'system' and message 1 are two system prompts")
        return messages
    return [{"role": "system", "content": text}, *messages]


def is_conversation(value: Any) -> bool:
    """Return whether a prompt or completion is a list of messages, perhaps as JSON, and not plain text."""
    found = object_or_json(value)
    return isinstance(found, list) and (not isinstance(value, str) or any(
        isinstance(one, dict) and "role" in one for one in found))


def checked(messages: Any, where: str, column: str) -> list[Message]:
    """Return messages in the normal form; raise UserError for anything else."""
    messages = object_or_json(messages)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: column '{column}' is no list of messages with role and content")
    return [message_of(message, f"{where}: message {number}") for number, message in enumerate(messages, 1)]


def message_of(message: Any, where: str) -> Message:
    """Return a message with a known role, its content as text, its tool calls as objects."""
    if not isinstance(message, dict):
        raise UserError(f"{where} is a {type(message).__name__}, not an object with role and content")
    message = {name: value for name, value in message.items() if value is not None}
    if "from" in message and "role" not in message:  # ShareGPT's names
        message["role"] = message.pop("from")
        if "value" in message:
            message["content"] = message.pop("value")
    said = message.get("role")
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise UserError(f"{where} has the role {said!r}: system, user, assistant or tool are known")
    content = message.get("content")
    if role == "function_call":
        return {"role": ASSISTANT, "content": "", "tool_calls": [tool_call(content, where)]}
    legacy = [message.pop("function_call")] if "function_call" in message else []  # as OpenAI's files had it
    calls = object_or_json(message.get("tool_calls")) or legacy
    if not isinstance(calls, list):
        raise UserError(f"{where}: its tool_calls are no list")
    if content is None and not calls:
        raise UserError(f"{where} ({role}) has no content")
    text = "" if content is None else content_text(content, where)
    message |= {"role": role, "content": text}
    message.pop("tool_calls", None)
    return message | ({"tool_calls": [tool_call(call, where) for call in calls]} if calls else {})


def packed(messages: Sequence[Message], first: int, tools: list[Any], where: str, notes: Counter[str]) -> str:
    """Return messages as JSON, those of the assistant from number `first` on trained.

    Raises UserError if none of them is the assistant's to learn.
    """
    numbers = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT and number >= first]
    if not numbers:
        raise UserError(f"{where}: no assistant message, so there is nothing to train on")
    trained = [number for number in numbers if is_trained(messages[number], f"{where}: message {number + 1}")]
    if not trained:
        notes["a row whose messages all have weight 0 is left out"] += 1
        return ""
    kept = [{name: value for name, value in message.items() if name not in WEIGHTS} for message in messages]
    found = {"messages": kept, "trained": trained} | ({"tools": tools} if tools else {})
    return json.dumps(found, ensure_ascii=False)


def is_trained(message: Message, where: str) -> bool:
    """Return whether a message is trained: unless a key `weight`, `train` or `loss` is 0 or false."""
    for name in WEIGHTS:
        if name in message and message[name] not in (0, 1):
            raise UserError(f"{where}: its {name} is {message[name]!r}: 0 and 1 are known")
    return all(message.get(name, 1) for name in WEIGHTS)
