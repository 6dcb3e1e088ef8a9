"""Ollama's Modelfile for a GGUF file: its chat template in Go's form, what ends an answer.

A chat template is a program; what it writes around each message is found by having it write some. The form that comes
of it is used only where it writes the same as the template for several conversations.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.export.vocabulary import begins_texts

Turns = Sequence[tuple[str, str]]
S, U, A, V = "\u2042system\u2042", "\u2042first\u2042", "\u2042answer\u2042", "\u2042second\u2042"
MOST_CONTEXT = 8192  # tokens that Ollama keeps memory for, unless it is asked for more
ASKED: tuple[Turns, ...] = (
    (("user", "Hi"),), (("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?")),
    (("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?"), ("assistant", "So."), ("user", "Ah")),
    (("system", "Be kind."), ("user", "Hi")),
    (("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?"), ("assistant", "So."),
     ("user", "Ah")))


@dataclass(frozen=True)
class Around:
    """What a template writes around messages; `start`: before a conversation without a system's message; `system`: the
    message that it then has of its own.
    """

    start: str
    before_system: str
    after_system: str
    before_user: str
    before_answer: str
    after_answer: str
    asks: str  # behind the last message: it asks for an answer
    system: str = ""

    def written(self, turns: Turns) -> str:
        """Return a conversation as the Go template writes it, up to the answer that is wanted."""
        system = turns[0][1] if turns[0][0] == "system" else self.system
        text = self.before_system + system + self.after_system if system else self.start
        for role, content in turns:
            if role == "user":
                text += self.before_user + content
            elif role == "assistant":
                text += self.before_answer + content + self.after_answer
        return text + self.asks

    def go(self) -> str:
        """Return the Go template."""
        first = quoted(self.start)
        if self.before_system or self.after_system:
            first = ("{{ if .System }}" + quoted(self.before_system) + "{{ .System }}" + quoted(self.after_system)
                     + ("{{ else }}" + first if first else "") + "{{ end }}")
        user, answer = quoted(self.before_user) + "{{ .Content }}", quoted(self.before_answer) + "{{ .Content }}"
        return (first + '{{ range .Messages }}{{ if eq .Role "user" }}' + user + '{{ else if eq .Role "assistant" }}'
                + answer + quoted(self.after_answer) + "{{ end }}{{ end }}" + quoted(self.asks))


def quoted(text: str) -> str:
    """Return a text that a Go template writes as it is."""
    return text.replace("{{", '{{ "{{" }}')


def rendered(tokenizer: Any, turns: Turns) -> str:
    """Return what the chat template writes for a conversation, without the token that is put before every text."""
    text: str = tokenizer.apply_chat_template([{"role": role, "content": content} for role, content in turns],
                                              tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if begins_texts(tokenizer) else text


def around(tokenizer: Any) -> Around | None:
    """Return what a tokenizer's chat template writes around messages, None where that can't be said so."""
    for with_system in (True, False):  # some templates refuse a system's message, or put it into the user's
        asked = [turns for turns in ASKED if with_system or turns[0][0] != "system"]
        with contextlib.suppress(Exception):  # a template is a program, and may raise anything
            found = split(tokenizer, with_system)
            if all(found.written(turns) == rendered(tokenizer, turns) for turns in asked):
                return found
    return None


def split(tokenizer: Any, with_system: bool) -> Around:
    """Return the parts of conversations that were written with marks. Raises ValueError where a mark is missing."""
    start, _ = rendered(tokenizer, [("user", U)]).split(U)
    system: Turns = [("system", S)] if with_system else []
    text = rendered(tokenizer, [*system, ("user", U), ("assistant", A), ("user", V)])
    head, rest = text.split(U)
    before_answer, rest = rest.split(A)
    between, asks = rest.split(V)
    before_user = common_end(start, between)
    after_answer, start = between.removesuffix(before_user), start.removesuffix(before_user)
    if not with_system:
        return Around(start, "", "", before_user, before_answer, after_answer, asks)
    before_system, after_system = head.removesuffix(before_user).split(S)
    own = start.removeprefix(before_system).removesuffix(after_system)
    if not (before_system and own and start == before_system + own + after_system):
        own = ""
    return Around(start, before_system, after_system, before_user, before_answer, after_answer, asks, own)


def common_end(one: str, other: str) -> str:
    """Return the longest text that both end with."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False))
    return "".join(letter for letter, _ in same)[::-1]


def modelfile(file: str, tokenizer: Any, ends: Sequence[int], chats: bool, limit: int) -> tuple[str, bool]:
    """Return the Modelfile, and whether it has a template. `ends`: the tokens that end an answer; `chats`: it was
    trained with conversations; `limit`: the tokens that the model has positions for."""
    lines = [f"FROM ./{file}"]
    found = around(tokenizer) if chats else None
    form = found.go() if found else "" if chats else "{{ .Prompt }}"
    has_template = bool(form) and '"""' not in form
    if has_template:
        lines.append(f'TEMPLATE """{form}"""')
    if found and found.system and '"""' not in found.system:
        lines.append(f'SYSTEM """{found.system}"""')
    stops = [tokenizer.decode([end]) for end in ends]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop.isprintable() and '"' not in stop]
    lines.append(f"PARAMETER num_ctx {min(limit, MOST_CONTEXT)}")
    return "\n".join(lines) + "\n", has_template
