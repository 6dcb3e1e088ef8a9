"""What goes to the nodes: the checkout, a model, a dataset, what is named; which files, and where they may lie there.

A tree is a folder's files, or one file. A link that leads out of its folder goes as the file that it leads to.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from master.core.paths import ROOT
from master.core.run_cli import UserError

CODE = ("master", "worker", "trainer", "schemas")
NOT_CODE = {".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
# What of a model's repository transformers reads; the same weights stand there in other forms too.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


class TreeError(UserError):
    """Something that was named and can't be sent."""


@dataclass(frozen=True)
class FileEntry:
    """A file: its path below the tree's root, where it is here, its mode and its size in bytes."""

    path: str
    source: str
    mode: int
    size: int


@dataclass
class Tree:
    """`roots`: where it may lie on a node, best first ("~" and "$NAME" are the node's); `here`: the path that a user of
    this machine would name, "" for none; `below`: the file's name, for a tree of one file; `whole`: no other tree lies
    there, so that files which are gone here go there too."""

    name: str
    roots: list[str]
    here: str = ""
    below: str = ""
    whole: bool = False
    items: list[FileEntry] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # sockets, pipes, links to nothing

    def add(self, path: str, source: str, top: str, above: tuple[tuple[int, int], ...] = ()) -> None:
        """Take in a file, a link, or a folder with all below it; `top` is the tree's folder here."""
        if os.path.islink(source) and stays_inside(source, top):
            self.links.append((path, os.readlink(source)))
            return
        try:
            status = os.stat(source)
        except OSError:
            self.left_out.append(source)
            return
        if stat.S_ISDIR(status.st_mode):
            place = (status.st_dev, status.st_ino)
            if place in above:  # a link to a folder that it is in
                self.left_out.append(source)
                return
            for name in listed(source):
                self.add(os.path.join(path, name), os.path.join(source, name), top, (*above, place))
        elif stat.S_ISREG(status.st_mode):
            if not os.access(source, os.R_OK):
                raise TreeError(f"{source}: this account may not read it")
            self.items.append(FileEntry(path, source, stat.S_IMODE(status.st_mode) & 0o777, status.st_size))
        else:
            self.left_out.append(source)


    def source_of(self, name: str) -> str | None:
        """Return where a file of this name is here, None without one."""
        return next((item.source for item in self.items if os.path.basename(item.path) == name), None) or next(
            (self._beside(path, target) for path, target in self.links if os.path.basename(path) == name), None)

    def leave_out(self, names: Collection[str]) -> None:
        """Take out files of these names, and what links of these names lead to."""
        behind = {os.path.normpath(os.path.join(os.path.dirname(path), target)) for path, target in self.links
                  if os.path.basename(path) in names}
        self.links = [link for link in self.links if os.path.basename(link[0]) not in names]
        self.items = [item for item in self.items if os.path.basename(item.path) not in names
                      and item.path not in behind]

    def _beside(self, path: str, target: str) -> str:
        """Return the source of what a link leads to."""
        place = os.path.normpath(os.path.join(os.path.dirname(path), target))
        return next((item.source for item in self.items if item.path == place), "")


def listed(folder: str) -> list[str]:
    """Return a folder's names, sorted; raise TreeError if it can't be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise TreeError(f"{folder}: {error.strerror}") from None


def stays_inside(link: str, top: str) -> bool:
    """Return whether a link leads, by a relative path, to something in the tree's folder."""
    target = os.readlink(link)
    place = os.path.normpath(os.path.join(os.path.dirname(link), target))
    return not os.path.isabs(target) and (place + "/").startswith(top.rstrip("/") + "/") and os.path.exists(link)


def checkout(folder: str, without: Sequence[Path] = ()) -> Tree:
    """Return lanspeed as it stands here: what git tracks (without git all but what is made), without these paths."""
    top = str(ROOT)
    tree = Tree("checkout", [folder] if folder else [top, "~/lanspeed"], top, whole=True)
    for name in tracked(top) or files_of_code(top):
        path = ROOT / name
        if os.path.lexists(path) and not any(path.is_relative_to(other) for other in without):
            tree.add(name, str(path), top)
    return tree


