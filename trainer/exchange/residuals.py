"""What encoding has left out so far, in a checkpoint: one file for each rank that talks to other hosts.

The same hosts resume with the same numbers. Where hosts or ranks have changed, each file is added to the residual of
one host that has it: the sum of all, which is what the weights lack, stays the same.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from trainer.distributed.ranks import Ranks
from trainer.errors import UserError
from trainer.exchange.all_reduce import CompressedSum, bucket_sizes, part_of
from trainer.exchange.quantizer import BLOCK

NAME = re.compile(r"lan_residual_(\d{1,4})_(\d{1,4})\.safetensors")
FORM = "form"  # the key of a file's metadata


@dataclass(frozen=True)
class Form:
    """How a residual is laid out: numbers in all, of a bucket, of hosts and lanes; whose it is."""

    count: int
    bucket: int
    hosts: int
    lanes: int
    host: int
    lane: int


def form_of(found: CompressedSum) -> Form:
    """Return the form of this rank's residual."""
    hosts = found.hosts
    assert hosts.lane is not None
    return Form(found.count, found.bucket, hosts.count, hosts.lanes, hosts.number, hosts.lane)


def save(found: CompressedSum, folder: Path) -> None:
    """Write this rank's residual into a checkpoint's folder. Raises OSError."""
    from safetensors.torch import save_file

    if found.residual is None or found.own_residual is None:
        return
    form = form_of(found)
    tensors = {"residual": found.residual.cpu(), "own_residual": found.own_residual.cpu()}
    save_file(tensors, folder / f"lan_residual_{form.host}_{form.lane}.safetensors",
              metadata={FORM: json.dumps(asdict(form))})


def load(into: CompressedSum, folder: Path, ranks: Ranks) -> str:
    """Give a sum the residuals of a checkpoint; return what is to be said about them, "" for nothing.

    Every rank calls it. Raises UserError for a file that isn't a residual of these weights.
    """
    files = {path.name: path for path in sorted(folder.glob("lan_residual_*.safetensors")) if NAME.fullmatch(path.name)}
    forms = {name: read_form(path, into.count) for name, path in files.items()}
    own = form_of(into) if into.residual is not None else None
    mine = next((name for name, form in forms.items() if form == own), None)
    told = ranks.all_gather_json("residuals", [sorted(files), own is None or mine is not None])
    if all(fits for _, fits in told):
        if mine:
            tensors = read(files[mine], forms[mine])
            into.residual.copy_(tensors["residual"])  # type: ignore[union-attr]
            into.own_residual.copy_(tensors["own_residual"])  # type: ignore[union-attr]
        return ""
    everywhere = sorted({name for names, _ in told for name in names})
    for name in everywhere:
        holder = next(rank for rank, (names, _) in enumerate(told) if name in names)
        if holder in into.hosts.here and into.residual is not None and name in files:
            add(into, read(files[name], forms[name]), forms[name])
    if not everywhere:
        return ""
    return f"what {len(everywhere)} ranks had left out is kept by {into.hosts.count} hosts now"


def read_form(path: Path, count: int) -> Form:
    """Return how a file's residual is laid out. Raises UserError where that makes no sense for `count` weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            found = json.loads(file.metadata()[FORM])
        form = Form(**found)
        if any(type(value) is not int for value in found.values()) or form.count != count or not (
                0 <= form.host < form.hosts <= 4096 and 0 <= form.lane < form.lanes <= 4096 and form.bucket > 0
                and form.bucket % (form.hosts * form.lanes * BLOCK) == 0):
            raise ValueError(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} isn't what --lan_compress leaves of these weights: delete it to go on without it"
                        ) from None
    return form


def read(path: Path, form: Form) -> dict[str, torch.Tensor]:
    """Return a file's tensors on the CPU. Raises UserError where their sizes are others than `form` says."""
    from safetensors.torch import load_file

    found = load_file(path)
    each = sum(bucket_sizes(form.count, form.bucket, form.lanes * form.hosts)) // form.lanes
    if {name: tensor.numel() for name, tensor in found.items()} != {
            "residual": each, "own_residual": each // form.hosts}:
        raise UserError(f"{path} is damaged: delete it to go on without")
    return found


def as_row(tensors: dict[str, torch.Tensor], form: Form) -> torch.Tensor:
    """Return a file's residual as a row of all weights' numbers [count], zero where it says nothing."""
    sizes = bucket_sizes(form.count, form.bucket, form.lanes * form.hosts)
    row = torch.zeros(sum(sizes))
    for number, size in enumerate(sizes):
        share = size // form.lanes
        here = number * form.bucket + form.lane * share
        row[here:here + share] += part_of(tensors["residual"], number, form.bucket // form.lanes, share)
        piece = share // form.hosts
        here += form.host * piece
        row[here:here + piece] += part_of(tensors["own_residual"], number,
                                          form.bucket // form.lanes // form.hosts, piece)
    return row[:form.count]


def add(into: CompressedSum, tensors: dict[str, torch.Tensor], form: Form) -> None:
    """Add a file's residual to that of a rank, as far as it is of its lane."""
    row = as_row(tensors, form)
    whole = torch.zeros(sum(into.sizes))
    whole[:form.count] = row
    lanes, residual = into.hosts.lanes, into.residual
    assert residual is not None
    for number, size in enumerate(into.sizes):
        mine = part_of(whole, number, into.bucket, size).view(lanes, -1)[into.hosts.lane]
        part_of(residual, number, into.bucket // lanes, size // lanes).add_(mine.to(residual.device))
