"""`master/sync/file_trees.py` and `sync/chunks.py`: which files go along, and what their digests are kept by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from master.sync.chunks import Chunks
from master.sync.file_trees import Tree, TreeError, collect, files_of_code, named, tracked


def quiet(trees: list[Tree]) -> Chunks:
    return Chunks(trees, lambda done, total: None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANSPEED_CACHE", str(tmp_path / "cache"))


def test_links_go_as_links_where_they_stay_inside(tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "far").write_text("far")
    (folder / "near").write_text("near")
    (folder / "sub" / "up").symlink_to("../near")
    (folder / "absolute").symlink_to(folder / "near")
    (folder / "out").symlink_to(outside)
    (folder / "round").symlink_to(tmp_path)  # which the folder is in
    (folder / "nothing").symlink_to("gone")
    tree = named(folder)
    assert tree.links == [("sub/up", "../near")]
    assert [item.path for item in tree.items if "round" not in item.path] == ["absolute", "near", "out/far"]
    assert tree.left_out[0] == str(folder / "nothing") and all("round" in path for path in tree.left_out[1:])
    assert tree.roots[0] == str(folder) and tree.roots[1].startswith("~/lanspeed-data/")


def test_a_single_file_goes_below_its_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    tree = named(tmp_path / "notes.txt")
    assert (tree.below, [item.path for item in tree.items], tree.whole) == ("notes.txt", ["notes.txt"], False)
    assert tree.roots[0] == str(tmp_path)
    (tmp_path / "newest.txt").symlink_to("notes.txt")
    (item,) = named(tmp_path / "newest.txt").items
    assert (item.path, item.source) == ("newest.txt", str(tmp_path / "notes.txt"))


def test_a_path_inside_another_goes_with_that(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_text("text")
    trees = collect("", [tmp_path / "a" / "b", tmp_path / "a"], [])
    assert [tree.name for tree in trees] == ["checkout", str(tmp_path / "a")]
    for path, words in ((tmp_path / "gone", "there is no such file or folder"), (ROOT.parent, "lanspeed itself is in")):
        with pytest.raises(TreeError, match=words):
            collect("", [path], [])


def test_a_path_in_the_checkout_stays_in_it_and_goes_by_itself() -> None:
    code, configs = collect("", [ROOT / "trainer" / "configs"], [])
    assert configs.roots == [str(ROOT / "trainer" / "configs"), "~/lanspeed/trainer/configs"]
    assert "cpu.json" in [item.path for item in configs.items]
    assert not [item.path for item in code.items if item.path.startswith("trainer/configs")]
    _, one = collect("/opt/lanspeed", [ROOT / "README.md"], [])
    assert (one.roots, one.below) == (["/opt/lanspeed"], "README.md")


def test_the_checkout_is_what_git_tracks_or_all_but_what_is_made(tmp_path: Path) -> None:
    for name in ("trainer/train.py", ".venv/lib/x.py", "runs/r/log", "trainer/__pycache__/x.pyc", "x.egg-info/PKG",
                 "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    assert list(files_of_code(str(tmp_path))) == ["notes.txt", "trainer/train.py"]
    assert tracked(str(tmp_path)) == []
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "notes.txt"], check=True)
    (tmp_path / ".gitignore").write_text("__pycache__\n")
    assert tracked(str(tmp_path)) == ["notes.txt", "trainer/train.py"]  # new code goes along too
    assert tracked(str(tmp_path / "trainer")) == []  # which is not the repository's top
    (tmp_path / ".git" / "HEAD").write_text("broken")
    with pytest.raises(TreeError, match="not a git repository"):
        tracked(str(tmp_path))


def test_a_model_of_the_hub_goes_as_its_cache_has_it(tmp_path: Path) -> None:
    cache = tmp_path / "hf" / "hub" / "models--org--small"
    for name, text in (("blobs/b1", "{}"), ("blobs/b2", "w"), ("refs/main", "r1"), ("blobs/of-another-revision", "o")):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text(text)
    (cache / "snapshots" / "r1").mkdir(parents=True)
    (cache / "snapshots" / "r1" / "config.json").symlink_to("../../blobs/b1")
    weights = cache / "snapshots" / "r1" / "model.safetensors"
    weights.symlink_to("../../blobs/b2")
    code = ("import json; from master.sync.file_trees import hub; tree = hub('model', 'org/small'); "
            "print(json.dumps([tree.roots, sorted(item.path for item in tree.items), tree.links]))")
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout) == [
        [str(tmp_path / "hf" / "hub")],
        [f"models--org--small/{name}" for name in ("blobs/b1", "blobs/b2", "refs/main")],
        [[f"models--org--small/snapshots/r1/{name}", f"../../blobs/{blob}"]
         for name, blob in (("config.json", "b1"), ("model.safetensors", "b2"))]], done.stderr
    weights.unlink()
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "TreeError: --model org/small: only a part of it is in " in done.stderr
    run[2] = code.replace("org/small", "org/none")
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "TreeError: --model org/none: no file or folder here, nor to be had from the hub" in done.stderr


def test_digests_of_unchanged_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # which is this machine's, and gets nothing
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a").write_text("one")
    os.utime(folder / "a", (time.time() - 60,) * 2)
    (folder / "b").write_text("just written")
    first = quiet([named(folder)]).manifest
    kept = json.loads((tmp_path / "cache" / "digests.json").read_text())
    assert list(kept) == [str(folder / "a")]  # b may be written again within the same tick of its clock
    kept[str(folder / "a")][3] = ["0" * 32]
    (tmp_path / "cache" / "digests.json").write_text(json.dumps(kept))
    assert quiet([named(folder)]).manifest[0]["entries"][0][3] == ["0" * 32]
    (folder / "a").write_text("two")
    assert quiet([named(folder)]).manifest[0]["entries"][0][3] != first[0]["entries"][0][3]
    (tmp_path / "cache" / "digests.json").write_text("no json")
    assert quiet([named(folder)]).manifest[0]["entries"][1] == first[0]["entries"][1]
    assert not (tmp_path / "home").exists()


def test_a_file_that_changes_meanwhile_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    chunks = quiet([named(tmp_path / "a")])
    assert chunks.read(0) == b"one"
    (tmp_path / "a").write_text("two")
    with pytest.raises(TreeError, match="a changed while it was sent: run this again"):
        chunks.read(0)
    (tmp_path / "a").unlink()
    with pytest.raises(TreeError, match="No such file"):
        chunks.read(0)
