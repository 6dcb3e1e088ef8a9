#!/usr/bin/env python3
"""Bring a node's files to what the master announces, and pass the pieces on to the next node while they come.

    python3 worker/receive_files.py        # speaks JSON lines and raw pieces on standard input and output

The master streams this file to a node's python3. Standard library only, Python 3.8 or newer. A file is written beside
its place and renamed when its content has the announced digest; what somebody else put there is never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import hashlib
import json
import os
import platform
import pwd
import secrets
import select
import shutil
import socket
import ssl
import stat
import struct
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Iterator, NamedTuple

CHUNK_BYTES = 4 << 20  # bytes; the master cuts the same way
SEGMENTS = 2000  # small files in one piece at most
WINDOW = 6  # pieces asked for ahead of time
STRANGERS, HANDSHAKE_S = 64, 5.0  # connections that haven't shown the job's key, and how long they may take
BEAT, SILENCE = 2.0, 20.0  # seconds between heartbeats; without one after which the other side counts as gone
RESERVE = 256 << 20  # bytes that stay free on each disk
HOME = os.path.expanduser("~/.lanspeed")
RECORD = "files.jsonl"
UNFINISHED = -1  # in place of the size of a file that is still being written
VENVS = (".venv", ".venv-lanspeed")
VENV_MARK = "lanspeed.json"  # in an environment that lanspeed has made
WAITING = 0xFFFFFFFF  # in place of a piece's number: it hasn't come yet, and this node lives


class Known(NamedTuple):
    """A file: its tree and that one's root, size in bytes, time, digest of digests, whether lanspeed put it there."""

    tree: str
    root: str
    size: int
    mtime_ns: int
    sum: str
    ours: bool


class NodeError(Exception):
    """What stops this node; the message is for the master's user."""


class CorruptData(Exception):
    """A piece that isn't what was announced; the message names the file."""


class ConnectionLost(Exception):
    """The master has disconnected."""