def tracked(top: str) -> list[str]:
    """Return what git tracks, and new files of the code that it doesn't yet; nothing without git."""
    if not os.path.exists(os.path.join(top, ".git")):  # else of another repository that it lies in
        return []
    found = []
    for more in ([], ["--others", "--exclude-standard", "--", *CODE]):
        try:
            done = subprocess.run(["git", "-C", top, "ls-files", "-z", *more], stdin=subprocess.DEVNULL,
                                  capture_output=True)
        except OSError:  # git isn't there
            return []
        if done.returncode:
            raise TreeError(f"{top}: {os.fsdecode(done.stderr).strip().splitlines()[0]}")
        found += [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
    return found


def files_of_code(top: str) -> Iterator[str]:
    """Yield the files of a checkout that git doesn't know."""
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if name not in NOT_CODE and not name.endswith(".egg-info"))
        for name in sorted(files):
            yield os.path.relpath(os.path.join(folder, name), top)


def named(path: Path, folder: str = "") -> Tree:
    """Return a file or folder of this machine, to lie at the same path there, or else below ~/lanspeed-data.

    One of the checkout lies in the checkout there, which may be in `folder`.
    """
    own = f"~/lanspeed-data/{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}/{path.name}"
    places = [str(path), own]
    if path.is_relative_to(ROOT):
        below = path.relative_to(ROOT)
        places = [f"{folder}/{below}"] if folder else [str(path), f"~/lanspeed/{below}"]
    if path.is_dir():
        tree = Tree(str(path), places, str(path), whole=True)
        status = path.stat()
        for name in listed(str(path)):
            tree.add(name, str(path / name), str(path), ((status.st_dev, status.st_ino),))
        return tree
    tree = Tree(str(path), list(map(os.path.dirname, places)), str(path), below=path.name)
    tree.add(path.name, os.path.realpath(path), str(path.parent))  # a link to a neighbour goes as what it leads to
    return tree


def collect(folder: str, paths: Iterable[Path], names: Iterable[tuple[str, str]]) -> list[Tree]:
    """Return all trees: the checkout (to lie in `folder` there, "" chooses), these paths, ("model", name) of the hub.

    A path inside another goes with that. Raises TreeError.
    """
    places: list[Path] = []
    for path in sorted({Path(os.path.abspath(path.expanduser())) for path in paths}):
        if not path.exists():
            raise TreeError(f"{path}: there is no such file or folder")
        if ROOT.is_relative_to(path):
            raise TreeError(f"{path}: lanspeed itself is in there: name what you mean below it")
        if not any(path.is_relative_to(other) for other in places):
            places.append(path)
    return [checkout(folder, places), *(named(path, folder) for path in places),
            *(hub(kind, name) for kind, name in names)]


def hub(kind: str, name: str) -> Tree:
    """Return a model or dataset of the Hugging Face hub as it lies in the cache here; if it doesn't, it is fetched."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = MODEL_FILES if kind == "model" else None
    try:
        snapshot = snapshot_download(name, repo_type=kind, allow_patterns=wanted)  # without a network: as it is here
    except (OSError, ValueError, HFValidationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TreeError(f"--{kind} {name}: no file or folder here, nor to be had from the hub: {reason}") from None
    cache = str(constants.HF_HUB_CACHE)
    # The launcher sends HF_HOME along; else each node's own counts.
    homes = [cache] if os.environ.get("HF_HOME") else ["$HF_HOME/hub", "~/.cache/huggingface/hub"]
    tree = Tree(f"{kind} {name}", homes)
    folder = os.path.dirname(os.path.dirname(snapshot))
    for part in (snapshot, os.path.join(folder, "refs")):
        if os.path.isdir(part):
            tree.add(os.path.relpath(part, cache), part, cache)
    # The snapshot's links lead to files beside it, several to one now and then.
    for place in sorted({os.path.normpath(os.path.join(os.path.dirname(link), target)) for link, target in tree.links}):
        tree.add(place, os.path.join(cache, place), cache)
    if kind == "model" and not any(path.endswith(".safetensors") for path, _ in tree.links):
        raise TreeError(f"--{kind} {name}: only a part of it is in {folder}, without safetensors weights")
    return tree
