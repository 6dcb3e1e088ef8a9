"""`worker/receive_files.py`: real receivers on this machine, told what to do as the master tells them."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from master.inventory.worker_script import load_worker
from master.sync.chunks import Chunks
from master.sync.file_trees import Tree, named
from master.sync.job_key import make_pem

SCRIPT = ROOT / "worker" / "receive_files.py"


class Receiver:
    """A receiver with a home of its own; events are read until the one that is waited for."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if name != "HF_HOME"}
        self.process = subprocess.Popen([sys.executable, str(SCRIPT)], env={**kept, "HOME": str(home)},
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def tell(self, order: dict[str, Any], data: bytes = b"") -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order).encode() + b"\n" + data)
            self.process.stdin.flush()

    def hear(self, kind: str) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == kind:
                return event
            assert event["event"] != "failed", event
        raise AssertionError(f"it ended without {kind}")

    def announce(self, chunks: Chunks, pem: str, **more: Any) -> dict[str, Any]:
        """Announce the files; return what the receiver plans."""
        self.hear("hello")
        self.tell({"go": True})
        self.tell({"trees": chunks.manifest, "pem": pem, "overwrite": False, "dry_run": False, "room": 0, **more})
        return self.hear("plan")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Start receivers: start("one")."""
    made: list[Receiver] = []

    def begin(name: str) -> Receiver:
        made.append(Receiver(tmp_path / name))
        return made[-1]

    yield begin
    for one in made:
        one.process.kill()
        one.process.wait()
        for pipe in (one.process.stdin, one.process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


@pytest.fixture
def chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chunks:
    """A folder of a large file, a thousand small ones and an empty one, to lie in each receiver's home."""
    monkeypatch.setenv("LANSPEED_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "large").write_bytes(os.urandom(9_000_000))
    (folder / "empty").touch()
    for number in range(1000):
        (folder / f"{number}").write_text(f"{number}\n")
    tree = named(folder)
    tree.roots = ["~/data"]
    return Chunks([tree], lambda done, total: None)


def test_pieces_pass_from_one_to_the_next(start: Any, chunks: Chunks, tmp_path: Path) -> None:
    pem = make_pem()
    first, second = start("one"), start("two")
    assert first.announce(chunks, pem)["missing"] == second.announce(chunks, pem)["missing"] == [0, 1, 2]
    port = first.hear("listening")["port"]
    second.hear("listening")
    first.tell({"begin": []})
    second.tell({"begin": [["gone", "127.0.0.1", 1], ["one", "127.0.0.1", port]]})  # nobody listens on port 1
    for number in range(3):
        data = chunks.read(number)
        first.tell({"piece": number, "bytes": len(data)}, data)
    for one in (first, second):
        while one.hear("progress")["missing"]:
            pass
        one.tell({"finish": True})
        assert one.hear("finished")["kept"] == [] and one.process.wait(timeout=60) == 0
        done = subprocess.run(["diff", "-r", str(tmp_path / "data"), str(one.home / "data")])
        assert done.returncode == 0


def first_answer(port: int, pem: str | None, folder: Path) -> bytes:
    """What a node says to somebody with this key who asks for piece 0; nothing where it refuses."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if pem:
        (folder / "pem").write_text(pem)
        context.load_cert_chain(folder / "pem")
    with suppress(ssl.SSLError, ConnectionError), socket.create_connection(("127.0.0.1", port), 5) as plain, \
            context.wrap_socket(plain) as peer:
        peer.sendall(b"\0\0\0\0")
        return peer.recv(8)
    return b""


def test_who_lacks_the_jobs_key_gets_nothing(start: Any, chunks: Chunks, tmp_path: Path) -> None:
    one, pem = start("one"), make_pem()
    one.announce(chunks, pem)
    port = one.hear("listening")["port"]
    assert [first_answer(port, key, tmp_path) for key in (None, make_pem(), pem)] == [b"", b"", b"\xff" * 4 + b"\0" * 4]


def test_a_piece_that_was_not_announced_is_refused(start: Any, chunks: Chunks) -> None:
    one = start("one")
    one.announce(chunks, make_pem())
    one.tell({"begin": []})
    data = bytearray(chunks.read(0))
    data[5] ^= 1
    one.tell({"piece": 0, "bytes": len(data)}, bytes(data))
    with pytest.raises(AssertionError, match="10 differs from what was announced"):
        one.hear("progress") and one.hear("finished")
    assert one.process.wait(timeout=60) == 1 and not (one.home / "data" / "10").exists()


def test_a_node_whose_copy_is_spoilt_is_passed_over(start: Any, chunks: Chunks) -> None:
    pem = make_pem()
    first, second = start("one"), start("two")
    first.announce(chunks, pem)
    second.announce(chunks, pem)
    port = first.hear("listening")["port"]
    first.tell({"begin": []})
    for number in range(3):
        data = chunks.read(number)
        first.tell({"piece": number, "bytes": len(data)}, data)
    while first.hear("progress")["missing"]:
        pass
    (first.home / "data" / "7").write_text("X\n")  # as long as before
    second.tell({"begin": [["one", "127.0.0.1", port]]})
    assert "7 differs from what was announced" in second.hear("lost")["text"]
    assert second.hear("orphan")["missing"] == [0, 1, 2]


def test_two_homes_on_one_disk_do_not_spoil_each_others_files(start: Any, chunks: Chunks, tmp_path: Path) -> None:
    chunks.trees[0].roots = [str(tmp_path / "shared")]
    both = start("one"), start("two")
    for one in both:
        one.announce(chunks, make_pem())
        one.tell({"begin": []})
    for number in range(3):
        data = chunks.read(number)
        for one in both:
            one.tell({"piece": number, "bytes": len(data)}, data)
            while one.hear("progress")["missing"] > 2 - number:
                pass
    for one in both:
        one.tell({"finish": True})
        one.hear("finished")
    done = subprocess.run(["diff", "-r", str(tmp_path / "data"), str(tmp_path / "shared")])
    assert done.returncode == 0 and not list((tmp_path / "shared").glob(".lanspeed-*"))


def test_files_become_folders_and_folders_files(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANSPEED_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()

    def bring(name: str) -> None:
        tree = named(data)
        tree.roots = ["~/data"]
        chunks = Chunks([tree], lambda done, total: None)
        one = start(name)
        assert one.announce(chunks, make_pem())["faults"] == []
        one.tell({"begin": []})
        for number in range(len(chunks.chunks)):
            block = chunks.read(number)
            one.tell({"piece": number, "bytes": len(block)}, block)
        while one.hear("progress")["missing"]:
            pass
        one.tell({"finish": True})
        one.hear("finished")
        one.process.wait(timeout=60)
        done = subprocess.run(["diff", "-r", "--no-dereference", str(data), str(one.home / "data")])
        assert done.returncode == 0

    (data / "a").write_text("a file")
    (data / "b").mkdir()
    (data / "b" / "c").write_text("in a folder")
    (data / "v1").mkdir()
    (data / "v1" / "x").write_text("first")
    (data / "latest").symlink_to("v1")
    bring("one")
    (data / "a").unlink()
    (data / "a").mkdir()
    (data / "a" / "d").write_text("in a folder now")
    (data / "b" / "c").unlink()
    (data / "b").rmdir()
    (data / "b").write_text("a file now")
    (data / "latest").unlink()
    (data / "latest").mkdir()
    (data / "latest" / "x").write_text("second")
    bring("one")


def test_what_has_come_to_stand_there_meanwhile_is_left_alone(start: Any, chunks: Chunks) -> None:
    one = start("one")
    one.announce(chunks, make_pem())
    one.tell({"begin": []})
    (one.home / "data").mkdir(exist_ok=True)
    (one.home / "data" / "7").write_text("mine")
    data = chunks.read(0)
    one.tell({"piece": 0, "bytes": len(data)}, data)
    with pytest.raises(AssertionError, match="7 appeared there meanwhile"):
        one.hear("finished")
    assert (one.home / "data" / "7").read_text() == "mine"


def test_after_a_break_what_was_put_there_is_known(start: Any, chunks: Chunks, tmp_path: Path) -> None:
    one = start("one")
    one.announce(chunks, make_pem())
    one.tell({"begin": []})
    data = chunks.read(0)
    one.tell({"piece": 0, "bytes": len(data)}, data)
    while one.hear("progress")["missing"] > 2:
        pass
    one.process.kill()
    one.process.wait()
    with (one.home / ".lanspeed" / "files.jsonl").open("a") as file:
        file.write('["cut o')
    (tmp_path / "data" / "7").write_text("changed\n")
    tree = named(tmp_path / "data")
    tree.roots = ["~/data"]
    assert start("one").announce(Chunks([tree], lambda done, total: None), make_pem())["faults"] == []


def test_it_ends_with_its_master(start: Any, chunks: Chunks) -> None:
    one = start("one")
    one.announce(chunks, make_pem())
    assert one.process.stdin
    one.process.stdin.close()
    assert one.process.wait(timeout=60) == 1


def test_two_at_once_in_one_home_are_refused(start: Any, chunks: Chunks) -> None:
    start("one").announce(chunks, make_pem())
    with pytest.raises(AssertionError, match="another sync is running there"):
        start("one").announce(chunks, make_pem())


def test_a_tree_that_can_be_written_nowhere_is_told_of(start: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    tree = Tree("data", ["$HF_HOME/hub", str(tmp_path / "file" / "x")])
    with pytest.raises(AssertionError, match=r"none of .* can be written by this account"):
        start("one").announce(Chunks([tree], lambda done, total: None), make_pem())


def test_both_sides_cut_alike() -> None:
    receiver = load_worker("receive_files")
    sizes = [0, 1, 10_000_000, 5, receiver.CHUNK_BYTES, receiver.CHUNK_BYTES - 1, 3]
    files = [receiver.File("", "/", str(number), 0o644, size, ["d"] * -(-size // receiver.CHUNK_BYTES))
             for number, size in enumerate(sizes)]
    chunks = list(receiver.cut(files))
    assert [part for piece in chunks for part in piece] == [
        (1, 0), (2, 0), (2, 1), (2, 2), (3, 0), (4, 0), (5, 0), (6, 0)]
    assert all(sum(files[one].span(part)[1] for one, part in piece) >= receiver.CHUNK_BYTES for piece in chunks[:-1])
