"""The model: from Hugging Face, from a folder, or `tiny`, built on the spot."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.errors import UserError, first_line, is_out_of_memory
from trainer.estimate.batch import default_sequence
from trainer.estimate.shape import TINY_SHAPE
from trainer.options import Options

TINY = "tiny"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # torch's names
# Of a configuration, what says nothing of the weights' shapes.
NOT_SHAPE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures",
             "_attn_implementation", "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"}


def load_config(options: Options) -> Any:
    """Return the model's configuration (None for tiny); raise a UserError, before any data is read, if there is
    none."""
    from transformers import AutoConfig, PreTrainedConfig

    name = options.model_name_or_path
    if name == TINY:
        return None
    path = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not (path.is_dir() or (options.from_config and path.is_file())):
        raise UserError(f"model '{name}': no such folder")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").exists():
        raise UserError(f"model '{name}' is an adapter of {base_of(path)} (adapter_config.json): train that one with "
                        "--lora --merge_lora for a whole model, or continue its run with --resume_from_checkpoint")
    refuse_adapter_beside(name, path)
    try:
        if not options.trust_remote_code:
            refuse_kernels(options, PreTrainedConfig.get_config_dict(name)[0])
        return AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # a file that somebody made up can raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"model '{name}': {first_line(error)}") from None


def refuse_kernels(options: Options, config: Any) -> None:
    """Raise UserError for a configuration that names code of the hub, which would be fetched and run.

    Its attention doesn't count where --attn_implementation takes its place.
    """
    for key, value in named_kernels(config):
        attention = key.endswith("attn_implementation")
        if not (attention and options.attn_implementation):
            fix = "--attn_implementation sdpa leaves that out" if attention else "take that out of it"
            raise UserError(f"model '{options.model_name_or_path}': its config.json names code of somebody else "
                            f"({key}: {value}): {fix}")


def named_kernels(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the keys of a configuration, at any depth, that name code of the hub, with that name."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key.endswith("_implementation") and "/" in str(value):
            yield key, str(value)[:100]
        yield from named_kernels(value)


def refuse_adapter_beside(name: str, path: Path) -> None:
    """Raise UserError for whole weights with an adapter beside them: transformers would load the adapter's base model
    instead, wherever that is."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if path.is_dir() and not (path / "adapter_config.json").is_file():
        return
    found = None
    with contextlib.suppress(Exception):  # no network, no such name: told by what comes next
        found = path / "adapter_config.json" if path.is_dir() else find_adapter_config_file(name)
    if found:
        raise UserError(f"model '{name}' has an adapter of {base_of(Path(found).parent)} beside its weights "
                        "(adapter_config.json): take it out of that folder, or train the other model with --lora")


def base_of(adapter: Path) -> str:
    """Return the name of the model that an adapter's folder was trained for."""
    try:
        return str(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another model"


def architecture(config: Any) -> str:
    """Return what tells a model's architecture from another's, whatever it is called."""
    if config is None:
        return TINY
    about = {name: value for name, value in config.to_dict().items() if name not in NOT_SHAPE}
    words = json.dumps(about, sort_keys=True, default=str)
    return f"{config.model_type} {hashlib.blake2b(words.encode(), digest_size=4).hexdigest()}"


def position_limit(config: Any) -> int:
    """Return how many tokens a model has positions for; a number that no text reaches where it doesn't say."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2**31
    if not isinstance(found, int) or found < 2:
        raise UserError(f"the model's configuration has {str(found)[:40]} for its number of positions", shared=True)
    return found


def choose_sequence_length(options: Options, config: Any) -> int:
    """Return the tokens a row: what was asked for, or a default, but never more than the model has positions for.

    Raises UserError for more than that, or fewer than 2.
    """
    limit = TINY_SHAPE["max_position_embeddings"] if config is None else position_limit(config)
    wanted = options.sequence_length or default_sequence(config is None, limit)
    if not 2 <= wanted <= limit:
        name = options.model_name_or_path
        raise UserError(f"--sequence_length {wanted}: {name} takes 2 to {limit:,} tokens", shared=True)
    return wanted


def build_tiny(tokenizer: Any, seed: int) -> Any:
    """Return the tiny Llama with random weights that depend only on the seed."""
    from transformers import LlamaForCausalLM, set_seed

    set_seed(seed)
    return LlamaForCausalLM(tiny_config(tokenizer))


def tiny_config(tokenizer: Any) -> Any:
    """Return the configuration of the tiny Llama, with a tokenizer's words."""
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **TINY_SHAPE)


