"""The model, its adapter and DeepSpeed's config, written into the run folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.verification import write_atomically
from trainer.model import loading
from trainer.options import Options
from trainer.results.best_model import best_checkpoint, copy_weights
from trainer.results.setup import Setup
from trainer.split import stage_files


def keep_ds_config(setup: Setup, trainer: Any) -> None:
    """Write ds_config.json into the run folder as DeepSpeed got it, every "auto" filled."""
    if setup.ds_config is not None and setup.ranks.is_first:
        used = dict(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
        used.pop("steps_per_print", None)  # infinity, set by accelerate; not JSON
        if setup.universal:  # that form is gone by then
            used["checkpoint"] = {key: value for key, value in used["checkpoint"].items() if key != "load_universal"}
        write_atomically(setup.run.path / "ds_config.json", json.dumps(used, indent=2) + "\n")


def save_model(setup: Setup, trainer: Any) -> None:
    """Write model/ (or adapter/) on rank 0: weights as safetensors and the tokenizer, loadable by from_pretrained."""
    run = setup.run
    model = trainer.accelerator.unwrap_model(trainer.model)
    if setup.options.split_layers is not None and not setup.options.lora:
        save_stages(setup, trainer, model)
        return
    state = trainer.to_save(setup.ranks.is_first)
    if setup.ranks.is_first:
        write = trainer.write_adapter if setup.options.lora else type(model).save_pretrained
        best = best_checkpoint(run.checkpoints, trainer.state)
        put_in_place(setup, model, run.adapter if merges(setup.options) else run.model,
                     partial(copy_weights, best) if best else partial(write, state_dict=state))


def save_stages(setup: Setup, trainer: Any, model: Any) -> None:
    """Write the model whose layers are split on rank 0, as the other ranks send it: never more than a file of it."""
    own = trainer.weights_of(best_checkpoint(setup.run.checkpoints, trainer.state))
    dtype = getattr(torch, loading.DTYPES[setup.precision])
    parts = stage_files.planned(stage_files.MODEL, stage_files.kinds(own, dtype), setup.ranks)
    if not setup.ranks.is_first:
        stage_files.send_all(parts, own, setup.ranks)
        return

    def write(model: Any, folder: Path) -> None:
        folder.mkdir(parents=True)
        stage_files.write_all(folder, parts, own, setup.ranks)
        model.config.architectures, model.config.dtype = [type(model).__name__], dtype
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)

    put_in_place(setup, model, setup.run.model, write)


def put_in_place(setup: Setup, model: Any, place: Path, write: Callable[[Any, Path], None]) -> None:
    """Have a model and the tokenizer written, so that their folder is there whole or not at all."""
    scratch = setup.run.path / "model.part"
    shutil.rmtree(scratch, ignore_errors=True)
    model.config.use_cache = True  # off for training; generation is slow without
    write(model, scratch)
    setup.tokenizer.save_pretrained(scratch)
    shutil.rmtree(place, ignore_errors=True)
    scratch.replace(place)


def merges(options: Options) -> bool:
    """Return whether an adapter is merged at the end: where asked for, and for tiny, whose base lies nowhere."""
    return bool(options.lora) and (options.merge_lora or options.model_name_or_path == loading.TINY)
