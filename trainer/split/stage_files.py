"""Files that the stages write by themselves, each what it has, under the whole model's names.

In a checkpoint every rank writes to its own host's disk; all together are a model in safetensors shards with its index,
as from_pretrained reads it, and the optimizer's states by the same names. Whoever resumes takes what it needs from
where it is: the cuts, and the number of ranks, may be others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.checkpoint.noted_faults import Faults, noting
from trainer.checkpoint.verification import write_atomically
from trainer.distributed.ranks import Ranks
from trainer.errors import UserError
from trainer.estimate.stages import INDEX
from trainer.model.lora import WEIGHTS
from trainer.split.sharing import Kind, Kinds, Named, kinds, kinds_of_all, receive, send, told

MODEL, OPTIMIZER = "model", "optimizer"
MOST = 2 << 30  # bytes of a file, which is in memory while it is written
METADATA = {"format": "pt"}
NUMBERED = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


@dataclass(frozen=True)
class Part:
    """A file, the rank that has its tensors, and these."""

    file: str
    rank: int
    tensors: Kinds


def planned(what: str, own: Kinds, ranks: Ranks) -> list[Part]:
    """Return the files of all ranks' tensors; all must call it."""
    groups: list[tuple[int, Kinds]] = []
    for rank, each in enumerate(kinds_of_all(own, ranks)):
        size = MOST  # of the file at hand: the first begins here
        for name, kind in each.items():
            if size + kind.size > MOST:
                groups.append((rank, {}))
                size = 0
            groups[-1][1][name] = kind
            size += kind.size
    return [Part(f"{what}-{number:05}-of-{len(groups):05}.safetensors", rank, tensors)
            for number, (rank, tensors) in enumerate(groups, 1)]


def write_own(folder: Path, what: str, own: Named, ranks: Ranks, faults: Faults) -> list[Part]:
    """Write this rank's tensors, and note what can't be written; return all ranks' files. All must call it."""
    parts = planned(what, kinds(own), ranks)
    for part in parts:
        if part.rank == ranks.rank:
            noting(faults, write)(folder / part.file, {name: own[name] for name in part.tensors})
    return parts


def write(path: Path, named: Named) -> None:
    """Write a file of tensors, wherever they are. Raises OSError, SafetensorError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in named.items()}, str(path), METADATA)


def write_adapter(folder: Path, named: Named) -> None:
    """Write an adapter's weights: peft itself leaves out those of layers that its model hasn't."""
    write(folder / WEIGHTS, {name_in_file(name): weight for name, weight in named.items()})


def name_in_file(name: str) -> str:
    """Return what peft calls a weight in an adapter's file: without the adapter's own name."""
    return name.replace(".default.", ".").removesuffix(".default")


def write_index(folder: Path, parts: Sequence[Part]) -> None:
    """Write which file has which weight."""
    size = sum(kind.size for part in parts for kind in part.tensors.values())
    places = {name: part.file for part in parts for name in part.tensors}
    write_atomically(folder / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1))


def send_all(parts: Sequence[Part], own: Named, ranks: Ranks) -> None:
    """Send this rank's tensors to rank 0, as `write_all` takes them there."""
    for part in parts:
        for name, kind in part.tensors.items() if part.rank == ranks.rank else ():
            send(own[name].to(kind.dtype), 0, ranks)


def write_all(folder: Path, parts: Sequence[Part], own: Named, ranks: Ranks) -> None:
    """Write all stages' tensors on rank 0, a file at a time: no more than one is in memory."""
    for part in parts:
        mine = part.rank == ranks.rank
        write(folder / part.file, {name: own[name].to(kind.dtype) if mine else receive(kind, part.rank, ranks)
                                   for name, kind in part.tensors.items()})
    write_index(folder, parts)


def found_in(folder: Path, what: str) -> dict[str, tuple[Any, Kind]]:
    """Return the tensors of a checkpoint's files on this host, each with the open file that has it, and its kind."""
    found = {}
    for path in sorted(folder.glob(f"{what}*.safetensors")):
        file = safe_open(path, "pt")
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            part = file.get_slice(name)
            found[name] = (file, Kind(DTYPES[part.get_dtype()], tuple(part.get_shape())))
    return found


def fetched(folder: Path, what: str, weights: Collection[str], ranks: Ranks) -> Named:
    """Return a checkpoint's tensors of these weights: from this host's files, else sent by a rank that has them.

    All ranks must call it. Raises UserError where some are nowhere.
    """
    here = found_in(folder, what)
    everywhere = kinds_of_all({name: kind for name, (_, kind) in here.items()}, ranks)
    stop_if_incomplete(folder, what, ranks)
    found: Named = {}
    for rank, names in enumerate(told(ranks, sorted(weights))):
        for name, source in sources(set(names), everywhere, rank).items():
            if ranks.rank == source == rank:
                found[name] = here[name][0].get_tensor(name)
            elif ranks.rank == source:
                send(here[name][0].get_tensor(name), rank, ranks)
            elif ranks.rank == rank:
                found[name] = receive(everywhere[source][name], source, ranks)
    return found


def sources(weights: Collection[str], everywhere: Sequence[Kinds], rank: int) -> dict[str, int]:
    """Return the tensors of weights that a rank wants, each with the rank that gives it: itself where it can."""
    found: dict[str, int] = {}
    for giver in (rank, *range(len(everywhere))):
        for name in everywhere[giver]:
            if name in weights or name.rpartition("/")[0] in weights:
                found.setdefault(name, giver)
    return found


def stop_if_incomplete(folder: Path, what: str, ranks: Ranks) -> None:
    """Raise a UserError where a numbered file is on no rank's host."""
    files = {name for names in told(ranks, [path.name for path in folder.glob(f"{what}*.safetensors")])
             for name in names}
    for count in {int(found[1]) for name in files if (found := NUMBERED.search(name))}:
        lacking = [one for one in range(1, count + 1) if f"{what}-{one:05}-of-{count:05}.safetensors" not in files]
        if lacking:
            raise UserError(f"{folder}: {what}-{lacking[0]:05}-of-{count:05}.safetensors is on none of these hosts: "
                            "resume with those that wrote it", shared=True)
