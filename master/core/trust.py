"""Whose files are obeyed: those of this user or root that nobody else may write, as ssh has it for keys.

A hostfile, cluster.json or run folder says which programs are started where.
"""

from __future__ import annotations

import argparse
import functools
import grp
import os
import pwd
import re
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from master.core.run_cli import UserError
from master.core.terminal import say

MOUNTS = Path("/proc/self/mountinfo")
# File systems that have no modes, or show made-up ones: Windows' drives in WSL, memory sticks, Windows shares.
WITHOUT_MODES = {"9p", "drvfs", "vfat", "exfat", "ntfs", "ntfs3", "fuseblk", "cifs", "smb3", "vboxsf", "prl_fs"}


class TrustError(UserError):
    """A file or folder that somebody else can change."""


class TrustFolder(argparse.Action):
    """--trust-folder: what others own or may write is obeyed in this command."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: str | Sequence[Any] | None, option_string: str | None = None) -> None:
        """Note it for this process."""
        setattr(namespace, self.dest, True)
        trust_all()


_trusts_all = False


def trust_all() -> None:
    """Obey files of others from now on."""
    global _trusts_all
    _trusts_all = True


def refuse_foreign(path: Path) -> None:
    """Raise TrustError if another user owns a file or folder, or may write it; one that isn't there is nobody's.

    Where the file system knows no modes, one warning is all.
    """
    if _trusts_all or (reason := what_is_foreign(path)) is None:
        return
    if file_system(path.resolve()) in WITHOUT_MODES:
        warn_once(str(path.resolve().parent))
        return
    raise TrustError(f"{path}: {reason}, and it says what is run: "
                     f"{'chmod go-w ' + shlex.quote(str(path)) if 'write' in reason else 'make a copy of your own'}, "
                     "or --trust-folder")


@functools.cache
def warn_once(folder: str) -> None:
    """Say that a folder is on a file system without modes."""
    say(f"warning: {folder} is on a file system without modes: whoever can write there decides what is run "
        "(--trust-folder: you know)")


def what_is_foreign(path: Path) -> str | None:
    """Return who else can change a file or folder, None for nobody."""
    try:
        found = path.stat()
    except OSError:
        return None
    if found.st_uid not in (0, os.geteuid()):
        return f"it belongs to {name_of(found.st_uid)}"
    if found.st_mode & stat.S_IWOTH:
        return "every user may write it"
    if found.st_mode & stat.S_IWGRP and not is_private_group(found.st_gid):
        return f"the group {group_of(found.st_gid)} may write it"
    return None


def is_private_group(number: int) -> bool:
    """Return whether a group has no member but this user: Debian and Fedora give each user one of the same name."""
    if number == 0:
        return True  # root may write everything anyway
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except KeyError:
        return False
    return group.gr_gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def name_of(number: int) -> str:
    """Return a user's name."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def group_of(number: int) -> str:
    """Return a group's name."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def file_system(path: Path) -> str:
    """Return the type of the file system that a path is on, "" if that can't be told (proc_pid_mountinfo(5))."""
    best, kind = -1, ""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        words, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), words.split()[4])
        if len(point) > best and (point == "/" or path.is_relative_to(point)):
            best, kind = len(point), rest.split()[0]
    return kind
