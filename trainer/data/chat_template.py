"""How a tokenizer's chat template shows a conversation, and where in its text each of the assistant's turns stands.

Where a turn stands is never guessed: where it can't be told, the conversation is refused.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from trainer.bounds import MAX_TEXT
from trainer.data.rows import ASSISTANT, Message
from trainer.errors import UserError, first_line

Span = tuple[int, int]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # by which a template says itself what the assistant generates
MARKER = re.compile(r"<[^<>\s]*>?|\[[^\[\]\s]*\]?")  # how templates write the ends and beginnings of turns
# In place of a turn, to see what stands around it: digits, which no template writes otherwise.
STAND_INS = ("904173658226", "168305927744")
SHORT = {"id", "name", "role", "tool_call_id", "type", "content", "tool_calls"}  # keys of a message that aren't text


class Conversation:
    """Messages and tools, and how a tokenizer's template shows them."""

    def __init__(self, tokenizer: Any, messages: Sequence[Message], tools: list[Any] | None) -> None:
        self._tokenizer, self._tools = tokenizer, tools or None
        self._prompts: bool | None = None  # asked of the template once: it is the same at each turn
        self._template = str(tokenizer.get_chat_template(tools=self._tools))
        self.messages = [message if message["role"] != "developer" or "developer" in self._template
                         else message | {"role": "system"} for message in messages]
        try:
            self.text = self.render(self.messages)
            as_objects = not any(str(arguments) in self.text for arguments in self._arguments())
        except TypeError:
            as_objects = False
        if not as_objects:  # a template that puts arguments beside other text wants them as JSON
            self.messages = [arguments_as_json(message) for message in self.messages]
            self.text = self.render(self.messages)

    def _arguments(self) -> list[dict[str, Any]]:
        """Return the arguments of all tool calls that are objects with something in them."""
        found = [call["function"]["arguments"] for message in self.messages for call in message.get("tool_calls", [])]
        return [arguments for arguments in found if isinstance(arguments, dict) and arguments]

    def render(self, messages: Sequence[Message], prompt: bool = False, tools: list[Any] | None = None) -> str:
        """Return messages as the template shows them; with `prompt` up to where the assistant begins to speak.

        Raises UserError where the template refuses them, or fails; TypeError where it wants other values.
        """
        try:
            text = str(self._tokenizer.apply_chat_template(list(messages), tools=tools or self._tools, tokenize=False,
                                                           add_generation_prompt=prompt))
            if len(text) > MAX_TEXT:
                raise MemoryError
            return text
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may end in anything
            if isinstance(error, TypeError) and self._arguments():
                raise
            raise UserError(f"the chat template refuses this conversation: {first_line(error)}") from None

    def trained(self, numbers: Sequence[int], notes: Counter[str]) -> tuple[str, list[Span]]:
        """Return the text, and where in it stands what the assistant says in the messages of these numbers.

        Raises UserError where the template doesn't show a message, or in a way that leaves open where.
        """
        self._check_shown(notes)
        marked = GENERATION.search(self._template)
        spans = self._marked_spans(numbers) if marked else [self._span(number) for number in numbers]
        for before, after in itertools.pairwise(spans):
            if before[1] > after[0]:
                raise UserError("the chat template shows the assistant's messages in another order")
        return self.text, spans

    def _check_shown(self, notes: Counter[str]) -> None:
        """Raise a UserError for a message that the template leaves out; note other values that it leaves out.

        Each content and function's name is replaced by something that stands nowhere else.
        """
        marks = [f"{STAND_INS[0]}{number:04}" for number in range(len(self.messages))]
        replaced = [message | {"content": mark} | named_calls(message, STAND_INS[1] + mark)
                    for message, mark in zip(self.messages, marks, strict=True)]
        tools = [named(tool, STAND_INS[1]) for tool in self._tools or []]
        shown = self._attempt(lambda: self.render(replaced, tools=tools))
        for number, (message, mark) in enumerate(zip(self.messages, marks, strict=True)):
            words = message["content"].strip()
            if words and not (mark in shown if shown else words in self.text):
                raise UserError(f"the chat template doesn't show message {number + 1} ({message['role']})")
            for call in message.get("tool_calls", []):
                if not (STAND_INS[1] + mark in shown if shown else call["function"]["name"] in self.text):
                    raise UserError(f"the chat template doesn't show the tool calls of message {number + 1}")
            for name, value in message.items():
                if name not in SHORT and isinstance(value, str) and value.strip() and value.strip() not in self.text:
                    notes[f"'{name}' of a message isn't shown by the chat template"] += 1
        if tools and shown and not re.search(rf"{STAND_INS[1]}(?!\d)", shown):
            notes["tools aren't shown by the chat template"] += 1

    def _with(self, number: int, words: str, alone: bool = False) -> str | None:
        """Return the text with other words in place of the assistant's message, as the last one if `alone`."""
        message = {"role": ASSISTANT, "content": words}
        after = [] if alone else self.messages[number + 1 :]
        shown = self._attempt(lambda: self.render([*self.messages[:number], message, *after]))
        return shown if shown is not None and shown.count(words) == 1 else None

    def _marked_spans(self, numbers: Sequence[int]) -> list[Span]:
        """Return the spans that the template itself marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        made: Any = render_jinja_template(
            conversations=[list(self.messages)], tools=self._tools, chat_template=self._template,
            return_assistant_tokens_mask=True, **self._tokenizer.special_tokens_map)
        found: list[Span] = made[1][0]
        turns = [number for number, message in enumerate(self.messages) if message["role"] == ASSISTANT]
        if len(found) != len(turns):
            raise UserError(f"the chat template marks {len(found)} turns as generated, of {len(turns)} that the "
                            "assistant has")
        return [span for turn, span in zip(turns, found, strict=True) if turn in numbers]

    def _span(self, number: int) -> Span:
        """Return where the assistant's message `number` stands in the text, its end mark included.

        Mostly the text up to it is the generation prompt's, and the text with it the conversation's beginning.
        """
        before = after = None
        if number and self._has_prompt(number):
            before = self._attempt(lambda: self.render(self.messages[:number], prompt=True))
        if before is not None:
            last = number == len(self.messages) - 1
            after = self.text if last else self._attempt(lambda: self.render(self.messages[: number + 1]))
        if before is not None and after is not None and self.text.startswith(before) and self.text.startswith(after):
            return len(before), len(after.rstrip())
        return self._framed_span(number, before)

    def _has_prompt(self, number: int) -> bool:
        """Return whether the template shows where the assistant begins to speak; `number`: of one of its messages."""
        if self._prompts is None:
            ends = [self._attempt(lambda prompt=prompt: self.render(self.messages[:number], prompt))  # type: ignore[misc]
                    for prompt in (True, False)]
            self._prompts = ends[0] != ends[1]
        return self._prompts

    def _framed_span(self, number: int, before: str | None) -> Span:
        """Return the span of a message that is shown otherwise where more follows, as some do with thoughts.

        It is what stands between the parts of the text that stay when the message is replaced by another.
        """
        frames = [self._with(number, words) for words in STAND_INS]
        if frames[0] is None or frames[1] is None:
            raise UserError(f"the chat template leaves open where message {number + 1} (assistant) stands")
        head, tail = frames[0].split(STAND_INS[0])
        if frames[1].split(STAND_INS[1]) != [head, tail] or not (
                self.text.startswith(head) and self.text[len(head) :].endswith(tail)):
            raise UserError(f"the chat template shows message {number + 1} (assistant) with other words around it")
        start = len(before) if before is not None and self.text.startswith(before) else len(head)
        end = len(self.text) - len(tail)
        if number == len(self.messages) - 1:
            return start, end + len(tail.rstrip())
        alone = self._with(number, STAND_INS[0], alone=True)
        return start, end + len(end_mark(alone.split(STAND_INS[0])[1] if alone else "", tail, self._tokenizer))

    @staticmethod
    def _attempt(render: Callable[[], str]) -> str | None:
        """Return what is rendered, None where the template refuses it."""
        try:
            return render()
        except (UserError, TypeError):
            return None


def end_mark(alone: str, tail: str, tokenizer: Any) -> str:
    """Return what ends a turn: how what follows it begins both where it comes last and where others follow.

    Marks that only begin alike are no part of it.
    """
    size = next((place for place, pair in enumerate(zip(alone, tail, strict=False)) if pair[0] != pair[1]),
                min(len(alone), len(tail)))
    special = "|".join(map(re.escape, sorted(tokenizer.all_special_tokens, key=len, reverse=True)))
    for text in (alone, tail):
        for pattern in (MARKER, *([re.compile(special)] if special else [])):
            for found in pattern.finditer(text):
                if found.start() < size < found.end():
                    size = found.start()
    return tail[:size].rstrip()


def arguments_as_json(message: Message) -> Message:
    """Return a message whose tool calls have their arguments as JSON text."""
    calls = [call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
             for call in message.get("tool_calls", [])]
    return message | {"tool_calls": calls} if calls else message


def named(holder: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a tool's definition, or a call, with another function's name."""
    if isinstance(holder.get("function"), dict):
        return holder | {"function": holder["function"] | {"name": name}}
    return holder | {"name": name}


def named_calls(message: Message, name: str) -> Message:
    """Return the tool calls of a message, if it has any, with another function's name."""
    return {"tool_calls": [named(call, name) for call in message["tool_calls"]]} if "tool_calls" in message else {}
