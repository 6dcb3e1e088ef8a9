"""A model that was trained, to be used: whole or an adapter with its base, its tokenizer, and what ends an answer.

Nothing that came with it is run: no code of a hub, no pickles; an adapter's base must be found here or on the hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError, first_line, is_out_of_memory
from trainer.model import loading

MARK = "\u2042 answer \u2042"  # a text that no template has


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to answer; `has_adapter`: switched off, it is its own base."""

    model: Any
    tokenizer: Any
    has_adapter: bool

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Have an adapter's base answer."""
        with self.model.disable_adapter() if self.has_adapter else nullcontext():
            yield


def best_device() -> str:
    """Return where a model answers: a GPU if there is one."""
    if torch.cuda.is_available():
        return "cuda"
    return "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cpu"


def load_trained(name: str, device: str, base: str | None = None, dtype: str = "") -> TrainedModel:
    """Load a model's folder, or a name of the hub; `base`: where an adapter's base is, if not where it says; `dtype`:
    auto for the weights' own, without it what the device computes best in.

    Raises UserError.
    """
    from transformers import AutoTokenizer

    adapter = Path(name) if (Path(name) / "adapter_config.json").is_file() else None
    if adapter and not (adapter / "config.json").exists():
        base = base or loading.base_of(adapter)
        if base.startswith(("/", ".", "~")) and not Path(base).expanduser().is_dir():
            raise UserError(f"{adapter} is an adapter of {base}, which is not here: --base FOLDER says where it is")
    model = load_weights(base if adapter and base else name, dtype or ("float32" if device == "cpu" else "auto"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if adapter:
            from peft import PeftModel

            rows = model.get_input_embeddings().num_embeddings
            if len(tokenizer) > rows:  # an adapter that was trained with added tokens
                model.resize_token_embeddings(len(tokenizer))
            model = PeftModel.from_pretrained(model, str(adapter), use_safetensors=True)
    except Exception as error:  # a file that somebody made up can raise anything
        raise UserError(f"{name}: {first_line(error)}") from None
    return TrainedModel(model.to(device).eval(), tokenizer, adapter is not None)


def load_weights(name: str, dtype: str) -> Any:
    """Return a whole model, its weights in a dtype, auto for that of its file. Raises UserError."""
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    try:
        loading.refuse_adapter_beside(name, Path(name))
        for key, value in loading.named_kernels(PreTrainedConfig.get_config_dict(name)[0]):
            raise UserError(f"{name}: its config.json names code of somebody else ({key}: {value})")
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except UserError:
        raise
    except Exception as error:  # a file that somebody made up can raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"{name}: {first_line(error)}") from None


def ends_of_answer(trained: TrainedModel, chats: bool) -> list[int]:
    """Return the tokens that end an answer: the model's own, and what the template writes after one."""
    tokenizer = trained.tokenizer
    known = trained.model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
    if chats:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).partition(MARK)[2]
        ids = tokenizer(after, add_special_tokens=False).input_ids
        if ids and ids[0] in set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder):
            found.add(ids[0])
    return sorted(found)
