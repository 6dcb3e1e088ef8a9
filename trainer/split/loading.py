"""A stage's weights, read from the model's files: those of other stages aren't, nor ever in memory."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer import hub
from trainer.errors import UserError, first_line, is_out_of_memory
from trainer.estimate.stages import INDEX, other_shards
from trainer.model import loading
from trainer.options import Options
from trainer.split.stage import Cut, leave_out, stage_class, stage_config


def load_stage(options: Options, config: Any, cut: Cut, in_tuple: bool, dtype: str, tokenizer: Any) -> Any:
    """Return a model with the layers of a stage alone; `in_tuple`: its layers return tuples. Raises UserError."""
    import torch

    if config is None:  # tiny, which is made from a seed
        made = loading.build_tiny(tokenizer, options.seed).to(getattr(torch, dtype))
        leave_out(made, cut)
        return made
    name = options.model_name_or_path
    try:
        with own_files(name, range(cut.first, cut.end)) as place:
            return stage_class(config, cut, in_tuple).from_pretrained(
                place, config=stage_config(config, cut), dtype=getattr(torch, dtype),
                attn_implementation=options.attn_implementation, use_safetensors=True)
    except UserError:
        raise
    except Exception as error:  # a file that somebody made up can raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"model '{name}': {first_line(error)}") from None


@contextlib.contextmanager
def own_files(name: str, layers: range) -> Iterator[str]:
    """Give a model's name, or, where files of other layers aren't here, a folder that names only those that are.

    Raises UserError where a file of these `layers` isn't here.
    """
    index = Path(name) / INDEX if os.path.isdir(name) else hub.cached_file("model", name, INDEX)
    whole = json.loads(index.read_text()) if index and index.is_file() else {"weight_map": {}}
    places: dict[str, str] = whole["weight_map"]
    absent = {file for file in set(places.values()) if index and not (index.parent / file).exists()}
    if not index or not absent:
        yield name
        return
    if lacking := sorted(absent - other_shards(places, layers)):
        raise UserError(f"model '{name}': {lacking[0]} isn't here, which has weights of layers {layers[0]} to "
                        f"{layers[-1]}: invoke sync --model {shlex.quote(name)}, with the same --split-layers")
    with tempfile.TemporaryDirectory(prefix="lanspeed-stage-") as folder:
        for path in index.parent.iterdir():
            if path.name != INDEX:
                Path(folder, path.name).symlink_to(path.absolute())
        here = {weight: file for weight, file in places.items() if file not in absent}
        Path(folder, INDEX).write_text(json.dumps({**whole, "weight_map": here}))
        yield folder
