"""The Hugging Face hub, asked without its library: is a name in the cache here, and can it be had within seconds?

Formats are huggingface_hub's: the cache's folders, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN.
"""

from __future__ import annotations

import os
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

BASE = "https://huggingface.co"
LIMIT_S = 3.0  # that an answer may take; without one the name is believed
REFUSED = (401, 403, 404)  # what the hub says of a name that isn't there, or that this account may not read
TRUE = ("1", "ON", "YES", "TRUE")


def is_offline() -> bool:
    """Return whether the user has switched the hub off."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in TRUE


def home() -> Path:
    """Return the folder of the hub's files here."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", default)).expanduser()


def folder_of(kind: str, name: str) -> Path:
    """Return where a model or dataset (kind) lies in the cache, once it is there."""
    hub = Path(os.environ.get("HF_HUB_CACHE", home() / "hub")).expanduser()
    return hub / f"{kind}s--{name.replace('/', '--')}"


def is_cached(kind: str, name: str) -> bool:
    """Return whether files of a model or dataset (kind) are in the cache."""
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", home() / "datasets")).expanduser()
    found = (folder_of(kind, name) / "snapshots").is_dir()
    return found or (kind == "dataset" and (prepared / name.replace("/", "___")).is_dir())


def cached_file(kind: str, name: str, file: str) -> Path | None:
    """Return a file of a model or dataset (kind) in the cache, of the version that was fetched last; None without."""
    found = sorted(folder_of(kind, name).glob(f"snapshots/*/{file}"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def why_not(kind: str, name: str) -> str | None:
    """Return why the hub has no model or dataset of this name for this user; None if it has, or says nothing."""
    if is_cached(kind, name):
        return None
    if is_offline():
        return "it is not in the Hugging Face cache, and HF_HUB_OFFLINE is set"
    base = os.environ.get("HF_ENDPOINT", BASE).rstrip("/")
    answer = asked(f"{base}/api/{kind}s/{name}")
    if answer in REFUSED and base == BASE:  # a mirror may not know that question
        return f"the hub has no {kind} of this name that you may read (a private one needs HF_TOKEN)"
    if answer == 0:
        return f"it is not in the Hugging Face cache, and {base.partition('://')[2]} can't be reached"
    return None


def is_reachable() -> bool:
    """Return False where the hub's name leads nowhere, or no connection is made; True otherwise."""
    return asked(os.environ.get("HF_ENDPOINT", BASE)) != 0


def asked(url: str) -> int | None:
    """Return the status that a web server answers with, 0 where none can be reached, None where none came in time."""
    found: list[int] = []
    if not url.startswith(("http://", "https://")):  # HF_ENDPOINT may be anything
        return None

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD", headers=token_header())  # noqa: S310, http as configured
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:  # noqa: S310
                found.append(answer.status)
        except urllib.error.HTTPError as error:
            found.append(error.code)
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, socket.gaierror | ConnectionError) or getattr(reason, "errno", None) in (101, 113):
                found.append(0)  # no such name, refused, network or host unreachable

    thread = threading.Thread(target=ask, daemon=True)  # looking a name up has no time limit of its own
    thread.start()
    thread.join(LIMIT_S + 1)
    return found[0] if found else None


def token_header() -> dict[str, str]:
    """Return the header that says who asks, {} for nobody."""
    token = os.environ.get("HF_TOKEN", "")
    path = Path(os.environ.get("HF_TOKEN_PATH", home() / "token")).expanduser()
    if not token and path.is_file():
        token = path.read_text(encoding="utf-8", errors="replace").strip()
    return {"Authorization": f"Bearer {token}"} if token and token.isprintable() else {}
