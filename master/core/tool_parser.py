"""The command line of a tool: help that opens with examples, every spelling of a flag, one line for a mistake.

    parser = ToolParser("check_cluster.py", __doc__, leading=("--nodes",))
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from master.core.terminal import say

# How other programs, the trainer among them, call what our tools know too.
OTHER_NAMES = {"--model-name-or-path": "--model", "--dataset-path": "--dataset", "--deepspeed-config": "--config"}


class ToolParser(argparse.ArgumentParser):
    """argparse as all tools use it.

    `leading`: flags that take the words before the first flag, one each, the last all others: `check gpu1 gpu2`.
    `typed_as`: what the user typed instead of the file's name, like "invoke check"; messages repeat it.
    """

    typed_as = ""

    def __init__(self, file: str, text: str | None, usage: str = "[flags]", leading: Sequence[str] = ()) -> None:
        super().__init__(ToolParser.typed_as or file, f"%(prog)s {usage}", text, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.leading, self.other_names = leading, OTHER_NAMES

    def word_or_flag(self, name: str, metavar: str, text: str) -> None:
        """Add an optional word that a flag of the same name may give too: `stop RUN`, `stop --run RUN`."""
        self.add_argument(name, nargs="?", metavar=metavar, help=text)
        self.add_argument(f"--{name}", dest=name, metavar=metavar, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse what this tool knows; return it and the other words."""
        words = self.spelled(list(sys.argv[1:] if args is None else args))
        return super().parse_known_args(self.with_leading(words), namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all words; exit with code 2 for one that isn't known."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.unknown(unknown[0]))
        return options

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit with code 2."""
        say(f"error: {message.removeprefix('argument ')} ({self.prog} --help)")
        raise SystemExit(2)

    def unknown(self, word: str) -> str:
        """Return what is said of a word that isn't known; of a flag without its value, which may be a password."""
        if not word.startswith("-"):
            return f"{word}: not expected here"
        name = word.partition("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, n=1)
        return f"no flag {name}" + (f": did you mean {near[0]}?" if near else "")

    def spelled(self, words: Sequence[str]) -> list[str]:
        """Return words with --some_flag as --some-flag (or the reverse) where only that is known; not after --."""
        cut = words.index("--") if "--" in words else len(words)
        return [self.known_spelling(word) for word in words[:cut]] + list(words[cut:])

    def known_spelling(self, word: str) -> str:
        """Return a flag as this tool spells it; any other word as it is."""
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        dashed = "--" + name[2:].replace("_", "-")
        for other in (dashed, "--" + name[2:].replace("-", "_"), self.other_names.get(dashed)):
            if other in self._option_string_actions:
                return other + equals + value
        return word

    def with_leading(self, words: list[str]) -> list[str]:
        """Return words with the flags before those that come first without one."""
        count = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
        if not self.leading or not count:
            return words
        first = [word for flag, word in zip(self.leading[:-1], words[:count], strict=False) for word in (flag, word)]
        rest = words[len(self.leading) - 1 : count]
        return [*first, *([self.leading[-1], *rest] if rest else []), *words[count:]]


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return a parser's flags, in the order of its help; of one with several names the first."""
    return {action.option_strings[0]: action for action in parser._actions
            if action.option_strings and action.help is not argparse.SUPPRESS}


def takes_value(word: str, parser: ToolParser) -> bool:
    """Return whether the word after this one is its value; of an unknown flag that is likely."""
    if not word.startswith("--") or "=" in word:
        return False
    action = parser._option_string_actions.get(parser.known_spelling(word))
    return action is None or action.nargs != 0
