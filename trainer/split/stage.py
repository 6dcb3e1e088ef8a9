"""A stage: the family's own ...ForCausalLM, of whose layers only some are there.

What stands for the others passes on what it is given, so that indices, masks and rotary embeddings are those of the
whole model. The tensor that the stage before has sent replaces what comes to the first own layer; behind the last own
one the forward pass ends. Only hidden states cross: ids and positions every rank reads itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.errors import UserError


@dataclass(frozen=True)
class Cut:
    """The layers of a stage: from `first` up to and without `end`, of `layers`."""

    first: int
    end: int
    layers: int

    @property
    def is_first(self) -> bool:
        """True for the stage that has the embedding."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """True for the stage that has the head, and computes the loss."""
        return self.end == self.layers


def cuts(counts: Sequence[int]) -> list[Cut]:
    """Return the stages that have so many layers each."""
    total, found, first = sum(counts), list[Cut](), 0
    for count in counts:
        found.append(Cut(first, first + count, total))
        first += count
    return found


class StageEnd(Exception):
    """Ends a forward pass behind the last own layer."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Elsewhere(nn.Module):
    """A layer of another stage: what it is given passes through. What a model reads of its layers stays readable.

    `in_tuple`: it returns it in a tuple, as the family's layers do.
    """

    def __init__(self, layer: nn.Module, in_tuple: bool) -> None:
        super().__init__()
        self._in_tuple = in_tuple
        for name, value in vars(layer).items():
            if not name.startswith("_") and isinstance(value, str | int | float | bool):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Return what was given."""
        return (hidden_states,) if self._in_tuple else hidden_states


class NoEmbedding(nn.Module):
    """The embedding of another stage, which nothing asks: hidden states come in its place."""

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """Never called with a received tensor."""
        raise RuntimeError("this stage has no embedding")


class Stage(nn.Module):
    """Runs a model that `leave_out` has made a stage of: ids or received hidden states in, hidden states or logits out.
    """

    def __init__(self, model: Any, cut: Cut) -> None:
        super().__init__()
        self.model, self.cut = model, cut
        self._received: torch.Tensor | None = None
        own = layers_of(model)
        if not cut.is_first:
            own[cut.first].register_forward_pre_hook(self._take, with_kwargs=True)
        if not cut.is_last:
            own[cut.end - 1].register_forward_hook(self._end)

    def forward(self, received: torch.Tensor | None, **inputs: Any) -> Any:
        """Return hidden states [rows, width, hidden], of the last stage what its model returns."""
        self._received = received
        if received is not None:
            inputs = {name: value for name, value in inputs.items() if name != "input_ids"}
            inputs["inputs_embeds"] = received
        try:
            return self.model(**inputs, use_cache=False)
        except StageEnd as end:
            return end.hidden
        finally:
            self._received = None

    def _take(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "hidden_states" in named:
            return given, {**named, "hidden_states": self._received}
        return (self._received, *given[1:]), named

    def _end(self, layer: nn.Module, given: Any, made: Any) -> None:
        raise StageEnd(made[0] if isinstance(made, tuple | list) else made)


def layers_of(model: Any) -> nn.ModuleList:
    """Return a model's layers: the list of them that has most weights. Raises UserError where there is none."""
    count = model.config.get_text_config().num_hidden_layers
    found = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == count]
    if not found:
        raise UserError(f"--split_layers: {model.config.model_type} has no list of {count} layers", shared=True)
    return max(found, key=lambda each: sum(weight.numel() for weight in each.parameters()))


def leave_out(model: Any, cut: Cut, in_tuple: bool = False) -> None:
    """Take from a model what other stages have: layers (`in_tuple`: they return tuples), the embedding, the head."""
    layers = layers_of(model)
    for number in range(len(layers)):
        if not cut.first <= number < cut.end:
            layers[number] = Elsewhere(layers[number], in_tuple)
    is_tied = model.config.get_text_config().tie_word_embeddings
    if not cut.is_first and not (cut.is_last and is_tied):  # a tied head is the embedding's weight
        replace(model, model.get_input_embeddings(), NoEmbedding())
    if not cut.is_last:
        replace(model, model.get_output_embeddings(), nn.Identity())


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever that is."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


def stage_config(config: Any, cut: Cut) -> Any:
    """Return the configuration that a stage is built with: only a stage with both ends may tie them."""
    made = copy.deepcopy(config)
    if not cut.is_last:
        made.get_text_config().tie_word_embeddings = made.tie_word_embeddings = False
    return made


def stage_class(config: Any, cut: Cut, in_tuple: bool) -> Any:
    """Return the family's class, whose models are stages: from_pretrained reads only what such a one has."""
    from transformers import AutoModelForCausalLM

    family: Any = AutoModelForCausalLM._model_mapping[type(config)]

    def build(self: Any, given: Any, *words: Any, **named: Any) -> None:
        family.__init__(self, given, *words, **named)
        leave_out(self, cut, in_tuple)

    return type(family.__name__, (family,), {"__init__": build, "__module__": family.__module__})
