"""--early_stopping: the checkpoint of the lowest evaluation loss is kept, and its weights become model/."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

# What a checkpoint has of the model: all its weights, or an adapter's with its settings.
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "adapter_config.json")


class SaveBest(TrainerCallback):
    """Saves a checkpoint at each evaluation whose loss is lower than all before."""

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Ask for a checkpoint; the Trainer notes the lowest loss itself, afterwards."""
        lowest = state.best_metric is None or others["metrics"]["eval_loss"] < state.best_metric
        if lowest and state.global_step:  # not before the first step
            control.should_save = True


def best_checkpoint(checkpoints: Path, state: TrainerState) -> Path | None:
    """Return the checkpoint whose weights are better than the last ones; None if these are the best."""
    step = state.best_global_step
    if not step or step == state.global_step:
        return None
    folder = checkpoints / f"checkpoint-{step}"
    return folder if folder.is_dir() else None


def copy_weights(checkpoint: Path, model: Any, place: Path) -> None:
    """Write what a checkpoint has of a model into a folder, loadable by from_pretrained."""
    place.mkdir(parents=True, exist_ok=True)
    found = [path for pattern in WEIGHTS for path in sorted(checkpoint.glob(pattern))]
    for path in found:
        shutil.copyfile(path, place / path.name)
    if not any(path.name == "adapter_config.json" for path in found):
        model.config.save_pretrained(place)
        if model.can_generate():
            model.generation_config.save_pretrained(place)