def with_attention(options: Options, flash: bool, dtype: str, build: Callable[[str | None], Any]) -> Any:
    """Return the model that `build` makes with an attention: the one that was asked for, tried as it was named.

    Without one flash attention is tried where it is installed and every rank's card can run it (`flash`), and left out
    where the model doesn't have it.
    """
    from transformers.utils import is_flash_attn_2_available

    if options.attn_implementation is None and flash and dtype != "float32" and is_flash_attn_2_available():
        with contextlib.suppress(ValueError, ImportError):
            return build("flash_attention_2")
    return build(options.attn_implementation)


def load_model(options: Options, dtype: str, flash: bool = False, in_4_bits_on: Any = None) -> Any:
    """Load the model's weights in `dtype` (float32, bfloat16, float16); under ZeRO-3 each rank keeps its part.

    `flash`: flash attention may be tried. `in_4_bits_on`: a device on which they are kept in 4 bits, computing in
    `dtype` (QLoRA, arXiv 2305.14314). Raises UserError for weights that are missing or not safetensors.
    """
    import torch
    from transformers import AutoModelForCausalLM

    name = options.model_name_or_path
    try:
        return with_attention(options, flash, dtype, lambda attention: AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), attn_implementation=attention,
            trust_remote_code=options.trust_remote_code,
            use_safetensors=None if options.allow_pickle else True, **quantized(dtype, in_4_bits_on)))
    except Exception as error:  # a file that somebody made up can raise anything
        if is_out_of_memory(error):
            raise
        hint = " Weights in another form: --allow_pickle" if "safetensors" in str(error) else ""
        raise UserError(f"model '{name}': {first_line(error)}{hint}") from None


def resize(model: Any, options: Options, tokenizer: Any) -> bool:
    """Give a model rows for tokens that it has none for, where --resize_embeddings asks for it; return whether it
    did."""
    lacking = options.resize_embeddings and len(tokenizer) > model.get_input_embeddings().num_embeddings
    if lacking:
        model.resize_token_embeddings(len(tokenizer))
    return lacking


def language_weights(model: Any) -> set[int]:
    """Return the ids of a model's weights that text reaches: all but those for pictures or sound."""
    every = {id(weight) for weight in model.parameters()}
    if model.config.get_text_config() is model.config:
        return every
    head = model.get_output_embeddings()
    found = {id(weight) for name, part in model.named_modules()
             if part is head or name.split(".")[-1] == "language_model" for weight in part.parameters()}
    return found if len(found) > 2 else every  # more than a head


def freeze_other_senses(model: Any) -> bool:
    """Freeze what a model has beside its language model, for pictures or sound; return whether it has any.

    Text never reaches it, so it has no gradient: weight decay would shrink it, and torch wait for it in vain.
    """
    spoken = language_weights(model)
    others = [weight for weight in model.parameters() if id(weight) not in spoken]
    for weight in others:
        weight.requires_grad_(False)
    return bool(others)


def quantized(dtype: str, device: Any) -> dict[str, Any]:
    """Return from_pretrained's arguments for weights in 4 bits on a device; none for None."""
    if device is None:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    kind = getattr(torch, dtype)
    return {"device_map": {"": device}, "quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind,
        bnb_4bit_quant_storage=kind)}
