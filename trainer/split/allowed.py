"""What a model whose layers are split can't be trained with, told by its flags, config.json and the number of ranks.

Nothing is loaded for it: the launcher asks before anything starts, and every rank before torch is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import hub
from trainer.errors import UserError
from trainer.estimate.shape import FAMILIES, TINY_SHAPE
from trainer.estimate.stages import MICRO_BATCHES, layer_of
from trainer.options import Options

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")  # what families call their number


def check(options: Options, ranks: int, config: Mapping[str, Any] | None) -> None:
    """Raise a UserError for a training that can't be. `config`: the model's own, None where it isn't here yet."""
    if ranks < 2:
        raise refused("--split_layers needs two ranks or more: a model that one holds is trained without it")
    accumulation = options.gradient_accumulation_steps
    if accumulation and accumulation < ranks:
        raise refused(f"--split_layers: {accumulation} micro batches can't keep {ranks} ranks busy: "
                      f"--gradient_accumulation_steps {MICRO_BATCHES * ranks} or more")
    if config is None:
        return
    text: Mapping[str, Any] = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    family = str(config.get("model_type"))
    layers = next((text[name] for name in LAYERS if isinstance(text.get(name), int)), None)
    if layers:
        check_counts(options.split_layers or (), layers, ranks)
    if text.get("output_router_logits"):
        raise refused("--split_layers: the router's loss of this model needs all layers in one place")
    if not (options.lora or options.adapter):
        if text is not config:
            raise refused(f"--split_layers: of {family} only an adapter can be trained: add --lora")
        if is_tied(config):
            raise refused(f"--split_layers: the head of {family} shares the embedding's weights, and they are at "
                          "two ends: train an adapter: add --lora")
    check_targets(options, ranks)


def refused(words: str) -> UserError:
    """Return wrong usage, which rank 0 tells."""
    return UserError(words, exit_code=2, shared=True)


def check_counts(wanted: Sequence[int], layers: int, ranks: int) -> None:
    """Raise a UserError for layers that can't be shared out so. `wanted`: layers of each rank, none: any."""
    if layers < ranks:
        raise refused(f"--split_layers: {layers} layers can't be split over {ranks} ranks")
    if wanted and (len(wanted) != ranks or sum(wanted) != layers or min(wanted) < 1):
        example = ",".join(str(layers * (rank + 1) // ranks - layers * rank // ranks) for rank in range(ranks))
        raise refused(f"--split_layers {','.join(map(str, wanted))}: {ranks} ranks share {layers} layers, each at "
                      f"least one, as in {example}")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether a model's head shares the embedding's weights, False where its configuration doesn't tell."""
    said, family = config.get("tie_word_embeddings"), FAMILIES.get(str(config.get("model_type")))
    return bool(said) if said is not None else family is not None and family.tied


def check_targets(options: Options, ranks: int) -> None:
    """Raise a UserError where --lora_targets names layers, and a rank has none of them."""
    named = [layer_of(target) for target in options.lora_targets or ()]
    if not named or None in named:
        return
    layers, first = set(named), 0
    if len(layers) < ranks:
        raise refused(f"--lora_targets: {len(layers)} of the layers are named, and each of {ranks} ranks trains in "
                      "some")
    for rank, count in enumerate(options.split_layers or ()):
        if not layers & set(range(first, first + count)):
            raise refused(f"--lora_targets: rank {rank} has layers {first} to {first + count - 1} and nothing to train "
                          "there: name weights of every rank's layers")
        first += count


def config_of(model: str) -> dict[str, Any] | None:
    """Return a model's config.json, of a folder or the hub's cache here; None where it can't be read yet."""
    if model == "tiny":
        return {"model_type": "llama", **TINY_SHAPE}
    path = Path(model).expanduser()
    found = path / "config.json" if path.is_dir() else hub.cached_file("model", model, "config.json")
    try:
        config = json.loads(found.read_text(encoding="utf-8")) if found else None
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None
