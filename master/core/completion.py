"""Completion in the shell: what may follow the words of a command line, and the scripts that ask for it.

    eval "$(./lanspeed completion bash)"
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from master.core.tool_parser import ToolParser, flags_of, takes_value

# Each asks the program that is typed; where it has nothing to say, the shell completes files.
SCRIPTS = {
    "bash": """_lanspeed() {
  local IFS=$'\\n'
  COMPREPLY=($(compgen -W "$("${COMP_WORDS[0]}" --complete -- "${COMP_WORDS[@]:0:COMP_CWORD+1}" 2>/dev/null)" -- \
"${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _lanspeed lanspeed ./lanspeed invoke inv""",
    "zsh": """(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }
_lanspeed() {
  local -a found
  found=(${(f)"$(${(Q)words[1]} --complete -- ${words[1,CURRENT]} 2>/dev/null)"})
  (( $#found )) && compadd -- $found || _files
}
compdef _lanspeed lanspeed ./lanspeed invoke inv""",
    "fish": """function __lanspeed
  set -l typed (commandline -opc) (commandline -ct)
  command $typed[1] --complete -- $typed 2>/dev/null
end
complete -c lanspeed -c invoke -c inv -a '(__lanspeed)'""",
}


def candidates(words: Sequence[str], task: str, parser: ToolParser | None, more: Iterable[str],
               takes_run: bool) -> list[str]:
    """Return what may stand in the place of the last word, [] where a file may.

    `words`: those of `task`, the last one unfinished; `more`: further flags that it takes; `takes_run`: so is a run
    folder.
    """
    if parser is None:
        return []
    before, last = (words[-2] if len(words) > 1 else task), words[-1]
    if last.startswith("-"):
        return [*flags_of(parser), *more, "--help"]
    if takes_value(before, parser):
        action = flags_of(parser).get(before)
        return [str(choice) for choice in (action.choices if action else None) or ()]
    return sorted((str(path) for path in Path("runs").glob("*-*-*")), reverse=True) if takes_run else []
