"""File trees cut into chunks with their digests, as worker/receive_files.py cuts them.

Digests are kept in the cache folder by path, size, time and inode, so that an unchanged model is read once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from master.core.atomic_write import write_atomically
from master.core.paths import ROOT
from master.inventory.worker_script import load_worker
from master.sync.file_trees import FileEntry, Tree, TreeError

CACHE = "digests.json"
FRESH = 2.0  # seconds for which a file's time says nothing: it may be written again within the same tick
KEPT = 200_000  # files whose digests are kept


class Chunks:
    """All trees' files with their digests; chunks are numbered as on the nodes.

    `say` is called with the bytes read and the total. Raises TreeError for what can't be read.
    """

    def __init__(self, trees: Sequence[Tree], say: Callable[[int, int], None]) -> None:
        self._receiver = load_worker("receive_files")  # both sides cut and name alike
        self._fresh: dict[str, list[Any]] = {}  # what is new for the cache
        self.trees, self._items = trees, [item for tree in trees for item in tree.items]
        self._digests = self._read_all(say)
        files = [self._receiver.File("", "/", item.path, item.mode, item.size, digests)
                 for item, digests in zip(self._items, self._digests, strict=True)]
        self._files = files
        self.chunks: list[list[tuple[int, int]]] = list(self._receiver.cut(files))

    _stopped = False

    def _read_all(self, say: Callable[[int, int], None]) -> list[list[str]]:
        path = Path(os.environ.get("LANSPEED_CACHE") or "~/.cache/lanspeed").expanduser() / CACHE
        cache: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            cache = json.loads(path.read_text(encoding="ascii"))
        total, done = sum(item.size for item in self._items), 0
        found = []
        known = [self._known(item, cache) for item in self._items]
        pool = ThreadPoolExecutor(2)  # hashing leaves Python's lock
        try:
            for item, digests in zip(self._items, pool.map(self._read, self._items, known), strict=True):
                found.append(digests)
                done += item.size
                say(done, total)
        finally:  # on Ctrl-C too
            self._stopped = True
            pool.shutdown(cancel_futures=True)
        if self._fresh:
            cache = {source: fact for source, fact in cache.items() if source not in self._fresh} | self._fresh
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(dict(list(cache.items())[-KEPT:])))
        return found

    def _known(self, item: FileEntry, cache: dict[str, list[Any]]) -> list[str] | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            size, modified, inode, digests = cache[item.source]
            status = os.stat(item.source)
            same = (size, modified, inode) == (status.st_size, status.st_mtime_ns, status.st_ino)
            if same and size == item.size and len(digests) == -(-size // self._receiver.CHUNK_BYTES):
                return list(digests)
        return None

    def _read(self, item: FileEntry, known: list[str] | None) -> list[str]:
        if known is not None:
            return known
        digests, left = [], item.size
        try:
            with open(item.source, "rb", buffering=0) as file:
                before = os.fstat(file.fileno())
                while left and not self._stopped:
                    block = self._receiver.read_all(file, min(left, self._receiver.CHUNK_BYTES))
                    if not block:
                        raise TreeError(f"{item.source} became shorter while it was read: run this again")
                    digests.append(self._receiver.digest(block))
                    left -= len(block)
                after = os.fstat(file.fileno())
            if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns) == (
                    item.size, after.st_mtime_ns) and time.time() - after.st_mtime > FRESH:
                self._fresh[item.source] = [after.st_size, after.st_mtime_ns, after.st_ino, digests]
        except OSError as error:
            raise TreeError(f"{item.source}: {error.strerror}") from None
        return digests

    @property
    def manifest(self) -> list[dict[str, Any]]:
        """What is announced to the nodes."""
        found, at = [], 0
        for tree in self.trees:
            entries: list[list[Any]] = []
            for item in tree.items:
                entries.append([item.path, item.mode, item.size, self._digests[at]])
                at += 1
            found.append({"name": tree.name, "roots": tree.roots, "whole": tree.whole, "code": tree.name == "checkout",
                          "key": f"{socket.gethostname()}:{ROOT} {tree.name}",
                          "entries": [*entries, *map(list, tree.links)]})
        return found

    def read(self, number: int) -> bytes:
        """Return a piece's bytes as they are here now. Raises TreeError where they can't be read."""
        blocks = []
        for one, part in self.chunks[number]:
            offset, size = self._files[one].span(part)
            try:
                with open(self._items[one].source, "rb", buffering=0) as file:
                    file.seek(offset)
                    block = self._receiver.read_all(file, size)
            except OSError as error:
                raise TreeError(f"{self._items[one].source}: {error.strerror}") from None
            if self._receiver.digest(block) != self._digests[one][part]:
                raise TreeError(f"{self._items[one].source} changed while it was sent: run this again")
            blocks.append(block)
        return b"".join(blocks)
