"""A host that was taken over: a real sshd that says whatever it likes. It costs itself, and nothing else.

Every kind of message of every script in worker/ is tried, with each wrong type and size, made from the schema that the
readers use. What counts: exit 0 or 1 with one line, no file elsewhere, no control character, little memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from archives import archive, links_past_path_max, member
from hostile import ESCAPES, extreme, wrong
from ssh_server import SshClient, SshServer
from terminal import type_into

from master.core.json_schema import first_error
from master.inventory.node_facts import local_facts
from master.ssh.json_channel import JsonChannel
from master.ssh.node_names import parse_node
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import run_on_all
from master.ssh.session import Session
from master.ssh.worker_message import SCHEMA, check_message

ROOT = Path(__file__).resolve().parents[2]
DEFINITIONS = json.loads(SCHEMA.read_text())["$defs"]
EVENTS = [kind for kind in DEFINITIONS if "." in kind]
MEMORY_KB = 300 << 10
# Runs a command and writes its peak memory; a process that is started by a large one counts that one's as its own.
MEASURED = """
import pathlib, resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
pathlib.Path(sys.argv[1]).write_text(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""
CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xa8-\xae]")
pytestmark = pytest.mark.needs("sshd", "ssh", "ssh-keygen")


class Evil:
    """The host "evil": `answers` says what its scripts print, `tool` runs one of ours against it."""

    def __init__(self, folder: Path) -> None:
        self.plan = folder / "evil.json"
        self.server = SshServer(folder / "evil", command=f"{sys.executable} {ROOT}/tests/evil_host.py {self.plan}")
        self.client = SshClient(folder / "client", evil=self.server)
        self.client.trust(self.server)
        self.answers({})

    @property
    def options(self) -> SshOptions:
        """How it is reached."""
        return SshOptions(ssh_config=self.client.config)

    def answers(self, answers: dict[str, list[Any]], **how: bool) -> None:
        """Have scripts print these: texts, or [times, text]; `how` is evil_host.py's."""
        sizes = {str(path.stat().st_size): path.stem for path in (ROOT / "worker").glob("*.py")}
        self.plan.write_text(json.dumps({"sizes": sizes, "answers": answers, **how}))

    def tool(self, name: str, *words: str, cwd: Path) -> tuple[int, bytes, bytes]:
        """Run a tool; return its exit code and what it printed. It must keep to its memory."""
        command = [sys.executable, str(ROOT / "master" / f"{name}.py"), *words, "--ssh-config", str(self.client.config)]
        with (cwd / "out").open("wb") as out, (cwd / "err").open("wb") as err:
            done = subprocess.run([sys.executable, "-c", MEASURED, str(cwd / "used"), *command], cwd=cwd,
                                  stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        used = int((cwd / "used").read_text())
        assert used < MEMORY_KB, f"{used >> 10} MiB"
        return done.returncode, (cwd / "out").read_bytes(), (cwd / "err").read_bytes()


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A host that somebody has taken over."""
    host = Evil(tmp_path_factory.mktemp("evil"))
    with host.server:
        yield host


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working folder with a hostfile of this host."""
    (tmp_path / "hostfile.txt").write_text("evil slots=1 type=CPU\n")
    return tmp_path


def line(value: Any, mark: str = "") -> str:
    """A line of a script, as bytes are kept in JSON."""
    return f"\n{mark}{json.dumps(value)}\n"


def honest_facts(**other: Any) -> str:
    """This machine's facts with some changed, as a line."""
    facts = local_facts({"folder": str(ROOT), "paths": [], "more": True, "port": 29500})
    return line({**facts, "address": "127.0.0.1", **other}, "@@NODE_FACTS ")


def is_noise(value: Any) -> bool:
    """Whether a value isn't JSON at all, or too large a number for Python to read."""
    return bool(re.search(r"\bnan\b|\binf\b|\d{400}", repr(value)))


def test_each_wrong_message_is_refused_by_name(evil: Evil) -> None:
    """All of them over one connection: a command each, read by the one reader."""
    cases = [(kind, value) for kind in EVENTS for value in wrong(DEFINITIONS[kind], extreme(DEFINITIONS[kind], True))
             if len(repr(value)) < 20_000 and "<class" not in repr(value)]
    assert {kind for kind, _ in cases} == set(EVENTS) and len(cases) > 300

    def work(session: Session) -> list[str]:
        taken = []
        evil.answers({"tar": [line(value) for _, value in cases]}, lockstep=True)
        channel = session.open("tar -cf -")
        for kind, value in cases:
            heard = JsonChannel(channel, "evil", kind.partition(".")[0])
            heard.send({})
            try:
                # what isn't JSON (NaN) is passed over, as any other noise
                taken += [f"{kind}: {value}"] * len(heard.receive(0.01 if is_noise(value) else 20))
            except SshError as error:
                assert str(error).isprintable() and len(str(error)) < 600
        channel.close()
        return taken

    found = run_on_all([parse_node("evil")], evil.options, work)[parse_node("evil")]
    assert found == [], found


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_every_kind_has_cases(kind: str) -> None:
    for high in (False, True):
        value = extreme(DEFINITIONS[kind], high)
        assert first_error(SCHEMA, value, kind) is None, f"{kind}: {first_error(SCHEMA, value, kind)}"
    refused = [value for value in wrong(DEFINITIONS[kind], extreme(DEFINITIONS[kind], True))]
    assert refused or list(DEFINITIONS[kind]["properties"]) == ["event"]
    for value in refused:
        with pytest.raises(SshError, match="makes no sense"):
            check_message(kind, value, "evil")


def seen(evil: Evil, place: Path, name: str, *words: str) -> str:
    """What a tool says of this host, once everything that may not happen is seen not to have."""
    before = files_of(place)
    code, out, err = evil.tool(name, *words, cwd=place)
    text = (out + err).decode()
    assert code in (0, 1), text
    assert not CONTROL.search(out + err), CONTROL.search(out + err)
    assert "Traceback" not in text and "internal:" not in text, text
    new = {path.split("/")[0] for path in files_of(place) - before}
    assert new <= {"runs", "out", "err", "used", "cluster.json", ".cluster.json.lock"}, new
    for path in place.rglob("*.log"):
        assert not CONTROL.search(path.read_bytes())
    for path in place.rglob("metrics.jsonl"):
        assert not CONTROL.search(path.read_bytes())
    return text


def files_of(folder: Path) -> set[str]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


TRAIN = ("launch_training", "--hostfile", "hostfile.txt", "--model", "tiny", "--grace", "1")
STARTED = {"event": "started", "pid": 1, "interface": None, "host": "h"}
ENDED = {"event": "ended", "code": 0, "reason": "", "ranks": {"0": 0}, "checkpoints": []}
UNNUMBERED = {kind.partition(".")[2] for kind in EVENTS
              if kind.startswith("run_node.") and "n" not in DEFINITIONS[kind]["properties"]}


def numbered(*events: Any) -> list[str]:
    """Events as run_node.py says them, each but the unnumbered ones with its number."""
    made, number = [], 0
    for event in events:
        number += event["event"] not in UNNUMBERED
        made.append(line(event if event["event"] in UNNUMBERED else {"n": number, **event}))
    return made


@pytest.mark.parametrize("high", [False, True], ids=["low", "high"])
@pytest.mark.parametrize("kind", [kind for kind in EVENTS if kind.startswith("run_node.")])
def test_a_training_survives_what_the_schema_takes(kind: str, high: bool, evil: Evil, place: Path) -> None:
    event = extreme(DEFINITIONS[kind], high)
    if event.get("rank"):  # its own, or it would be lost at once
        event["rank"] = 0 if event["rank"] > 0 else -1
    evil.answers({"describe_node": [honest_facts(there=[])], "run_node": numbered(STARTED, event, event, ENDED)})
    text = seen(evil, place, *TRAIN)
    assert "[0] forged" not in [part[:10] for part in text.splitlines()]


LIES = {"another's rank": ({"event": "line", "rank": 1, "text": "x"}, "speaks for rank 1"),
        "a rank that isn't": ({"event": "rank", "rank": [], "code": 0, "asked": False}, "makes no sense"),
        "no code": ({"event": "ended"}, "makes no sense"), "an unknown event": ({"event": ESCAPES}, "has no event"),
        "a number that isn't next": ({"event": "line", "rank": 0, "text": "x", "n": 7}, "comes after event"),
        "a long line": ({"event": "line", "rank": 0, "text": "x" * 70_000}, "more than 64 KiB")}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_costs_the_host_with_one_line(lie: str, evil: Evil, place: Path) -> None:
    event, reason = LIES[lie]
    evil.answers({"describe_node": [honest_facts(there=[])], "run_node": numbered(STARTED, event, ENDED)}, stays=True)
    text = seen(evil, place, *TRAIN)
    assert reason in text and "training failed after" in text


def test_a_flood_slows_the_host_and_fills_nothing(evil: Evil, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flood = line({"event": "line", "rank": 0, "text": "x" * 4000}).replace('"rank"', '"n": %d, "rank"')
    progress = line({"event": "progress", "rank": 0, "text": "step 1/5  [link=https://evil]x[/link][/]"})
    evil.answers({"describe_node": [honest_facts(there=[])], "run_node": [
        *numbered(STARTED), progress, *(flood % number for number in range(2, 20_002)), *numbered(ENDED)]})
    seen(evil, place, *TRAIN)


def test_a_terminal_gets_no_markup_of_a_host(evil: Evil, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"step 1/5  [link=https://evil]x[/link][/] {ESCAPES}"[:200]
    evil.answers({"describe_node": [honest_facts(there=[])], "run_node": [
        *numbered(STARTED, {"event": "progress", "rank": 0, "text": said}, {"event": "line", "rank": 0, "text": said},
                  ENDED)]})
    monkeypatch.chdir(place)
    monkeypatch.setenv("TERM", "xterm-256color")
    name, *words = TRAIN
    code, screen = type_into([sys.executable, str(ROOT / "master" / f"{name}.py"), *words, "--ssh-config",
                              str(evil.client.config)], {})
    assert code == 1 and "Traceback" not in screen and "step" in screen
    assert "\x1b]8" not in screen and "\x1b]52" not in screen and "\x1b[2J" not in screen


@pytest.mark.parametrize("high", [False, True], ids=["low", "high"])
def test_facts_as_odd_as_may_be(high: bool, evil: Evil, place: Path) -> None:
    facts = extreme(DEFINITIONS["facts"], high)
    if not high:  # the half that a check asks for is there too
        facts |= {name: extreme(DEFINITIONS["facts"]["properties"][name], False)
                  for name in DEFINITIONS["facts"]["properties"]}
    evil.answers({"describe_node": [line(facts, "@@NODE_FACTS ")]})
    for words in (("check_cluster", "--hostfile", "hostfile.txt", "--fast"), TRAIN):
        assert "evil" in seen(evil, place, *words)


@pytest.mark.parametrize("value", [{"packages": []}, {"python": 3}, {"port": "x"}, {"cores": "many"}, {"jobs": 5},
                                   {"address": "evil.example"}, {"there": None}, {"schema": "node-facts/2"}], ids=str)
def test_wrong_facts_cost_the_host_with_one_line(value: dict[str, Any], evil: Evil, place: Path) -> None:
    evil.answers({"describe_node": [honest_facts(**value)]})
    for words in (("check_cluster", "--hostfile", "hostfile.txt", "--fast"), TRAIN):
        assert "facts makes no sense" in seen(evil, place, *words)


@pytest.mark.parametrize("high", [False, True], ids=["low", "high"])
def test_watching_and_stopping(high: bool, evil: Evil, place: Path) -> None:
    run = place / "runs" / "20260101-000000-tiny"
    run.mkdir(parents=True)
    (run / "hostfile.txt").write_text("evil slots=1 type=CPU\n")
    (run / "launcher.json").write_text(json.dumps({"host": "elsewhere", "boot": "another", "pid": 1, "started": "1",
                                                   "job": "20260101-000000-tiny-abcdef"}))
    measured = line(extreme(DEFINITIONS["measured"], high), "@@MEASURED ")
    ended = line(extreme(DEFINITIONS["end_job.ended"], high))
    evil.answers({"measure_node": [measured], "run_node": [ended]}, stays=True)
    assert "evil" in seen(evil, place, "watch_training", str(run), "--once")
    assert "evil" in seen(evil, place, "stop_training", str(run))
    evil.answers({"measure_node": [line({"gpus": 5}, "@@MEASURED ")], "run_node": [line({"event": "ended"})]})
    assert "makes no sense" in seen(evil, place, "watch_training", str(run), "--once")
    assert "makes no sense" in seen(evil, place, "stop_training", str(run))


SLOW = "receive_files.finished"  # said too early: it is waited for as long as for any silent host


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind == SLOW else [])
                                  for kind in EVENTS if kind.startswith("receive_files.")])
