"""A run folder that a host sends: nothing is written but plain files below it, and no more than was announced."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from archives import archive, links_past_path_max, member

from master.run import incoming_archive
from master.run.fetch_run import END, MARK, Fetched, Progress, move_into_place, unpack_stream
from master.ssh.node_names import parse_node
from master.ssh.route import SshError, SshOptions
from master.ssh.session import LocalSession


def receive(tmp_path: Path, data: bytes, announced: int | None = None, code: int = 0, banner: str = "") -> Fetched:
    """Unpack what a host sends into tmp_path/run/in."""
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "sent").write_bytes(data)
    size = len(data) if announced is None else announced
    program = f"printf '{banner}'; echo '{MARK}{size}'; cat {tmp_path}/sent; echo {END}{code}"
    session = LocalSession(parse_node("localhost"), SshOptions())
    return unpack_stream(session, program, tmp_path / "run" / "in", Progress("localhost"))


def below(folder: Path) -> list[str]:
    """All there is, as relative paths."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_files_and_folders_arrive(tmp_path: Path) -> None:
    data = archive(member(".", b"", type=tarfile.DIRTYPE), member("./model", b"", type=tarfile.DIRTYPE),
                   member("./model/a", b"12"), member("./" + "n" * 200, b"3"), member("./empty", b""))
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        place = tmp_path / str(form)
        place.mkdir()
        sent = data if form == tarfile.GNU_FORMAT else archive(member("model/a", b"12"), member("n" * 200, b"3"),
                                                               member("empty", b""), form=form)
        assert receive(place, sent, banner="Welcome\\n").left_out == ()
        assert below(place / "run" / "in") == ["empty", "model", "model/a", "n" * 200]
        assert (place / "run/in/model/a").read_bytes() == b"12"


BAD = {"a link": [member("link", b"", type=tarfile.SYMTYPE, linkname="/etc"), member("link/x")],
       "a hard link": [member("hard", b"", type=tarfile.LNKTYPE, linkname="../outside")],
       "a device": [member("device", b"", type=tarfile.CHRTYPE), member("fifo", b"", type=tarfile.FIFOTYPE)],
       "names": [member("../outside"), member("/outside"), member("a/../../outside"), member("new\nline"),
                 member("escape\x1b[2J"), member("p" * 256), member("/".join("p" * 200 for _ in range(6)))]}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_plain_file_is_left_out(kind: str, tmp_path: Path) -> None:
    found = receive(tmp_path, archive(*BAD[kind], member("good", b"1")))
    inside = below(tmp_path / "run" / "in")
    assert "good" in inside and set(inside) <= {"good", "link", "link/x"}
    assert not any(path.is_symlink() for path in (tmp_path / "run").rglob("*"))
    assert found.left_out and below(tmp_path) == sorted(["run", "run/in", "sent", *(f"run/in/{one}" for one in inside)])


def test_a_path_longer_than_the_kernel_takes_leads_nowhere(tmp_path: Path) -> None:
    receive(tmp_path, archive(*links_past_path_max(), member("good"), form=tarfile.PAX_FORMAT))
    assert not any(path.is_symlink() for path in (tmp_path / "run").rglob("*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "sent"]


def test_a_file_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        receive(tmp_path, archive(member("a", b"1"), member("a", b"2")))


def huge_header(kind: bytes) -> bytes:
    """A header that announces gigabytes of name."""
    found = tarfile.TarInfo("x")
    found.type, found.size = kind, 4 << 30
    return found.tobuf(tarfile.GNU_FORMAT)


def negative_size() -> bytes:
    """A header whose size is below 0, at which tarfile went in circles (CVE-2025-8194)."""
    found = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    found[124:136] = b"\xff" * 12
    total = 256 + sum(found[:148]) + sum(found[156:512])
    found[148:156] = f"{total:06o}\0 ".encode()
    return bytes(found)


@pytest.mark.parametrize("data", [huge_header(b"L"), huge_header(b"x"), negative_size(), b"\xff" * 5000])
def test_headers_that_make_no_sense_end_it(data: bytes, tmp_path: Path) -> None:
    with pytest.raises((tarfile.TarError, SshError)):
        receive(tmp_path, data, announced=100)


def test_more_than_was_announced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SshError, match=r"more than the .* announced"):
        receive(tmp_path, archive(member("a", bytes(40 << 20))), announced=100)
    with pytest.raises(SshError, match="GB are announced, and"):
        receive(tmp_path, b"", announced=10**15 - 1)
    monkeypatch.setattr(incoming_archive, "MAX_FILES", 3)
    with pytest.raises(SshError, match="more than 3 files"):
        receive(tmp_path, archive(*(member(str(number)) for number in range(5))))


@pytest.mark.parametrize("said", ["yes x | head -c 100000", "yes '' | head -n 5000", "true"])
def test_a_host_that_sends_something_else_is_not_waited_for(said: str, tmp_path: Path) -> None:
    with pytest.raises(SshError):
        unpack_stream(LocalSession(parse_node("localhost"), SshOptions()), said, tmp_path / "in", Progress("localhost"))


def test_a_trickle_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming_archive, "WINDOW_S", 0.5)
    program = f"echo '{MARK}1000000'; while :; do printf x; sleep 0.05; done"
    with pytest.raises(SshError, match=r"only .* bytes in"):
        unpack_stream(LocalSession(parse_node("localhost"), SshOptions()), program, tmp_path / "in",
                      Progress("localhost"))


def test_only_what_belongs_to_a_run_takes_its_place(tmp_path: Path) -> None:
    scratch, run = tmp_path / "in", tmp_path / "run"
    for folder in (scratch / "model", run / "model", scratch / "logs", scratch / "checkpoints"):
        folder.mkdir(parents=True)
    for name in ("run.json", "command.json", "cluster.json", ".bashrc", "mine.txt", "model/new"):
        (scratch / name).write_text("theirs")
    for name in ("command.json", "cluster.json", "model/old"):
        (run / name).write_text("ours")
    assert sorted(move_into_place(scratch, run, is_ours=True)) == [".bashrc", "command.json", "mine.txt"]
    assert below(run) == ["cluster.json", "command.json", "model", "model/new", "run.json"]
    assert (run / "command.json").read_text() == (run / "cluster.json").read_text() == "ours"
    assert sorted(move_into_place(scratch, run, is_ours=False)) == [".bashrc", "command.json"]
    assert (run / "mine.txt").exists() and os.listdir(run / "model") == ["new"]
