"""Whatever a file or a host has in it, a reader takes it or says in one line why not; it never ends in a traceback.

    make test           a few hundred inputs each, always the same
    make fuzz           FUZZ=20000 of them, others each time
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import ESCAPES, extreme
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from master.core.run_cli import UserError
from master.core.terminal import one_line
from master.diagnosis.run_state import look, state_line
from master.ds_config.checker import Target, check
from master.ds_config.json_text import Document, TextError
from master.inventory.cluster_file import read_cluster
from master.inventory.gpu_report import ReportError, parse_report
from master.inventory.hostfile import read_hostfile
from master.run.command_record import flags_to_repeat
from master.run.launcher_process import is_active, read_launcher_record
from master.run.merged_checkpoint import MANIFEST_MARK, read_manifests
from master.ssh.json_channel import parse_object
from master.ssh.node_names import read_nodes
from master.ssh.route import SshError
from master.ssh.worker_message import SCHEMA, check_event
from master.watch_training import host_lines
from trainer.checkpoint import verification
from trainer.data.documents import find_files, read_documents
from trainer.data.sources import DocumentExtractor
from trainer.errors import UserError as TrainerError

EXAMPLES = int(os.environ.get("FUZZ", "150"))
FUZZ = settings(max_examples=EXAMPLES, derandomize="FUZZ" not in os.environ, deadline=None, database=None,
                phases=[Phase.generate], suppress_health_check=list(HealthCheck))
DEFINITIONS = json.loads(SCHEMA.read_text())["$defs"]
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(
    [ESCAPES, 10**400, -1, 2**63, "9" * 50, "../../etc/passwd", "-oProxyCommand=x", "localhost", "\ud800", "NaN"]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.text(max_size=10), inner, max_size=4), max_leaves=10)
HOST: dict[str, Any] = {"name": "gpu1", "reached": None, "address": "10.0.0.1", "host_key": None, "macs": [],
                        "report": {}, "facts": {}, "dir": "/d", "python": "/p/python3",
                        "read_at": 1.0}
GOOD: dict[str, Any] = {
    "cluster.json": {"schema": "cluster/1", "hosts": [HOST], "pairs": []},
    "run.json": {"command": "train.py --model_name_or_path tiny", "status": "running", "steps": 5, "world_size": 2,
                 "ended": 3.0, "memory": {"host": ["x"]}},
    "metrics.jsonl": {"step": 2, "loss": 1.5, "tokens_per_second": 3.0, "learning_rate": 1e-3},
    "launcher.json": {"pid": 1, "started": "2", "host": "h", "boot": "b", "job": "r-abcdef"},
    "command.json": {"schema": "command/1", "arguments": ["--model_name_or_path", "tiny"], "signature": "x"},
    "complete.json": {"step": 2, "layout": {"data": "d", "world_size": 1, "engine": "e", "batch": 1, "settings": {}},
                      "files": {"a": [1, 2]}},
    "ds_config.json": {"train_batch_size": 8, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "rows.jsonl": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}}


@st.composite
def broken(draw: st.DrawFn, good: Any) -> Any:
    """A value like a good one: a part of it is another, gone, or new."""
    if isinstance(good, dict) and good and draw(st.integers(0, 4)):
        name = draw(st.sampled_from(sorted(good)))
        deed = draw(st.integers(0, 5))
        if deed == 0:
            return {key: value for key, value in good.items() if key != name}
        if deed == 1:
            return {**good, draw(st.text(max_size=10)): draw(VALUES)}
        return {**good, name: draw(broken(good[name]))}
    if isinstance(good, list) and good and draw(st.integers(0, 4)):
        return [draw(broken(good[0])), *good[1:]]
    return draw(VALUES)


@st.composite
def written(draw: st.DrawFn, good: Any) -> bytes:
    """Bytes of a file: JSON like the good one, cut off or with a byte changed now and then; or anything."""
    how = draw(st.integers(0, 9))
    if how == 0:
        return draw(st.binary(max_size=200))
    if how == 1:
        return b'{"a":' * draw(st.sampled_from([10, 100_000]))
    data = json.dumps(draw(broken(good))).encode()
    if how == 2 and data:
        at = draw(st.integers(0, len(data) - 1))
        return data[:at] + draw(st.binary(max_size=3)) + data[at + 1 :]
    return data[: draw(st.integers(0, len(data)))] if how == 3 else data


def refused(work: Callable[[], object], *errors: type[Exception]) -> None:
    """Do it; what it says in refusing must be one line, whatever it quotes."""
    try:
        work()
    except Exception as error:
        assert isinstance(error, (UserError, *errors)), f"{type(error).__name__}: {error}"
        assert str(error) and one_line(str(error)).isprintable()


def watch(run: Path) -> None:
    """What `invoke watch` reads of a run folder, and prints."""
    state = look(run)
    for line in (state_line(state), *host_lines({**state, "nodes": {}})):
        assert one_line(line).isprintable()


RUN_FILES = ["run.json", "metrics.jsonl", "launcher.json", "command.json"]


@pytest.mark.parametrize("name", RUN_FILES)
def test_run_folders(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    (run / "logs").mkdir(parents=True)

    @FUZZ
    @given(written(GOOD[name]), st.binary(max_size=50))
    def fuzz(data: bytes, log: bytes) -> None:
        (run / name).write_bytes(data)
        (run / "logs" / "gpu1.log").write_bytes(log)
        watch(run)
        is_active(run)
        assert read_launcher_record(run).is_alive_here is False
        refused(lambda: flags_to_repeat(run, [], ask=False))

    fuzz()


ROWS = st.lists(st.tuples(st.text(max_size=20), st.integers(-1, 10**30), st.text(max_size=9)), max_size=4)


@FUZZ
@given(st.text(max_size=200) | ROWS.map(lambda rows: "\n".join(f"{a} slots={b} {c}" for a, b, c in rows)))
def test_hostfiles(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "hostfile.txt"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(lambda: read_hostfile(path))


@FUZZ
@given(st.lists(st.text(max_size=30) | st.from_regex(r"[a-z@:\[\]0-9,.-]{1,20}"), max_size=4))
def test_node_lists(words: list[str]) -> None:
    refused(lambda: read_nodes(words))


@FUZZ
@given(written(GOOD["cluster.json"]))
def test_cluster_files(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "cluster.json"
    path.write_bytes(data)
    refused(lambda: read_cluster(path))


@FUZZ
@given(written(GOOD["ds_config.json"]))
def test_ds_configs(data: bytes) -> None:
    refused(lambda: check(Document(data.decode("utf-8", "replace")), Target()), TextError)


@FUZZ
@given(st.sampled_from([kind for kind in DEFINITIONS if "." in kind]).flatmap(
    lambda kind: st.tuples(st.just(kind), written(extreme(DEFINITIONS[kind], True)))))
def test_lines_of_hosts(given_line: tuple[str, bytes]) -> None:
    kind, line = given_line
    if (event := parse_object(line, "event")) is not None:
        refused(lambda: check_event(kind.partition(".")[0], event, "evil"), SshError)


@FUZZ
@given(written({"schema": "gpu-report/1"}) | st.binary(max_size=100))
def test_gpu_reports(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    refused(lambda: parse_report(f"motd\n@@GPU_REPORT n {text}\n", "n"), ReportError)


@FUZZ
@given(written(GOOD["complete.json"]))
def test_manifests(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    read_manifests(f"{MANIFEST_MARK}\n{data.decode('utf-8', 'replace')}\n")
    folder = tmp_path_factory.getbasetemp() / "checkpoint-2"
    folder.mkdir(exist_ok=True)
    (folder / "complete.json").write_bytes(data)
    verification.find_damage(folder)


@FUZZ
@given(written(GOOD["rows.jsonl"]))
def test_rows_of_conversations(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(data + b"\n")
    refused(lambda: Counter(map(type, read_documents(find_files(path), DocumentExtractor()))), TrainerError)
