"""`sync_nodes.py` and what makes environments: usage, faults and their fixes. Whole machines are in lab/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT
from patience import wait_until
from ssh_server import SshClient, SshServer

from master.inventory.cluster_file import receive_rate_mbit
from master.inventory.node_facts import RemoteCheckout, checkout_of
from master.ssh.node_names import Node
from master.ssh.route import SshError, SshOptions
from master.ssh.session import LocalSession
from master.sync import environments, wheelhouse
from master.sync.file_trees import TreeError

TOOL = str(ROOT / "master" / "sync_nodes.py")


@pytest.mark.parametrize(("words", "code", "text"), [
    ([], 1, "hostfile.txt: No such file"),
    (["--nodes", "a,a"], 2, "is named twice"),
    (["--nodes", "localhost", "--dataset", "./gone"], 1, "gone: there is no such file or folder"),
    (["--nodes", "localhost", "--with", "nowhere"], 1, "nowhere: there is no such file or folder"),
    (["--nodes", "localhost", "--bandwidth", "3"], 2, "no flag --bandwidth"),
])
def test_wrong_usage_is_told(words: list[str], code: int, text: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TOOL, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code and text in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_this_machine_needs_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TOOL, "--nodes", "localhost", "--no-env"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "localhost: nothing to do: everything is already here" in done.stdout, done.stderr


@pytest.mark.needs("sshd", "ssh", "ssh-keygen")
@pytest.mark.parametrize("said", [
    ['{"event": "hello", "id": [5]}'], ['{"event": "hello", "id": 5, "machine": "m", "uv": null}', '{"event": "plan"}'],
    ['{"event": ["failed"]}'], ['{"event": "failed", "text": 7}'], ["noise", "[1]", "", "\\377"],
])
def test_a_node_that_says_anything_does_no_harm(said: list[str], tmp_path: Path) -> None:
    lines = "".join(f"printf '{line}\\n'; " for line in said)
    with SshServer(tmp_path / "server", command=f"{lines} head -c 100 >/dev/null; true") as server:
        client = SshClient(tmp_path / "client", odd=server)
        client.trust(server)
        done = subprocess.run([sys.executable, TOOL, "--nodes", "odd", "--ssh-config", str(client.config), "--no-env"],
                              cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "odd: error: " in done.stdout and "Traceback" not in done.stderr, done.stderr


def test_a_word_is_said_as_the_node_has_it() -> None:
    place = checkout_of({"dir": "/home/w/lanspeed", "python": "/p", "paths": {"/data": "/d", "/data/more": "/m"}})
    assert [place.translate_path(word) for word in (
        f"{ROOT}/trainer/train.py", str(ROOT), "/data/x.txt", "/data/more/y", "/database", "--eval_dataset=/data/z",
        "data/x", "--lr=1e-4", "/data:0.3")] == [
        "/home/w/lanspeed/trainer/train.py", "/home/w/lanspeed", "/d/x.txt", "/m/y", "/database", "--eval_dataset=/d/z",
        "data/x", "--lr=1e-4", "/d:0.3"]
    assert checkout_of({}) == RemoteCheckout(str(ROOT), sys.executable)


def test_the_fastest_come_first_in_the_chain() -> None:
    card = {"name": "eth0", "addresses": ["10.0.0.1/24"], "mbit": 2500, "mtu": 1500, "kind": "card", "driver": None}
    host = {"name": "gpu1", "address": "10.0.0.1", "facts": {"nics": [card]}}
    pair = {"from": "gpu2", "to": "gpu1", "bandwidth_bytes_per_s": 12.5e6, "latency_s": 0.1, "read_at": 1}
    assert receive_rate_mbit(host, {"pairs": [pair]}) == 100 and receive_rate_mbit(host, {"pairs": []}) == 2500
    assert receive_rate_mbit({}, {"pairs": []}) == 1000


# -- environments ------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalSession:
    """This machine as a node with an empty home, and nothing to be had from a network."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (tmp_path / "home").mkdir()
    (tmp_path / "lanspeed").mkdir()
    return LocalSession(Node("localhost"), SshOptions())


def run(session: LocalSession, root: Path, *words: str, python: str = sys.executable) -> tuple[str, str]:
    return environments.run(session, [str(root), wheelhouse.find_uv(), python, "wanted1", *words], lambda line: None,
                            threading.Event())


