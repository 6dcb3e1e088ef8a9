"""The model and its tokenizer: from Hugging Face, from a folder, or `tiny`, built and trained on the data at hand."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from trainer.errors import Fault

TINY = "tiny"
TINY_VOCABULARY = 2048
TRAINED_ON = 20_000_000  # characters; more only takes longer
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
# How it is shown conversations: each turn ends with the end token, so that it learns where its own end; after a line's
# end a word is the same tokens whether it is read or to be said.
TINY_TEMPLATE = ("{{ bos_token }}{% for message in messages %}{{ message.role }}\n{{ message.content }}"
                 "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}")
BEGIN, END = "<|begin|>", "<|end|>"


def own_tokenizer(texts: Iterable[str], template: str = TINY_TEMPLATE, vocabulary: int = TINY_VOCABULARY) -> Any:
    """Return a byte-level BPE tokenizer trained on the first of `texts`: every byte has a token, so it knows any."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(first_of(texts, TRAINED_ON), trainer)
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END,
                                   chat_template=template)


def first_of(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yield texts until they have come to so many characters."""
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen >= characters:
            return


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_tokenizer(options: argparse.Namespace, folder: str | Path | None = None) -> Any:
    """Load the tokenizer of the model that `options` name (or of `folder`); raise a Fault if there is none."""
    from transformers import AutoTokenizer

    name = str(folder or options.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise Fault(f"model '{name}': its tokenizer cannot be loaded: {first_line(error)}") from None
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None and tokenizer.pad_token_id is None:
        raise Fault(f"model '{name}': its tokenizer has no end-of-text token, so documents cannot be told apart")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    if options.chat_template:
        tokenizer.chat_template = read_template(Path(options.chat_template))
    return tokenizer


def read_template(path: Path) -> str:
    """Return a chat template's text; raise Fault if there is none."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(f"--chat_template {path}: {getattr(error, 'strerror', None) or error}") from None


def tokenizer_id(tokenizer: Any) -> str:
    """Return what tells this tokenizer's results from another's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend else str(sorted(tokenizer.get_vocab().items()))
    return f"{type(tokenizer).__name__} {tokenizer.eos_token} {words} {tokenizer.chat_template}"


def load_config(options: argparse.Namespace) -> Any:
    """Return the model's configuration (None for tiny); raise a Fault, before any data is read, if there is none."""
    from transformers import AutoConfig

    name = options.model_name_or_path
    if name == TINY:
        return None
    path = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not (path.is_dir() or (options.from_config and path.is_file())):
        raise Fault(f"model '{name}': no such folder")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise Fault(f"model '{name}': {first_line(error)}") from None


def choose_sequence_length(options: argparse.Namespace, config: Any) -> int:
    """Return the tokens a row: what was asked for, or a default, but never more than the model has positions for.

    Raises Fault for more than that, or fewer than 2.
    """
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    limit = TINY_SHAPE["max_position_embeddings"] if config is None else limit or 2**31
    wanted = options.sequence_length or min(256 if config is None else 1024, limit)
    if not 2 <= wanted <= limit:
        name = options.model_name_or_path
        raise Fault(f"--sequence_length {wanted}: {name} takes 2 to {limit:,} tokens", shared=True)
    return wanted


def build_tiny(tokenizer: Any, seed: int) -> Any:
    """Return the tiny Llama with random weights that depend only on the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **TINY_SHAPE))


def attention_of(options: argparse.Namespace, dtype: str) -> str | None:
    """Return the attention that was asked for, else flash attention where it's installed, else None."""
    from transformers.utils import is_flash_attn_2_available

    flash = options.attn_implementation is None and dtype != "float32" and is_flash_attn_2_available()
    return "flash_attention_2" if flash else options.attn_implementation


def load_model(options: argparse.Namespace, dtype: str, in_4_bits_on: Any = None) -> Any:
    """Load the model's weights in `dtype` (float32, bfloat16, float16); under ZeRO-3 each rank keeps its part.

    `in_4_bits_on`: a device on which they are kept in 4 bits, computing in `dtype` (QLoRA, arXiv 2305.14314).
    Raises Fault for weights that are missing or not safetensors.
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
        raise Fault(f"model '{name}': {first_line(error)}{hint}") from None


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
    """Raise a Fault if a document packed behind another can see it.

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
        raise Fault("this model lets packed documents see each other (logits change by "
                    f"{change:.2g}): train it with --no_packing", shared=True)
