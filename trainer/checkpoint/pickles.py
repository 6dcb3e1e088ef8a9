"""Checkpoints are pickles, and a pickle can run any code: each is read by torch's restricted loader before it counts.

DeepSpeed loads its part of a checkpoint without restrictions. What torch's own (`weights_only`) refuses isn't given to
it; torch reads the same record of the same file both times. The sums in complete.json show damage, not intent.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import warnings
from pathlib import Path
from typing import Any

from trainer.checkpoint import verification

# What DeepSpeed 0.19.8 puts into its files beside tensors and plain values.
DEEPSPEED_NAMES = (("deepspeed.runtime.zero.config", "ZeroStageEnum"),
                   ("deepspeed.utils.tensor_fragment", "fragment_address"),
                   ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
                   ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"))
REASON = r"(?:WeightsUnpickler error: (?:Unsupported global: )?|load unsupported )(.+?)(?: was not| whose|\n|$)"
MAX_REASON = 200  # characters of what torch says


def find_planted(folder: Path) -> str | None:
    """Return why a checkpoint on this machine must not be loaded, None if it may be."""
    folder = folder.resolve()
    if others := who_may_write(folder):
        return others
    tag = f"global_step{verification.step_of(folder)}"
    for name, allowed in (("latest", {tag}), ("latest_universal", {tag, f"{tag}_universal"})):
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8", errors="replace").strip() not in allowed:
            return f"{path} leads to another folder"
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(folder):
            return f"{path} is a link that leads out of the checkpoint"
        if path.suffix == ".pt" and (reason := why_not_loaded(path)):
            return f"{path} holds more than a checkpoint does ({reason}): it could run any code, and is not loaded"
    return None


def why_not_loaded(path: Path) -> str | None:
    """Return why torch's restricted loader refuses a file, None if it doesn't; no tensor is read."""
    import importlib

    import torch

    known: list[Any] = [(enum_member, "builtins.getattr")]
    for module, name in DEEPSPEED_NAMES:
        with contextlib.suppress(ImportError, AttributeError):
            known.append(getattr(importlib.import_module(module), name))
    try:
        with torch.serialization.safe_globals(known), warnings.catch_warnings(action="ignore"):
            torch.load(path, weights_only=True, mmap=True, map_location="meta")
    except Exception as error:  # a file that somebody made up can raise anything
        found = re.search(REASON, str(error))
        return (found[1] if found else f"{type(error).__name__}: {error}".splitlines()[0])[:MAX_REASON]
    return None


def enum_member(kind: Any, name: str) -> Any:
    """Stand in for getattr, by which Python 3.11.0 to 3.11.3 pickle members of enums: DeepSpeed's stages, nothing else.

    Raises ValueError for another object.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if kind is not ZeroStageEnum:
        raise ValueError(f"getattr of {kind!r}")
    return ZeroStageEnum[name]


def who_may_write(folder: Path) -> str | None:
    """Return who else could change a checkpoint between this look and its loading, None for nobody.

    What this user owns is taken from others' reach; a file system without modes shows that it can't be.
    """
    for path in (folder, *folder.rglob("*")):
        found = path.lstat()
        if found.st_uid not in (0, os.geteuid()):
            return f"{path} belongs to another user, who could put code into it: make a copy of your own"
        if found.st_mode & 0o022 and not stat.S_ISLNK(found.st_mode):
            with contextlib.suppress(OSError):
                path.chmod(stat.S_IMODE(found.st_mode) & ~0o022)
    return None
