"""Before the first step: a small copy of the model is split, and its gradients are compared with the whole one's.

A family may do between its layers what a split loses, without any error. Then the gradients differ, and it is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.errors import UserError, first_line
from trainer.model import isolation
from trainer.model.head_loss import HeadLoss
from trainer.model.isolation import Way
from trainer.split.allowed import LAYERS
from trainer.split.stage import Cut, Stage, cuts, layers_of, leave_out

WIDTH, VOCABULARY, ROWS, TOKENS = 64, 128, 2, 24
SMALLER = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2,
           "head_dim": 16, "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_head": 4, "n_inner": 2 * WIDTH, "ffn_dim": 128,
           "word_embed_proj_dim": WIDTH, "moe_intermediate_size": WIDTH, "num_experts": 4, "num_local_experts": 4,
           "n_routed_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "max_position_embeddings": 64,
           "query_pre_attn_scalar": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LARGEST = 1e-5  # difference that sums in another order may make


def small_copy(config: Any, layers: int, attention: str | None = None) -> Any:
    """Return a configuration of the same family with few, narrow layers. Raises UserError where none can be made."""
    from transformers import AutoConfig

    made = copy.deepcopy(config.get_text_config()).to_dict()
    for name, value in SMALLER.items():
        if made.get(name) is not None:
            made[name] = value
    for name in LAYERS:
        if name in made:
            made[name] = layers
    if isinstance(kinds := made.get("layer_types"), list):  # with each kind that there is
        made["layer_types"] = [kinds[number % len(kinds)] for number in range(layers)]
    for name in [name for name in made if name.endswith(("dropout", "_pdrop"))]:
        made[name] = 0.0
    made.pop("quantization_config", None)
    model_type = made.pop("model_type")
    try:
        found = AutoConfig.for_model(model_type, **made)
        found._attn_implementation = attention
        return found
    except Exception as error:  # a family may want other figures
        raise unchecked(model_type, error) from None


def unchecked(family: str, error: Exception) -> UserError:
    """Return the error for a family of which no small copy can be made."""
    return UserError(f"--split_layers: {family} can't be checked in small ({first_line(error)}), so it isn't split",
                     shared=True)


@dataclass(frozen=True)
class SplitInSmall:
    """What a small split model has shown: by how much its gradients differ from the whole one's, as a share of the
    largest; the weights beside the layers that have gradients on the `first` and on the `last` stage, and those that
    have them on several stages.
    """

    difference: float
    first: frozenset[str]
    last: frozenset[str]
    shared: frozenset[str]


@dataclass(frozen=True)
class Family:
    """What a small model has shown: how it is told where packed documents begin, whether its loss can be computed in
    chunks at the head, whether its layers return tuples, and how it is split.
    """

    way: Way
    in_chunks: bool
    in_tuple: bool
    split: SplitInSmall


def check_family(config: Any, stages: int, attention: str | None) -> Family:
    """Return what a model's family shows in small. Raises UserError for one whose gradients are others when its layers
    are split, or whose documents see each other whatever it is told.

    `attention`: the implementation that it is trained with, None for the family's own choice.
    """
    family, counts = config.model_type, [2, *[1] * (stages - 1)]
    small = small_copy(config, sum(counts), attention)
    try:
        split = split_in_small(small, counts)
        packs = SmallModel(small)
        isolation.check_causal(packs.logits, VOCABULARY, "cpu", ROWS, "fp32")
        isolation.settle(packs, VOCABULARY, "cpu", ROWS, "fp32")
    except UserError:
        raise
    except Exception as error:
        raise unchecked(family, error) from None
    if not split.difference <= LARGEST:
        raise UserError(f"--split_layers: split over {stages} ranks, the gradients of {family} are others "
                        f"({split.difference:.1g} of the whole model's): it can't be split", shared=True)
    return Family(packs.way, packs.loss_in_chunks(), packs.in_tuple(), split)


class SmallModel:
    """A small model for `isolation`: its logits, told by `way` where documents begin."""

    def __init__(self, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.way: Way = "positions"
        self._model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [rows, width, vocabulary]."""
        mask = {"attention_mask": isolation.document_mask(position_ids)} if self.way == "mask" else {}
        with torch.no_grad():
            found: torch.Tensor = self._model(input_ids=input_ids, position_ids=position_ids, use_cache=False,
                                              **mask).logits
            return found

    def in_tuple(self) -> bool:
        """Return whether its layers return tuples."""
        return returns_tuples(self._model)

    def loss_in_chunks(self) -> bool:
        """Return whether the loss at the head is that of the logits: some models change them behind it."""
        head, generator = self._model.get_output_embeddings(), torch.Generator().manual_seed(0)
        if type(head) is not torch.nn.Linear:
            return False
        ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=generator)
        positions = torch.arange(TOKENS).expand(ROWS, -1)
        trained = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS)[:, :-1].flatten()
        wanted = loss_of(self.logits(ids, positions), ids)
        at_head = HeadLoss(head)
        with at_head.of(ids, trained):
            found = self.logits(ids, positions).sum() / len(trained)
        return bool((found - wanted).abs() <= LARGEST * wanted.abs())