def digest(data: bytes | bytearray | memoryview) -> str:
    """Return the digest of a part of a file."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


_tell_lock = threading.Lock()
_master_listens = True


def tell(**event: Any) -> None:
    """Tell the master something."""
    global _master_listens
    with _tell_lock:
        try:
            sys.stdout.write(json.dumps(event) + "\n")
            sys.stdout.flush()
        except OSError:
            _master_listens = False


class Record:
    """What lanspeed has put on this node: path -> what it is known by; a line of a file each as it happens."""

    def __init__(self) -> None:
        os.makedirs(HOME, mode=0o700, exist_ok=True)
        self.path = os.path.join(HOME, RECORD)
        self.known: dict[str, Known] = {}
        self.before: dict[str, Known] = {}  # the notes that those in `known` have replaced
        self._lock = threading.Lock()
        with contextlib.suppress(OSError), open(self.path, encoding="ascii") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError):  # a line that was cut off
                    path, *fact = json.loads(line)
                    if path in self.known:
                        self.before[path] = self.known.pop(path)
                    if fact:
                        self.known[path] = Known(*fact)
        self._file = open(self.path, "a", encoding="ascii", buffering=1)  # noqa: SIM115, open as long as this runs
        self._file.write("\n")  # the last line may have been cut off

    def note(self, path: str, fact: Known | None) -> None:
        """Note a file, or with None that it is gone."""
        with self._lock:
            if path in self.known:
                self.before[path] = self.known.pop(path)
            if fact:
                self.known[path] = fact
            self._file.write(json.dumps([path, *(fact or [])]) + "\n")

    def is_as_left(self, path: str) -> bool:
        """Return whether lanspeed put there what stands there, and nobody has changed it since.

        A note is made before the file is put in its place: after a break between, the note before it counts too.
        """
        status = os.lstat(path)
        return any(known.ours and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns)
                   for known in (self.known.get(path), self.before.get(path)) if known)

    def close(self) -> None:
        """Write it anew, a line a file; without any it goes."""
        with self._lock:
            self._file.close()
            if not self.known:
                os.unlink(self.path)
                return
            with open(self.path + ".new", "w", encoding="ascii") as file:
                file.writelines(json.dumps([path, *fact]) + "\n" for path, fact in self.known.items())
            os.replace(self.path + ".new", self.path)


class File:
    """One file that is to be here: tree, root, path below it, mode, size, digests of its parts, which are here."""

    def __init__(self, tree: str, root: str, path: str, mode: int, size: int, digests: list[str]) -> None:
        self.tree, self.root, self.path = tree, root, path
        self.mode, self.size, self.digests = mode & 0o777, size, digests
        self.target = os.path.join(root, path)
        self.sum = digest("".join(digests).encode())
        self.have = [False] * len(digests)
        self.placed = False

    @property
    def part(self) -> str:
        """Where it is written before it is put in its place."""
        return scratch_path(self.target)

    def span(self, number: int) -> tuple[int, int]:
        """Return offset and length of a part."""
        return number * CHUNK_BYTES, min(CHUNK_BYTES, self.size - number * CHUNK_BYTES)


def scratch_path(target: str) -> str:
    """Return where a file is written before it is put in its place: by this home alone, if several share the disk."""
    short = hashlib.blake2b(os.fsencode(f"{own_id()} {target}"), digest_size=6).hexdigest()
    return os.path.join(os.path.dirname(target), f".lanspeed-{short}.part")


class Store:
    """The files of all trees, cut into pieces that are numbered as the master numbers them."""

    def __init__(self, record: Record, overwrite: bool, looks_only: bool = False) -> None:
        self._record, self._overwrite, self._looks_only = record, overwrite, looks_only
        self._putting = threading.Lock()
        self.files: list[File] = []
        self.links: list[tuple[str, str, str, str]] = []  # tree, root, path, target
        self.chunks: list[list[tuple[int, int]]] = []
        self.missing: set[int] = set()
        self.foreign: list[str] = []  # files that somebody else put there, or changed
        self.changed = threading.Condition()
        self.written = 0  # bytes that have come
        self._dirs: set[str] = set()
        self._looked, self._say = 0, seldom(0.5, lambda done: tell(event="examining", bytes=done))

    # -- what is here --------------------------------------------------------------------------------------------------

    def add_tree(self, tree: str, root: str, entries: list[list[Any]]) -> None:
        """Take in a tree: [path, mode, size, digests] is a file, [path, target] a link."""
        for entry in entries:
            if len(entry) == 2:
                self.links.append((tree, root, entry[0], entry[1]))
            else:
                self.files.append(File(tree, root, *entry))

    @property
    def wanted(self) -> set[str]:
        """The paths of all that is to be here."""
        return {file.target for file in self.files} | {os.path.join(root, path) for _, root, path, _ in self.links}

    def make_way(self) -> None:
        """Delete what lanspeed put where a folder is to be, or below what is to be a file now."""
        wanted = self.wanted
        folders = {folder for path in wanted for folder in above(path)}
        delete(self._record, [path for path, known in self._record.known.items() if known.ours and path not in wanted
                              and (path in folders or any(folder in wanted for folder in above(path)))])

    def examine(self) -> None:
        """Find out what is here, and report the progress."""
        for file in self.files:
            self._examine(file)
        for _, root, path, target in self.links:
            place = os.path.join(root, path)
            if not is_link_to(place, target) and not self._may_replace(place):
                self.foreign.append(place)
        self.chunks = list(cut(self.files))
        self.missing = {number for number, chunk in enumerate(self.chunks)
                        if not all(self.files[one].have[part] for one, part in chunk)}

    def _examine(self, file: File) -> None:
        known = self._record.known.get(file.target)
        try:
            status = os.stat(file.target)
        except FileNotFoundError:
            status = None
        except NotADirectoryError:
            self.foreign.append(file.target)
            return
        if status is not None and not stat.S_ISREG(status.st_mode):
            self.foreign.append(file.target)
            return
        if status is not None:
            ours = bool(known and known.ours)
            now = Known(file.tree, file.root, status.st_size, status.st_mtime_ns, file.sum, ours)
            same = known is not None and known[2:] == now[2:]
            if same or (status.st_size == file.size and self._parts_of(file, file.target) == file.digests):
                file.have, file.placed = [True] * len(file.digests), True
                if self._looks_only:
                    return
                if known != now:
                    self._record.note(file.target, now)
                if ours and stat.S_IMODE(status.st_mode) != file.mode and not os.path.islink(file.target):
                    os.chmod(file.target, file.mode)
                return
            if not self._may_replace(file.target):
                self.foreign.append(file.target)
                return
        if os.path.exists(file.part):
            file.have = [one == other for one, other in zip(self._parts_of(file, file.part), file.digests)]
            file.have += [False] * (len(file.digests) - len(file.have))

    def _may_replace(self, place: str) -> bool:
        """Return whether nothing stands there, or what lanspeed left there, or what may go anyway."""
        if not os.path.lexists(place):
            return True
        if os.path.isdir(place) and not os.path.islink(place):
            return False
        return self._overwrite or self._record.is_as_left(place)

    def _parts_of(self, file: File, path: str) -> list[str]:
        """Return the digests of what stands at a path, cut as the file is."""
        found = []
        try:
            with open(path, "rb") as source:
                for number in range(len(file.digests)):
                    block = source.read(file.span(number)[1])
                    found.append(digest(block))
                    self._looked += len(block)
                    self._say(self._looked)
                    if not _master_listens:
                        raise ConnectionLost
        except OSError:
            return []
        return found

    def bytes_of(self, numbers: Any) -> int:
        """Return the bytes of these pieces."""
        return sum(self.files[one].span(part)[1] for number in numbers for one, part in self.chunks[number])

    def short_of_room(self, more: dict[str, int]) -> list[str]:
        """Return what doesn't fit on which disk; `more`: bytes that will be needed below other folders."""
        needed: dict[int, tuple[str, int]] = {}
        wanted = [(file.target, sum(file.span(part)[1] for part, here in enumerate(file.have) if not here))
                  for file in self.files if not file.placed]
        for path, size in [*wanted, *more.items()]:
            place = nearest(path)
            device = os.stat(place).st_dev
            needed[device] = (place, needed.get(device, (place, 0))[1] + size)
        found = []
        for place, size in needed.values():
            free = shutil.disk_usage(place).free
            if size and free < size + RESERVE:
                found.append(f"{size / 1e9:.2f} GB are needed on the disk of {place}, {free / 1e9:.2f} are free")
        return found

    # -- what comes ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make what needs no piece: links and empty files."""
        for file in self.files:
            if not file.placed and all(file.have):
                with writing(file.target):
                    self._place(file)
        for tree, root, path, target in self.links:
            place = os.path.join(root, path)
            if not is_link_to(place, target):
                with writing(place):
                    self._link(tree, root, place, target)

    def _link(self, tree: str, root: str, place: str, target: str) -> None:
        self._make_folder(os.path.dirname(place))
        scratch = scratch_path(place)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)
        os.symlink(target, scratch)
        self._put_in_place(scratch, place, Known(tree, root, 0, 0, digest(os.fsencode(target)), True))

    def _put_in_place(self, scratch: str, target: str, known: Known) -> None:
        """Rename, after noting it (a rename keeps the time); raise UserError for what somebody has put there
        meanwhile."""
        if not self._may_replace(target):
            raise NodeError(f"{target} appeared there meanwhile, and lanspeed did not put it there")
        status = os.lstat(scratch)
        self._record.note(target, known._replace(size=status.st_size, mtime_ns=status.st_mtime_ns))
        os.replace(scratch, target)

    def put(self, number: int, data: bytes | bytearray) -> None:
        """Write a chunk; raise CorruptData if it isn't what was announced, NodeError if it can't be written."""
        with self._putting:
            if number in self.missing:
                self._put(number, data)

    def _put(self, number: int, data: bytes | bytearray) -> None:
        view, at = memoryview(data), 0
        for one, part in self.chunks[number]:
            file = self.files[one]
            offset, size = file.span(part)
            block, at = view[at : at + size], at + size
            if digest(block) != file.digests[part]:
                raise CorruptData(f"{file.path} differs from what was announced: did it change meanwhile?")
            if not file.have[part]:
                with writing(file.target):
                    self._write(file, offset, block)
                    file.have[part] = True
                    if all(file.have):
                        self._place(file)
        with self.changed:
            self.written += len(data)
            self.missing.discard(number)
            self.changed.notify_all()

    def _write(self, file: File, offset: int, block: memoryview) -> None:
        self._make_folder(os.path.dirname(file.part))
        if len(file.digests) > 1 and file.part not in self._record.known:  # it may lie there for long, if cut off
            self._record.note(file.part, Known(file.tree, file.root, UNFINISHED, 0, "", True))
        descriptor = os.open(file.part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            while block:
                count = os.pwrite(descriptor, block, offset)
                block, offset = block[count:], offset + count
        finally:
            os.close(descriptor)

    def _place(self, file: File) -> None:
        self._make_folder(os.path.dirname(file.part))
        new = os.O_CREAT if not file.size else 0  # of any other file all parts have been written
        descriptor = os.open(file.part, os.O_WRONLY | os.O_NOFOLLOW | new, 0o600)
        try:
            os.ftruncate(descriptor, file.size)
            os.fchmod(descriptor, file.mode)
            if len(file.digests) > 1:  # small ones are sent again sooner than they are waited for
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not self._may_replace(file.target) and self._parts_of(file, file.target) == file.digests:
            os.unlink(file.part)  # another node that has this disk was faster
        else:
            self._put_in_place(file.part, file.target, Known(file.tree, file.root, 0, 0, file.sum, True))
        if len(file.digests) > 1:
            self._record.note(file.part, None)
        file.placed = True

    def _make_folder(self, path: str) -> None:
        if path not in self._dirs:
            os.makedirs(path, exist_ok=True)
            self._dirs.add(path)

    def get(self, number: int) -> bytes:
        """Return a piece that is here. Raises OSError if somebody has taken it away meanwhile."""
        blocks = []
        for one, part in self.chunks[number]:
            file = self.files[one]
            offset, size = file.span(part)
            try:
                block = read_at(file.part if not file.placed else file.target, offset, size)
            except FileNotFoundError:  # it was put in its place just now
                block = read_at(file.target, offset, size)
            if len(block) != size:
                raise OSError(f"{file.target} became shorter")
            blocks.append(block)
        return b"".join(blocks)

    # -- what goes -----------------------------------------------------------------------------------------------------

    def clear_stale(self, trees: list[str]) -> tuple[int, list[str]]:
        """Delete what lanspeed put into these trees and is wanted no more; return how many, and what was kept."""
        wanted = self.wanted
        return delete(self._record, [path for path, known in self._record.known.items()
                                     if known.tree in trees and path not in wanted])


def above(path: str) -> Iterator[str]:
    """Yield the folders that a path is in, the nearest first."""
    while (folder := os.path.dirname(path)) != path:
        yield folder
        path = folder


def is_link_to(place: str, target: str) -> bool:
    """Return whether a link to this target stands there."""
    return os.path.islink(place) and os.readlink(place) == target


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Makea NodeError of what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise NodeError(f"{path}: {error.strerror}") from None


def delete(record: Record, paths: list[str]) -> tuple[int, list[str]]:
    """Delete files that lanspeed put there and nobody has changed; return how many, and what was kept."""
    count, kept, folders = 0, [], set()  # folders: (root, folder below it, or itself)
    for path in paths:
        known, folder = record.known[path], os.path.dirname(path)
        try:
            if known.ours and (known.size == UNFINISHED or record.is_as_left(path)):
                os.unlink(path)
                count += 1
                folders |= {(known.root, folder), (known.root, delete_bytecode(path))}
            elif known.ours:
                kept.append(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # this account may no longer
            kept.append(path)
        record.note(path, None)
    for root, folder in sorted(folders, key=lambda each: len(each[1]), reverse=True):
        with contextlib.suppress(OSError):  # up to the first that holds something else
            while (folder + "/").startswith(root + "/"):
                os.rmdir(folder)
                folder = os.path.dirname(folder)
    return count, kept


def delete_bytecode(path: str) -> str:
    """Delete what Python has compiled of a file; return the folder where that lies."""
    stem, ending = os.path.splitext(os.path.basename(path))
    cache = os.path.join(os.path.dirname(path), "__pycache__")
    if ending == ".py" and os.path.isdir(cache):
        for name in os.listdir(cache):
            if name.startswith(stem + ".") and name.endswith(".pyc"):
                os.unlink(os.path.join(cache, name))
    return cache


def cut(files: list[File]) -> Iterator[list[tuple[int, int]]]:
    """Yield pieces as (file, part): at least PIECE bytes but for the last, small files side by side."""
    chunk: list[tuple[int, int]] = []
    size = 0
    for number, file in enumerate(files):
        for part in range(len(file.digests)):
            chunk.append((number, part))
            size += file.span(part)[1]
            if size >= CHUNK_BYTES or len(chunk) >= SEGMENTS:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def read_all(source: Any, size: int) -> bytes:
    """Read so many bytes of a raw file."""
    blocks = []
    while size and (block := source.read(size)):
        blocks.append(block)
        size -= len(block)
    return b"".join(blocks)


def read_at(path: str, offset: int, size: int) -> bytes:
    """Return so many bytes of a file from there on, fewer at its end."""
    with open(path, "rb", buffering=0) as source:
        source.seek(offset)
        return read_all(source, size)


def nearest(path: str) -> str:
    """Return the path, or the nearest folder above it that is there."""
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    return path


def choose_root(tree: dict[str, Any], record: Record, overwrite: bool) -> str:
    """Return the first place where the tree can be written, or is already; raise UserError if there is none.

    Code goes to none where another user could replace it.
    """
    refused: list[str] = []
    for word in tree["roots"]:
        path = os.path.expanduser(word) if word.startswith("~") else word
        if path.startswith("$HF_HOME/"):
            if not os.environ.get("HF_HOME"):
                continue
            path = os.environ["HF_HOME"] + path[len("$HF_HOME") :]
        path = os.path.abspath(path)
        top = next(folder for folder in (path, *above(path)) if os.path.lexists(folder))
        if tree["code"] and (other := who_may_replace(path)):
            refused.append(f"{path} ({other} is open to other users)")
            continue
        if os.path.isdir(top) and os.access(top, os.W_OK | os.X_OK) and (path != top or may_hold(tree, path)):
            others = {known.tree for known in record.known.values() if known.root == path and known.ours}
            if tree["code"] and not others <= {tree["key"]} and not overwrite:
                raise NodeError(f"{path} holds what was synced from another checkout ({min(others - {tree['key']})}): "
                                "--folder takes this one elsewhere")
            return path
        if os.path.isdir(path):
            trial = Store(record, False, looks_only=True)
            trial.add_tree(tree["key"], path, tree["entries"])
            trial.examine()
            if all(file.placed for file in trial.files) and not trial.foreign and all(
                    is_link_to(os.path.join(path, link), target) for _, _, link, target in trial.links):
                return path
    also = f"; refused: {', '.join(refused)}" if refused else ""
    raise NodeError(f"none of {', '.join(tree['roots'])} can be written by this account{also}")


def may_hold(tree: dict[str, Any], path: str) -> bool:
    """Return whether a folder that is there may get the tree: code goes to none that somebody else owns."""
    return not tree["code"] or os.lstat(path).st_uid == os.geteuid()


def who_may_replace(path: str) -> str | None:
    """Return the folder or link on the way to a path that another user could replace, None if there is none.

    As sshd has it for keys: each belongs to root or this account, and nobody else may write in it; where all may, as in
    /tmp, what is next must be this account's own.
    """
    parts = [path, *above(path)]
    if os.path.realpath(path) != path:
        parts += [os.path.realpath(path), *above(os.path.realpath(path))]
    for part in parts:
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(part)
            if found.st_uid not in (0, os.geteuid()):
                return part
            if not stat.S_ISLNK(found.st_mode) and others_write(found) and not found.st_mode & stat.S_ISVTX:
                return part
    return None


def others_write(found: os.stat_result) -> bool:
    """Return whether more accounts than this one and root may write; a group of the account's own name is its own."""
    if found.st_mode & stat.S_IWOTH:
        return True
    if not found.st_mode & stat.S_IWGRP or found.st_gid == 0:
        return False
    with contextlib.suppress(KeyError):
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(found.st_gid)
        own = group.gr_gid == user.pw_gid and group.gr_name == user.pw_name
        return not (own and set(group.gr_mem) <= {user.pw_name})
    return True


# -- the next node, and the one before ---------------------------------------------------------------------------------


def contexts(pem: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the server's and the client's side of TLS; both show, and demand, the key pair of this one job."""
    found = []
    with tempfile.NamedTemporaryFile("w", prefix="lanspeed-") as file:  # mode 600, gone when it has been read
        file.write(pem)
        file.flush()
        for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
            context = ssl.SSLContext(protocol)
            context.check_hostname = False  # nodes go by addresses; it's the key that is checked
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(file.name)
            context.load_verify_locations(file.name)
            found.append(context)
    return found[0], found[1]


def listen(address: str | None) -> socket.socket:
    """Return a socket on a free port of the address that the other nodes know; of all where it isn't this node's."""
    with contextlib.suppress(OSError, TypeError):
        kind = socket.SOCK_STREAM  # a name might lead to this node's loopback address here
        family, _, _, _, target = socket.getaddrinfo(address, 0, type=kind, flags=socket.AI_NUMERICHOST)[0]
        if address:
            return socket.create_server(target[:2], family=family)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def serve(listening: socket.socket, context: ssl.SSLContext, store: Store) -> None:
    """Give pieces to whoever has the job's key, a thread a connection."""
    strangers = threading.BoundedSemaphore(STRANGERS)
    while True:
        connection = None
        try:
            connection, _ = listening.accept()
            if not strangers.acquire(blocking=False):  # so many that haven't shown the key yet
                connection.close()
                continue
            threading.Thread(target=give, args=(connection, context, store, strangers), daemon=True).start()
        except (OSError, RuntimeError):  # too many files, or threads, at once
            if connection:
                connection.close()
            time.sleep(0.5)


def give(connection: socket.socket, context: ssl.SSLContext, store: Store, strangers: threading.Semaphore) -> None:
    """Answer each asked number with its piece, with heartbeats until it is here."""
    with contextlib.suppress(OSError, IndexError):  # it has disconnected, or asks for what doesn't exist
        try:
            peer = handshaken(connection, context)
        finally:
            strangers.release()
        with peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.settimeout(None)  # the other one may be busy with its disk
            while True:
                (number,) = struct.unpack(">I", receive(peer, 4))
                while True:
                    with store.changed:
                        there = number not in store.missing or store.changed.wait_for(
                            lambda number=number: number not in store.missing, BEAT)  # type: ignore[misc]
                    if there:
                        break
                    peer.sendall(struct.pack(">II", WAITING, 0))
                data = store.get(number)
                peer.sendall(struct.pack(">II", number, len(data)))
                peer.sendall(data)


def handshaken(connection: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Return the connection once the other side has shown the key; raise OSError if it doesn't in time.

    A socket's timeout is for each byte: one that sends a byte now and then would hold its place for ever.
    """
    connection.settimeout(HANDSHAKE_S)
    peer = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)

    def end() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(peer, socket.SHUT_RDWR)  # the connection, not what TLS makes of it

    late = threading.Timer(HANDSHAKE_S, end)
    late.daemon = True
    late.start()
    try:
        peer.do_handshake()
        return peer
    except (OSError, ValueError):
        peer.close()
        raise OSError("no handshake") from None
    finally:
        late.cancel()


def receive(peer: socket.socket, size: int) -> bytearray:
    """Return so many bytes; raise OSError at the end of the stream."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = peer.recv_into(view)
        if not count:
            raise OSError("it has closed the connection")
        view = view[count:]
    return data


def pull(upstream: list[list[Any]], context: ssl.SSLContext, store: Store) -> None:
    """Get what is missing from the nodes before this one, the nearest that lives; then tell how it went."""
    for name, address, port in upstream:
        try:
            pull_from(address, port, context, store)
        except NodeError as fault:
            tell(event="failed", text=str(fault))
            return
        except (OSError, CorruptData, ValueError, TypeError, OverflowError) as error:  # a node may say anything
            tell(event="lost", peer=name, text=str(error) or type(error).__name__)
        if not store.missing:
            return
    tell(event="orphan", missing=sorted(store.missing))


def pull_from(address: str, port: int, context: ssl.SSLContext, store: Store) -> None:
    """Get what is missing from one node. Raises OSError where it is lost."""
    with socket.create_connection((address, port), timeout=SILENCE / 2) as plain, \
            context.wrap_socket(plain) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.settimeout(SILENCE)
        wanted = iter(sorted(store.missing))
        asked = 0

        def ask() -> int:
            for number in wanted:
                peer.sendall(struct.pack(">I", number))
                return 1
            return 0

        asked = sum(ask() for _ in range(WINDOW))
        while asked:
            number, size = struct.unpack(">II", receive(peer, 8))
            if number == WAITING:
                continue
            if size > 2 * CHUNK_BYTES:
                raise OSError("it sent more than a chunk")
            data = receive(peer, size)
            asked += ask() - 1
            store.put(number, data)


# -- the master --------------------------------------------------------------------------------------------------------


class Master:
    """Standard input, on which JSON lines and raw pieces come."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def _more(self) -> None:
        ready, _, _ = select.select([0], [], [], SILENCE)
        block = os.read(0, 1 << 18) if ready else b""
        if not block:
            raise ConnectionLost
        self._rest += block

    def order(self) -> dict[str, Any]:
        """Return the next order; empty lines are heartbeats."""
        while True:
            while (end := self._rest.find(b"\n")) < 0:
                self._more()
            line = bytes(self._rest[:end])
            del self._rest[: end + 1]
            if line:
                found: dict[str, Any] = json.loads(line)
                return found

    def raw(self, size: int) -> bytes:
        """Return so many bytes."""
        while len(self._rest) < size:
            self._more()
        data = bytes(self._rest[:size])
        del self._rest[:size]
        return data


_id: str = ""


def own_id() -> str:
    """Return this home's own id: nodes that share a home have the same."""
    global _id
    if _id:
        return _id
    os.makedirs(HOME, mode=0o700, exist_ok=True)
    path, scratch = os.path.join(HOME, "id"), os.path.join(HOME, f"id.{secrets.token_hex(6)}")
    with open(scratch, "w") as file:
        file.write(secrets.token_hex(8))
    with contextlib.suppress(FileExistsError):
        os.link(scratch, path)
    os.unlink(scratch)
    with open(path) as file:
        _id = file.read()
    return _id


def take_lock() -> Any:
    """Hold this home's lock until the end; raise UserError if another sync has it."""
    lock = open(os.path.join(HOME, "lock"), "w")  # noqa: SIM115, held as long as this runs
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise NodeError("another sync is running there: wait until it ends") from None
    return lock


def seldom(seconds: float, act: Callable[..., None]) -> Callable[..., None]:
    """Return a function that calls `act` at most once in so many seconds."""
    last = [0.0]

    def maybe(*words: Any) -> None:
        if time.monotonic() - last[0] >= seconds:
            last[0] = time.monotonic()
            act(*words)

    return maybe


def prepare(manifest: dict[str, Any], record: Record) -> tuple[Store, dict[str, str]]:
    """Return what is here of the announced trees, and each tree's root, and report them."""
    looks_only = manifest["dry_run"]
    store, roots = Store(record, manifest["overwrite"], looks_only), {}
    for tree in manifest["trees"]:
        roots[tree["name"]] = choose_root(tree, record, manifest["overwrite"])
        store.add_tree(tree["key"], roots[tree["name"]], tree["entries"])
    if not looks_only:
        store.make_way()
    store.examine()
    home = roots[manifest["trees"][0]["name"]]  # an environment will lie beside the checkout, unless one does
    has_one = any(os.path.exists(os.path.join(home, name)) for name in VENVS)
    faults = store.short_of_room({} if has_one else {home: manifest["room"]})
    if store.foreign:
        others = f" and {len(store.foreign) - 1} more" if len(store.foreign) > 1 else ""
        faults.append(f"{store.foreign[0]}{others} exists there with different content, and lanspeed did not put it "
                      "there: move it away, or --overwrite")
    tell(event="plan", roots=roots, missing=sorted(store.missing), bytes=store.bytes_of(store.missing), faults=faults)
    return store, roots


def take_part(master: Master, record: Record) -> int:
    """Follow the master's orders to the end; return the exit code."""
    manifest = master.order()
    if "remove" in manifest:
        return remove(record)
    store, _ = prepare(manifest, record)
    server, client = contexts(manifest["pem"])
    listening = listen(manifest.get("address"))
    tell(event="listening", port=listening.getsockname()[1])
    threading.Thread(target=serve, args=(listening, server, store), daemon=True).start()
    threading.Thread(target=show_progress, args=(store,), daemon=True).start()
    while True:
        order = master.order()
        if "begin" in order:
            store.begin()
            if order["begin"] and store.missing:
                threading.Thread(target=pull, args=(order["begin"], client, store), daemon=True).start()
        elif "piece" in order:
            store.put(order["piece"], master.raw(order["bytes"]))
        elif "finish" in order:
            count, kept = store.clear_stale([tree["key"] for tree in manifest["trees"] if tree["whole"]])
            record.close()
            tell(event="finished", deleted=count, kept=kept[:100], left=[])
            return 0


def beat() -> None:
    """Tell the master that this node lives, whatever it is busy with."""
    while _master_listens:
        tell(event="alive")
        time.sleep(BEAT)


def show_progress(store: Store) -> None:
    """Tell the master how far this node is."""
    while _master_listens:
        tell(event="progress", bytes=store.written, missing=len(store.missing))
        with store.changed:
            store.changed.wait_for(lambda: not store.missing, 0.5)
        if not store.missing:
            time.sleep(1)


def remove(record: Record) -> int:
    """Take away all that lanspeed has put here."""
    roots = sorted({known.root for known in record.known.values()})
    ours = {known.root for known in record.known.values() if known.ours}
    for root in roots:
        for name in VENVS:
            venv = os.path.join(root, name)
            if os.path.exists(os.path.join(venv, VENV_MARK)) and not os.path.islink(venv):
                shutil.rmtree(venv, ignore_errors=True)
    count, kept = delete(record, list(record.known))
    record.close()
    for name in ("cache", "python"):
        shutil.rmtree(os.path.join(HOME, name), ignore_errors=True)
    for name in os.listdir(HOME):
        if name in ("lock", "id") or name.startswith(("id.", "meet-")):
            os.unlink(os.path.join(HOME, name))
    data = os.path.expanduser("~/lanspeed-data")
    for folder in (HOME, *(os.path.dirname(root) for root in roots if root.startswith(data + "/")), data):
        with contextlib.suppress(OSError):  # it holds something else
            os.rmdir(folder)
    left = [root for root in roots if root in ours and os.path.isdir(root) and os.listdir(root)]
    tell(event="finished", deleted=count, kept=kept[:100], left=left)
    return 0


def main() -> int:
    """Say hello, then follow orders; return 0, 1 after an error or if the master has disconnected."""
    master = Master()
    meeting = os.path.join(HOME, f"meet-{secrets.token_hex(8)}")
    try:
        uv = shutil.which("uv") or shutil.which(os.path.expanduser("~/.local/bin/uv"))
        name = own_id()
        with open(meeting, "w"):  # by which another node can tell that it has the same home
            pass
        connection = os.environ.get("SSH_CONNECTION", "").split()  # client, its port, this node's address, port
        tell(event="hello", id=name, home=os.path.expanduser("~"), machine=platform.machine(), uv=uv, meet=meeting,
             address=connection[2] if len(connection) == 4 else None)
        threading.Thread(target=beat, daemon=True).start()
        while "go" not in (order := master.order()):
            tell(event="sees", there=os.path.exists(order["look"]))
        if not order["go"]:
            return 0
        lock = take_lock()
        try:
            return take_part(master, Record())
        finally:
            lock.close()
    except ConnectionLost:
        return 1
    except (NodeError, CorruptData) as fault:
        tell(event="failed", text=str(fault))
    except OSError as error:
        tell(event="failed", text=f"{error.filename}: {error.strerror}" if error.filename else str(error))
    finally:
        with contextlib.suppress(OSError):
            os.unlink(meeting)
    return 1


if __name__ == "__main__":
    sys.exit(main())
