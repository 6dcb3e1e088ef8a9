"""`ssh/json_channel.py`: whatever a host prints, only objects with the key count; silence and an end are told apart."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest

from master.ssh.channel import ProcessChannel
from master.ssh.json_channel import JsonChannel
from master.ssh.route import SshError


def talk(shell: str, **how: Any) -> tuple[contextlib.closing[ProcessChannel], JsonChannel]:
    channel = ProcessChannel(["sh", "-c", shell], "gpu1")
    return contextlib.closing(channel), JsonChannel(channel, "gpu1", **{"script": "run_node", **how})


def all_of(shell: str, **how: Any) -> list[dict[str, Any]]:
    closing, heard = talk(shell, **how)
    found: list[dict[str, Any]] = []
    with closing:
        end = time.monotonic() + 60
        while not heard.ended:
            assert time.monotonic() < end
            found += heard.receive(1.0)
    return found


@pytest.mark.parametrize("noise", ["1", "null", "[1]", '"event"', '{"other": 1}', "{", "\\377\\376", "", "[" * 9000,
                                   "Welcome to gpu1"])
def test_what_a_start_up_file_prints_is_passed_over(noise: str) -> None:
    assert all_of(f"printf '{noise}\\n'; echo '{{\"event\": \"beat\"}}'; printf '{noise}\\n'") == [{"event": "beat"}]


def test_lines_come_in_any_pieces_and_with_a_mark() -> None:
    assert all_of("printf '{\"event\"'; sleep 0.2; printf ': \"beat\"}\\n{\"event\": \"beat\"}\\n{\"ev'") == [
        {"event": "beat"}, {"event": "beat"}]
    there = {"event": "sees", "there": True}
    assert all_of(f"echo '{json.dumps({**there, 'there': False})}'; echo '@@M {json.dumps(there)}'",
                  script="receive_files", mark=b"@@M ") == [there]


def test_both_sides_speak_and_silence_is_no_end() -> None:
    closing, heard = talk("""read order; echo "$order"; read empty
                             echo '{"event": "failed", "n": 1, "text": "<'"$empty"'>"}'; sleep 60""")
    with closing:
        assert heard.receive(0.05) == [] and not heard.ended
        before = heard.last_heard
        heard.send({"event": "failed", "n": 1, "text": "x y"})
        assert heard.receive(30) == [{"event": "failed", "n": 1, "text": "x y"}] and heard.last_heard > before
        heard.send({})
        assert heard.receive(30) == [{"event": "failed", "n": 1, "text": "<>"}]


def test_a_line_without_end_is_refused() -> None:
    with pytest.raises(SshError, match="a line of its output has more than 64 KiB"):
        all_of("head -c 300000 /dev/zero | tr '\\0' x; sleep 60")
