"""Talk with a model: by its own chat template, or let it continue a text; answers come word by word.

    invoke chat
    python trainer/chat_with_model.py runs/20261124-020457-tiny/model
    python trainer/chat_with_model.py runs/20261124-020457-tiny/model --prompt "What is a pump?"

Ctrl-C ends an answer, Ctrl-D the chat. /new begins another conversation.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.errors import UserError
from trainer.flags.values import positive
from trainer.results.console import clean

if TYPE_CHECKING:
    from trainer.model.trained import TrainedModel

NEW, QUIT = ("/new", "/reset", "/clear"), ("/quit", "/exit", "/bye")


@dataclass
class Conversation:
    """What was said so far; of several voices each has its own."""

    system: str | None
    turns: list[dict[str, str]] = field(default_factory=list)

    def begin(self) -> None:
        """Forget it."""
        self.turns = [{"role": "system", "content": self.system}] if self.system else []


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser("chat_with_model.py", "%(prog)s MODEL [flags]", __doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("model", metavar="MODEL", help="a model's folder, an adapter's, or a Hugging Face name")
    add_chat_flags(parser)
    flag("--compare-with", metavar="MODEL", help="let this model answer too, before the other")
    flag("--plain", action="store_true", help="continue the text, whatever template the model has")
    return parser


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an answer."""
    flag = parser.add_argument
    flag("--prompt", metavar="TEXT", help="answer this and end; - reads it from standard input")
    flag("--base", metavar="FOLDER", help="an adapter's base, where it isn't where the adapter says")
    flag("--compare", action="store_true", help="let the base answer too, before the trained model")
    flag("--system", metavar="TEXT", help="what the conversation begins with, as the system's message")
    flag("--max-new-tokens", type=positive, default=512, metavar="N", help="tokens of an answer at most (512)")
    flag("--temperature", type=float, default=0.7, metavar="T", help="0: always the likeliest token (0.7)")
    flag("--top-p", type=float, default=0.95, metavar="P", help="choose among the likeliest tokens of this share (.95)")
    flag("--seed", type=int, metavar="S", help="make answers repeatable")


class Voice:
    """A model that answers: its name, and its own conversation."""

    def __init__(self, name: str, trained: TrainedModel, options: argparse.Namespace, as_base: bool = False) -> None:
        from trainer.model.loading import position_limit
        from trainer.model.trained import ends_of_answer

        self.name, self._trained, self._options, self._as_base = name, trained, options, as_base
        self.chats = bool(trained.tokenizer.chat_template) and not options.plain
        self._ends = ends_of_answer(trained, self.chats)
        self._limit = position_limit(trained.model.config)
        self.conversation = Conversation(options.system)
        self.conversation.begin()

    def answer(self, text: str) -> None:
        """Print the answer to a text as it comes; Ctrl-C ends it. Raises UserError for a text that is too long."""
        turns = self.conversation.turns
        turns.append({"role": "user", "content": text})
        ids = self._ids(text)
        said = Streamed(self._trained.tokenizer)
        try:
            self._generate(ids, said)
        except KeyboardInterrupt:
            print(" [...]", end="")
        print(flush=True)
        turns.append({"role": "assistant", "content": said.text})

    def _ids(self, text: str) -> Any:
        """Return the prompt's tokens, without the oldest turns where all don't fit."""
        tokenizer, turns = self._trained.tokenizer, self.conversation.turns
        room = self._limit - min(self._options.max_new_tokens, self._limit // 2)
        while True:
            if self.chats:
                ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt",
                                                    return_dict=True)["input_ids"]
            else:
                ids = tokenizer(text, return_tensors="pt").input_ids
            if ids.shape[1] <= room:
                return ids.to(self._trained.model.device)
            first = 1 if turns[0]["role"] == "system" else 0
            if not self.chats or len(turns) <= first + 1:
                turns.pop()
                raise UserError(f"{ids.shape[1]:,} tokens are too many: the model takes {room:,}")
            del turns[first : first + 2]

    def _generate(self, ids: Any, said: Streamed) -> None:
        import torch
        from transformers import GenerationConfig

        o, tokenizer = self._options, self._trained.tokenizer
        if o.seed is not None:
            torch.manual_seed(o.seed)
        room = min(o.max_new_tokens, self._limit - ids.shape[1])
        sampled = {"do_sample": True, "temperature": o.temperature, "top_p": o.top_p} if o.temperature > 0 else {}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._ends[0] if self._ends else None
        settings = GenerationConfig(max_new_tokens=room, eos_token_id=self._ends, pad_token_id=pad, use_cache=True,
                                    **sampled)
        with self._trained.as_base() if self._as_base else nullcontext(), torch.inference_mode():
            self._trained.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings,
                                         streamer=said)


class Streamed:
    """What a model says, printed as soon as its words are whole, cleaned of what would move a terminal's cursor."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._ids, self._prompt, self.text = tokenizer, list[int](), True, ""

    def put(self, value: Any) -> None:
        """Take the prompt first, then each token."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.reshape(-1).tolist()
        self._print(self._tokenizer.decode(self._ids, skip_special_tokens=True), whole=False)

    def end(self) -> None:
        """Print what is left."""
        self._print(self._tokenizer.decode(self._ids, skip_special_tokens=True), whole=True)

    def _print(self, text: str, whole: bool) -> None:
        if not whole and text.endswith("\ufffd"):  # a character whose bytes haven't all come
            return
        print(clean(text[len(self.text) :]), end="", flush=True)
        self.text = text


def voices_of(options: argparse.Namespace) -> list[Voice]:
    """Load who answers: the trained model last. Raises UserError."""
    from trainer.model.trained import best_device, load_trained

    device = best_device()
    trained = load_trained(options.model, device, options.base)
    voices = [Voice("trained", trained, options)]
    if options.compare_with:
        voices.insert(0, Voice("base", load_trained(options.compare_with, device), options))
    elif options.compare:
        if not trained.has_adapter:
            raise UserError("--compare: which base? --compare-with MODEL names it")
        voices.insert(0, Voice("base", trained, options, as_base=True))
    return voices


def answer_all(voices: Sequence[Voice], text: str) -> None:
    """Let every voice answer."""
    for voice in voices:
        if len(voices) > 1:
            print(f"[{voice.name}] ", end="", flush=True)
        voice.answer(text)


def talk(voices: Sequence[Voice]) -> None:
    """Ask for texts on the terminal until it ends."""
    how = "by its chat template" if voices[-1].chats else "it continues your text"
    print(f"Ctrl-C ends an answer, Ctrl-D the chat; {how}; /new begins anew", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the chat)", file=sys.stderr)
            continue
        if text in QUIT:
            return
        if text in NEW:
            for voice in voices:
                voice.conversation.begin()
        elif text:
            try:
                answer_all(voices, text)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Chat; return 0, 1 for a model that can't be loaded."""
    options = build_parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
        if not prompt:
            import readline  # noqa: F401, input() then has a history

        import transformers

        warnings.simplefilter("ignore")  # of libraries to each other
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        voices = voices_of(options)
        if prompt:
            answer_all(voices, prompt)
        else:
            talk(voices)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print()
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
