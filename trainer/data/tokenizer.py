"""The tokenizer: the model's own, or one that is trained on the data at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from trainer.errors import UserError, first_line, is_out_of_memory
from trainer.estimate.shape import TINY_VOCABULARY
from trainer.options import Options

LARGEST_VOCABULARY = 32_000
TOKENIZER_CHARACTERS = 20_000_000  # characters; more only takes longer
# How it is shown conversations: each turn ends with the end token, so that it learns where its own end; after a line's
# end a word is the same tokens whether it is read or to be said.
TINY_TEMPLATE = ("{{ bos_token }}{% if tools %}tools\n{{ tools | tojson }}{{ eos_token }}\n{% endif %}"
                 "{% for message in messages %}{{ message.role }}\n{{ message.content }}"
                 "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}\n{% endfor %}"
                 "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}")
Text = TypeVar("Text", bound=str)
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
    tokenizer.train_from_iterator(first_characters(texts, TOKENIZER_CHARACTERS), trainer)
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END,
                                   chat_template=template)


def first_characters(texts: Iterable[Text], characters: int) -> Iterator[Text]:
    """Yield texts until they have come to so many characters."""
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen >= characters:
            return


def load_tokenizer(options: Options, folder: str | Path | None = None) -> Any:
    """Load the tokenizer of the model that `options` name (or of `folder`); raise a UserError if there is none."""
    from transformers import AutoTokenizer

    name = str(folder or options.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # files that somebody made up can raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"model '{name}': its tokenizer cannot be loaded: {first_line(error)}") from None
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None and tokenizer.pad_token_id is None:
        raise UserError(f"model '{name}': its tokenizer has no end-of-text token, so documents cannot be told apart")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    if options.chat_template:
        tokenizer.chat_template = read_template(Path(options.chat_template))
    return tokenizer


def check_rows(tokenizer: Any, config: Any, options: Options, largest: Callable[[], int]) -> None:
    """Raise a UserError if the data has tokens that the model's embedding has no rows for.

    `largest` returns the data's largest token; it is asked only where the tokenizer has more than the model.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    if rows is None or options.from_config or options.resize_embeddings or len(tokenizer) <= rows:
        return
    if (token := largest()) >= rows:
        raise UserError(f"model '{options.model_name_or_path}' has {rows:,} rows for tokens, and its tokenizer makes "
                        f"token {token} ({tokenizer.convert_ids_to_tokens(token)}) of the data: --resize_embeddings "
                        "gives it rows for all", shared=True)


def read_template(path: Path) -> str:
    """Return a chat template's text; raise UserError if there is none."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat_template {path}: {getattr(error, 'strerror', None) or error}") from None


def tokenizer_id(tokenizer: Any) -> str:
    """Return what tells this tokenizer's results from another's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend else str(sorted(tokenizer.get_vocab().items()))
    return f"{type(tokenizer).__name__} {tokenizer.eos_token} {words} {tokenizer.chat_template}"


def own_vocabulary(options: Options, config: Any) -> int | None:
    """Return the size of the tokenizer that is trained on the data; None where the model brings its own."""
    if config is None:
        return TINY_VOCABULARY
    if not options.from_config:
        return None
    size = getattr(config.get_text_config(), "vocab_size", LARGEST_VOCABULARY)
    return int(options.vocab_size or min(size, LARGEST_VOCABULARY))
