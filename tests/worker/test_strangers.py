"""Strangers on the network and other users of a node: what they may not tie up, and where no code is put."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

WORKER = Path(__file__).resolve().parents[2] / "worker"


def load(name: str) -> ModuleType:
    """A script of worker/ as a module."""
    spec = importlib.util.spec_from_file_location(name, WORKER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def receive() -> ModuleType:
    """receive_files.py."""
    return load("receive_files")


def files_open() -> int:
    """How many files this process holds."""
    return len(os.listdir("/proc/self/fd"))


def test_strangers_hold_few_places_and_not_for_long(receive: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import ssl

    from master.sync.job_key import make_pem

    monkeypatch.setattr(receive, "HANDSHAKE_S", 1.0)
    server, client = receive.contexts(make_pem())
    listening = receive.listen("127.0.0.1")
    assert listening.getsockname()[0] == "127.0.0.1"
    port = listening.getsockname()[1]

    class Store:
        """One piece, which is there."""

        def __init__(self) -> None:
            self.missing, self.changed = set[int](), threading.Condition()

        def get(self, number: int) -> bytes:
            return b"piece"

    threading.Thread(target=receive.serve, args=(listening, server, Store()), daemon=True).start()
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
    for one in idle[:64:2]:
        one.send(b"\x16")  # as if a handshake began
    time.sleep(0.3)
    held = threading.active_count()
    assert held < receive.STRANGERS + 80  # a thread and a timer each, and not 300 of them
    end = time.monotonic() + 20
    while True:  # as soon as the strangers' time is over, whoever has the key is served
        try:
            with socket.create_connection(("127.0.0.1", port)) as plain, client.wrap_socket(plain) as peer:
                peer.sendall(b"\0\0\0\0")
                assert receive.receive(peer, 13)[8:] == b"piece"
                break
        except (OSError, ssl.SSLError):
            assert time.monotonic() < end
            time.sleep(0.2)
    for one in idle:
        one.close()
    listening.close()


def test_code_goes_nowhere_that_another_user_may_replace(receive: ModuleType, tmp_path: Path) -> None:
    place = tmp_path / "shared" / "lanspeed"
    place.parent.mkdir()
    assert receive.who_may_replace(str(place)) is None
    place.parent.chmod(0o777)
    assert receive.who_may_replace(str(place)) == str(place.parent)
    place.parent.chmod(0o1777)  # as /tmp
    assert receive.who_may_replace(str(place)) is None
    place.parent.chmod(0o775)
    if os.geteuid() == 0:
        os.chown(place.parent, 0, 4321)
        assert receive.who_may_replace(str(place)) == str(place.parent)
        os.chown(place.parent, 4321, 0)
        assert receive.who_may_replace(str(place)) == str(place.parent)


@pytest.mark.root
def test_a_link_of_another_user_leads_nowhere(receive: ModuleType, tmp_path: Path) -> None:
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o1777)
    (place / "lanspeed").symlink_to(tmp_path)
    os.chown(place / "lanspeed", 4321, 4321, follow_symlinks=False)
    assert receive.who_may_replace(str(place / "lanspeed" / "code")) == str(place / "lanspeed")


@pytest.mark.parametrize("module", ["json", "os", "socket"])
def test_no_module_of_the_folder_that_a_script_starts_in(module: str, tmp_path: Path) -> None:
    """What is planted in a folder that others may write in isn't imported by what is sent to a Python there."""
    from master.inventory.worker_script import stdin_loader

    (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'planted')!r}, 'w')\n")
    script = WORKER / "describe_node.py"
    done: Any = subprocess.run(f"{sys.executable} {stdin_loader(script)} '{{}}'", shell=True, cwd=tmp_path,
                               input=script.read_bytes(), capture_output=True)
    assert done.returncode == 0 and b"@@NODE_FACTS" in done.stdout and not (tmp_path / "planted").exists()