def test_sync_survives_what_the_schema_takes(kind: str, evil: Evil, place: Path) -> None:
    hello = {"event": "hello", "id": "a", "home": "/h", "machine": "x86_64", "uv": None, "meet": "/h/.lanspeed/meet-1"}
    event = extreme(DEFINITIONS[kind], True)
    evil.answers({"receive_files": [line(hello), line(event)]})
    assert "evil" in seen(evil, place, "sync_nodes", "--nodes", "evil", "--no-env")


def test_what_it_sends_as_a_run_folder_stays_one(evil: Evil, place: Path) -> None:
    planted = archive(*links_past_path_max(), member("run.json", b'{"command": "train.py --x"}'),
                      member("command.json", b"{}"), member("../../escape"))
    size = f"@@SIZE {len(planted)}\n"
    evil.answers({"describe_node": [honest_facts(there=[])], "run_node": numbered(STARTED, ENDED),
                  "tar": [size, planted.decode("latin-1"), "@@END 0\n"]})
    text = seen(evil, place, *TRAIN)
    assert "entries of the run folder stay there" in text
    run = next((place / "runs").iterdir())
    assert sorted(path.name for path in place.iterdir()) == ["err", "hostfile.txt", "out", "runs", "used"]
    assert json.loads((run / "command.json").read_text())["schema"] == "command/1"
    assert not any(path.is_symlink() for path in place.rglob("*"))