def test_an_environment_is_made_once_and_only_where_lanspeed_may(here: LocalSession, tmp_path: Path) -> None:
    root = tmp_path / "lanspeed"
    (root / "none.txt").touch()
    assert run(here, root, "-r", str(root / "none.txt")) == ("made", f"{root}/.venv")
    code = "import sys; print([path for path in sys.path if path.endswith('lanspeed')])"
    done = subprocess.run([root / ".venv" / "bin" / "python", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout == f"['{root}']\n"  # lanspeed itself is found there
    assert json.loads((root / ".venv" / "lanspeed.json").read_text()) == {"wanted": "wanted1"}
    assert run(here, root, "-r", str(root / "none.txt")) == ("there", f"{root}/.venv")
    (root / ".venv" / "bin" / "python").unlink()
    assert run(here, root, "-r", str(root / "none.txt")) == ("made", f"{root}/.venv")
    (root / ".venv" / "lanspeed.json").unlink()  # as if a user had made it
    before = sorted(path.name for path in (root / ".venv").rglob("*"))
    assert run(here, root, "-r", str(root / "none.txt")) == ("made", f"{root}/.venv-lanspeed")
    assert sorted(path.name for path in (root / ".venv").rglob("*")) == before


def test_when_it_is_stopped_nothing_goes_on(here: LocalSession, tmp_path: Path) -> None:
    sleeper = tmp_path / "uv"
    sleeper.write_text("#!/bin/sh\necho Resolved a lot >&2\nsleep 98.765\n")
    sleeper.chmod(0o755)
    stop = threading.Event()
    with pytest.raises(SshError, match="stopped"):
        environments.run(here, [str(tmp_path / "lanspeed"), str(sleeper), "3.11", "w"], lambda line: stop.set(), stop)
    wait_until(lambda: not any(is_asleep(path) for path in Path("/proc").glob("[0-9]*")))
    assert not (tmp_path / "lanspeed" / ".venv" / "bin").exists()


def is_asleep(process: Path) -> bool:
    """Return whether a process is the one that the test has made."""
    try:
        return b"sleep\x0098.765" in (process / "cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize(("python", "words", "reason", "fix"), [
    ("3.7", ["--no-index", "torch"], "no Python there that fits", "sudo apt install python3"),
    ("", ["--no-index", "torch==2.13.0"], "No solution found when resolving dependencies: Because torch was not", ""),
    ("", ["--default-index", "http://127.0.0.1:9/simple", "torch"],
     "Failed to fetch: http://127.0.0.1:9/simple/torch/", "--wheelhouse DIR"),
])
def test_what_uv_can_not_do_is_told_with_a_mend(here: LocalSession, tmp_path: Path, python: str, words: list[str],
                                                reason: str, fix: str) -> None:
    with pytest.raises(SshError) as caught:
        run(here, tmp_path / "lanspeed", *words, python=python or sys.executable)
    assert reason in caught.value.reason and fix in (caught.value.fix or ""), caught.value


def test_a_wheelhouse_that_can_not_be_filled_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    said: list[str] = []
    with pytest.raises(TreeError, match=r"--wheelhouse .*wheels: "):
        wheelhouse.fill_wheelhouse(tmp_path / "wheels", (tmp_path / "no index").as_uri(), said.append)
    assert said == [f"fetching wheels into {tmp_path / 'wheels'}"]


def test_what_nodes_get_is_what_setup_cfg_names() -> None:
    plain, names = ([line.split(">")[0] for line in wheelhouse.requirements(gpu)] for gpu in (False, True))
    assert {"torch", "deepspeed", "transformers", "rich"} < set(plain) and "pytest" not in names
    assert set(names) - set(plain) == {"bitsandbytes", "liger-kernel"}
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(names) <= pinned


@pytest.mark.parametrize(("vendor", "wheels", "in_them", "expected"), [
    ("NVIDIA", "", True, True), ("NONE", "", True, False), ("AMD", "", True, False),  # whose Triton is another package
    ("NVIDIA", "some", False, False), ("NVIDIA", "some", True, True)])
def test_faster_kernels_go_where_an_nvidia_gpu_is(vendor: str, wheels: str, in_them: bool, expected: bool) -> None:
    spec = environments.EnvironmentSpec("3.11", "", wheels, in_them)
    words = environments.install_words(spec, {"checkout": "/x", "wheels": "/w"}, vendor)
    assert any(word.startswith("liger-kernel") for word in words) == expected
