"""What hosts send each other of a checkpoint: which files, and never a name that leads out of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.checkpoint.copies import BLOCK, Writer, blocks, lacking, read
from trainer.checkpoint.verification import file_sizes
from trainer.errors import UserError


def test_only_what_the_other_lacks_is_sent() -> None:
    there = {"global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt": 9, "rng_state_1.pth": 5, "config.json": 2}
    assert lacking(there, {"config.json": 2}) == {name: there[name] for name in sorted(there) if name != "config.json"}
    assert lacking(there, there) == {}


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../b", "a//b", "..", ".hidden", "a\n", "", "a/.ssh", "./x"])
def test_a_name_that_no_checkpoint_has_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no file of a checkpoint"):
        lacking({name: 1}, {})


def test_files_come_over_in_blocks(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "large").write_bytes(bytes(range(256)) * (BLOCK // 256) + b"more")
    (source / "small").write_bytes(b"small")
    faults: list[str] = []
    writer = Writer(target, faults)
    for name, start, size in blocks(file_sizes(source)):
        writer.write(name, bytes(read(source / name, start, size)))
    writer.close()
    assert faults == [] and file_sizes(target) == file_sizes(source)
    assert (target / "deep" / "large").read_bytes() == (source / "deep" / "large").read_bytes()


def test_what_cannot_be_written_is_noted_and_the_rest_is_taken(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("a file in the way")
    faults: list[str] = []
    writer = Writer(tmp_path, faults)
    for name in ("deep/one", "deep/one", "two"):
        writer.write(name, b"data")
    writer.close()
    assert len(faults) == 1 and (tmp_path / "two").read_bytes() == b"data"


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("untouched")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights").symlink_to(tmp_path / "elsewhere")
    faults: list[str] = []
    writer = Writer(tmp_path / "folder", faults)
    writer.write("weights", b"data")
    writer.close()
    assert faults and (tmp_path / "elsewhere").read_text() == "untouched"
