"""The model: from Hugging Face, from a folder, or `tiny`, built on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import UserError, first_line
from trainer.options import Options

TINY = "tiny"
# Chosen by what a minute on two cores teaches: fewer weights and more steps beat a bigger model.
TINY_SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def load_config(options: Options) -> Any:
    """Return the model's configuration (None for tiny); raise a UserError, before any data is read, if there is
    none."""
    from transformers import AutoConfig

    name = options.model_name_or_path
    if name == TINY:
        return None
    path = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not (path.is_dir() or (options.from_config and path.is_file())):
        raise UserError(f"model '{name}': no such folder")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model '{name}': {first_line(error)}") from None


def choose_sequence_length(options: Options, config: Any) -> int:
    """Return the tokens a row: what was asked for, or a default, but never more than the model has positions for.

    Raises UserError for more than that, or fewer than 2.
    """
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    limit = TINY_SHAPE["max_position_embeddings"] if config is None else limit or 2**31
    wanted = options.sequence_length or min(256 if config is None else 1024, limit)
    if not 2 <= wanted <= limit:
        name = options.model_name_or_path
        raise UserError(f"--sequence_length {wanted}: {name} takes 2 to {limit:,} tokens", shared=True)
    return wanted


def build_tiny(tokenizer: Any, seed: int) -> Any:
    """Return the tiny Llama with random weights that depend only on the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **TINY_SHAPE))


def attention_of(options: Options, dtype: str) -> str | None:
    """Return the attention that was asked for, else flash attention where it's installed, else None."""
    from transformers.utils import is_flash_attn_2_available

    flash = options.attn_implementation is None and dtype != "float32" and is_flash_attn_2_available()
    return "flash_attention_2" if flash else options.attn_implementation


def load_model(options: Options, dtype: str, in_4_bits_on: Any = None) -> Any:
    """Load the model's weights in `dtype` (float32, bfloat16, float16); under ZeRO-3 each rank keeps its part.

    `in_4_bits_on`: a device on which they are kept in 4 bits, computing in `dtype` (QLoRA, arXiv 2305.14314).
    Raises UserError for weights that are missing or not safetensors.
    """
    import torch
    from transformers import AutoModelForCausalLM

    name = options.model_name_or_path
    try:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), attn_implementation=attention_of(options, dtype),
            trust_remote_code=options.trust_remote_code,
            use_safetensors=None if options.allow_pickle else True, **quantized(dtype, in_4_bits_on))
    except (OSError, ValueError, ImportError) as error:
        hint = " Weights in another form: --allow_pickle" if "safetensors" in str(error) else ""
        raise UserError(f"model '{name}': {first_line(error)}{hint}") from None


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


def check_isolation(forward: Callable[..., Any], vocabulary: int, device: Any, rows: int = 1) -> None:
    """Raise a UserError if a document packed behind another can see it.

    The same documents are put behind different ones, in rows of the same shape: their logits must not change.
    `forward` takes input_ids and position_ids ([rows, 24]) and returns logits; `rows` are those of a micro batch, since
    kernels differ for one and for several. On ZeRO-3 every rank must call this.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    first, other, last = torch.randint(0, vocabulary, (3, rows, 12), generator=generator)
    positions = torch.arange(12).repeat(rows, 2).to(device)
    behind = [forward(torch.cat([before, last], 1).to(device), positions)[:, 12:].float()
              for before in (first, other)]
    change = (behind[0] - behind[1]).abs().max().item()
    if not change <= 0.01 * behind[0].std().item():
        raise UserError("this model lets packed documents see each other (logits change by "
                        f"{change:.2g}): train it with --no_packing", shared=True)