def split_in_small(config: Any, counts: Sequence[int]) -> SplitInSmall:
    """Return what a model with `counts` layers on each stage shows beside a whole one with the same weights."""
    from transformers import AutoModelForCausalLM

    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    ids = torch.randint(3, config.vocab_size, (ROWS, TOKENS))
    torch.random.set_rng_state(state)
    positions = torch.arange(TOKENS).remainder(TOKENS // 2).expand(ROWS, -1)  # two documents in a row
    in_tuple = returns_tuples(whole)
    stages = [stage_of(whole, cut, in_tuple) for cut in cuts(counts)]
    loss_of(whole(input_ids=ids, position_ids=positions, use_cache=False).logits, ids).backward()
    run_through(stages, ids, positions)
    found = [{name for name, weight in stage.model.named_parameters() if weight.grad is not None} for stage in stages]
    shared = {name for number, names in enumerate(found) for others in found[number + 1:] for name in names & others}
    inside = {id(weight) for stage in stages for weight in layers_of(stage.model).parameters()}
    beside = [frozenset(name for name, weight in stage.model.named_parameters()
                        if weight.grad is not None and id(weight) not in inside) for stage in stages]
    return SplitInSmall(largest_difference(whole, stages), beside[0], beside[-1],
                        frozenset(shared.union(*beside[1:-1])))


def returns_tuples(model: Any) -> bool:
    """Return whether a model's layers return tuples, by a forward pass."""
    seen: list[bool] = []
    handle = layers_of(model)[0].register_forward_hook(lambda layer, given, made: seen.append(isinstance(made, tuple)))
    with torch.no_grad():
        model(input_ids=torch.full((1, 4), 3), use_cache=False)
    handle.remove()
    return seen == [True]


def stage_of(whole: Any, cut: Cut, in_tuple: bool) -> Stage:
    """Return a stage with a copy of a whole model's weights."""
    model = copy.deepcopy(whole)
    leave_out(model, cut, in_tuple)
    return Stage(model, cut)


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the next tokens."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def run_through(stages: Sequence[Stage], ids: torch.Tensor, positions: torch.Tensor) -> None:
    """Do one micro batch forward and backward, each stage with a graph of its own."""
    received: list[torch.Tensor | None] = [None]
    made = []
    for stage in stages:
        out = stage(received[-1], input_ids=ids, position_ids=positions)
        made.append(loss_of(out.logits, ids) if stage.cut.is_last else out)
        received.append(made[-1].detach().requires_grad_())
    made[-1].backward()
    for number in reversed(range(len(stages) - 1)):
        come = received[number + 1]
        assert come is not None
        made[number].backward(come.grad)


def largest_difference(whole: Any, stages: Sequence[Stage]) -> float:
    """Return the largest difference of a gradient, as a share of its tensor's largest number; infinite where a tensor
    has none, or two that should be one."""
    wanted = {name: weight.grad for name, weight in whole.named_parameters() if weight.grad is not None}
    found: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, weight in stage.model.named_parameters():
            if weight.grad is not None:  # a tied weight has one on both ends
                found[name] = found[name] + weight.grad if name in found else weight.grad
    if set(found) != set(wanted):
        return float("inf")
    return max(((found[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-12)).item()
               for name, grad in wanted.items())
