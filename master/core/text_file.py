"""Text files that people write, also on Windows, where a byte order mark comes first, or all is UTF-16."""

from __future__ import annotations

import codecs
from pathlib import Path

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """Return a file's text without its byte order mark. Raises OSError, UnicodeDecodeError."""
    raw = path.read_bytes()
    return raw.decode("utf-16" if raw.startswith(UTF_16) else "utf-8-sig")
