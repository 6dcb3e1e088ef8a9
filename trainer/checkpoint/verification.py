"""Verified checkpoints: a manifest is written when one is complete and checked before use; old ones are deleted last.

Each machine keeps what its own ranks wrote. The manifest is `complete.json`, written last: step, layout, and size and
CRC-32 of every file on this machine. A folder without it is half-written; one that disagrees with it is damaged.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "complete.json"
# ZeRO with Adam keeps fp32 weights and two moments (12 bytes a parameter), beside the weights, which are
# saved twice: for DeepSpeed and for from_pretrained.
STATE_BYTES = 12


@dataclass
class Layout:
    """What a checkpoint must share with the training that continues it, but for the ranks.

    `batch`: the global batch, in sequences; `settings`: by name, what else decides what a step sees;
    `shards`: the ranks that share an engine where each host has one of its own, else 0.
    """

    data: str
    world_size: int
    engine: str
    batch: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    shards: int = 0

    @property
    def parts(self) -> int:
        """How many ranks have split the optimizer's states of this checkpoint among them."""
        return self.shards or self.world_size

    def difference(self, other: Layout) -> str | None:
        """Return what this checkpoint has that `other`, the training at hand, hasn't; None if they agree."""
        if self.world_size != other.world_size and not self.batch:
            return f"was written by {self.world_size} ranks, and this training has {other.world_size}: use as many"
        if self.engine != other.engine:
            return f"was written by {self.engine}, and this training uses {other.engine}: use the same config"
        for name, value in self.settings.items():
            if name in other.settings and other.settings[name] != value:
                return (f"was trained {setting(name, value)}, and this training runs "
                        f"{setting(name, other.settings[name])}: give the same, or start a new run")
        if self.data != other.data:
            return "was trained on other data, tokenizer, sequence length or seed: give the same, or start a new run"
        return None


def setting(name: str, value: Any) -> str:
    """Return a setting as a person reads it: a flag with its value, or a thing with what tells it from others."""
    if not name.startswith("--"):
        return f"with {name} {value}"
    return f"with {name}" if value is True else f"without {name}" if value in (None, False) else f"with {name} {value}"


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("checkpoint-"))


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoint folders in `root`, good or not, oldest step first."""
    found = [path for path in root.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def crc32_of(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def file_sums(folder: Path) -> dict[str, list[int]]:
    """Return [size, CRC-32] of every file below `folder` but the manifest; zlib lets threads run side by side."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(crc32_of, files))
    return {str(path.relative_to(folder)): [path.stat().st_size, value]
            for path, value in zip(files, sums, strict=True)}


def write_manifest(folder: Path, layout: Layout) -> None:
    """Declare a checkpoint complete."""
    content = {"step": step_of(folder), "layout": vars(layout), "files": file_sums(folder)}
    write_atomically(folder / MANIFEST, json.dumps(content, indent=1))


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    scratch = path.with_name(path.name + ".part")
    made = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)  # through nobody's link
    with os.fdopen(made, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def read_layout(folder: Path) -> Layout:
    """Return the layout in a checkpoint's manifest. Raises ValueError for one that makes no sense."""
    found = json.loads((folder / MANIFEST).read_text())["layout"]
    kinds = {"data": str, "world_size": int, "engine": str, "batch": int, "settings": dict, "shards": int}
    if not isinstance(found, dict) or any(type(value) is not kinds.get(name) for name, value in found.items()):
        raise ValueError(f"{folder / MANIFEST}: odd layout")
    try:
        return Layout(**found)
    except TypeError as error:
        raise ValueError(str(error)) from None


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if every file is as the manifest says."""
    try:
        files = dict(json.loads((folder / MANIFEST).read_text())["files"])
        read_layout(folder)
    except FileNotFoundError:
        return f"half-written (no {MANIFEST})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"damaged ({MANIFEST} is unreadable)"
    present = file_sums(folder)
    for name, expected in files.items():
        if name not in present:
            return f"damaged ({name} is missing)"
        if present[name] != expected:
            what = "size" if present[name][0] != expected[0] else "content"
            return f"damaged ({name} has changed in {what})"
    return None


def survey_checkpoints(root: Path) -> tuple[list[int], dict[int, str]]:
    """Return the steps of the good checkpoints in `root`, newest first, and what is wrong with the newer bad ones.

    Only as many are read as it takes to find two good ones: another machine may lack the newest.
    """
    good: list[int] = []
    bad: dict[int, str] = {}
    for folder in reversed(list_checkpoints(root)):
        damage = find_damage(folder)
        if damage:
            bad[step_of(folder)] = damage
        else:
            good.append(step_of(folder))
        if len(good) == 2:
            break
    return good, bad


def rotate(root: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` complete checkpoints and that of the step `best`, and half-written ones older
    than those."""
    folders = list_checkpoints(root)
    complete = [folder for folder in folders if (folder / MANIFEST).exists()]
    oldest_kept = step_of(complete[-keep:][0]) if complete else 0
    for folder in folders:
        if step_of(folder) < oldest_kept and step_of(folder) != best:
            # The manifest goes first: a deletion that is interrupted must not leave a checkpoint that looks valid.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def expected_bytes(parameters: int, weight_bytes: int, ranks_here: int, world_size: int) -> int:
    """Return about how many bytes one checkpoint takes on a machine that holds `ranks_here` of all ranks."""
    return int(parameters * (2 * weight_bytes + STATE_BYTES * ranks_here / world_size))


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of every file below a folder, by its path there."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(file_sizes(folder).values())


def free_bytes(folder: Path) -> int:
    """Return the bytes that may still be written where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
