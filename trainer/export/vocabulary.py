"""A tokenizer as llama.cpp has it: its tokens with their kinds, its merges or scores, how text is cut before them.

llama.cpp cuts text by rules that it has names for; a tokenizer that cuts in another way is refused, since its tokens
would differ there without a word.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from trainer.errors import UserError
from trainer.export.architecture import CONVERTER

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What a tokenizer.json cuts by -> llama.cpp's name for it (llama-vocab.cpp).
PATTERNS = {WORDS + r"\p{N}" + REST: "qwen2", WORDS + r"\p{N}{1,3}" + REST: "llama-bpe",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken"}
WHOLE_FIRST = ("llama-bpe", "tekken")  # there a word that is a token is never cut


@dataclass(frozen=True)
class Vocabulary:
    """`kind`: gpt2 (merges of bytes) or llama (pieces with scores); `cut`: llama.cpp's name for how text is cut."""

    kind: str
    cut: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]  # gguf.TokenType
    merges: tuple[str, ...]
    scores: tuple[float, ...]


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Return a tokenizer's vocabulary for a model with so many rows of tokens. Raises UserError."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise refused("it has no tokenizer.json")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise refused(f"it is a {model['type']}")
    pieces = bool(model.get("byte_fallback"))
    cut = "default" if pieces else cut_of(described.get("pre_tokenizer"))
    if cut is None:
        raise refused("it cuts text in a way that llama.cpp has no name for")
    if not pieces and bool(model.get("ignore_merges")) != (cut in WHOLE_FIRST):
        raise refused(f"its ignore_merges differs from what llama.cpp does for {cut}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    words = {number: word for word, number in model["vocab"].items()}
    added = {token["id"]: token for token in described["added_tokens"]}
    if (largest := max([*words, *added])) >= rows:
        raise UserError(f"the tokenizer has token {largest:,} and the model rows for {rows:,}")
    tokens, types = zip(*(entry(number, words.get(number), added.get(number), pieces, model.get("unk_token"))
                          for number in range(rows)), strict=True)
    scores = scores_of(tokens, model["merges"]) if pieces else ()
    return Vocabulary("llama" if pieces else "gpt2", cut, tokens, types, () if pieces else tuple(merges), scores)


def refused(why: str) -> UserError:
    """Return the error for a tokenizer that can't be written."""
    return UserError(f"lanspeed can't write this tokenizer as GGUF: {why}; {CONVERTER} knows more")


def cut_of(description: dict[str, Any] | None) -> str | None:
    """Return llama.cpp's name for a pre_tokenizer of tokenizer.json, None if it has none."""
    parts = (description or {}).get("pretokenizers", [description] if description else [])
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    kinds = [part["type"] for part in parts]
    if parts[-1]["use_regex"]:  # GPT-2's own rule, alone or after digits were taken one by one
        one_by_one = kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]
        return "gpt-2" if kinds == ["ByteLevel"] else "smollm" if one_by_one else None
    if kinds != ["Split", "ByteLevel"] or parts[0]["behavior"] != "Isolated" or parts[0]["invert"]:
        return None
    return PATTERNS.get(parts[0]["pattern"].get("Regex", ""))


def entry(number: int, word: str | None, added: dict[str, Any] | None, pieces: bool, unknown: str | None
          ) -> tuple[str, int]:
    """Return a token and its kind; rows that no text leads to get a name of their own."""
    from gguf import TokenType

    if added:
        is_unknown = added["content"] == unknown
        kind = TokenType.UNKNOWN if is_unknown else TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        return added["content"], kind
    if word is None:
        return f"[PAD{number}]", TokenType.UNUSED
    return word, TokenType.BYTE if pieces and BYTE.fullmatch(word) else TokenType.NORMAL


def scores_of(tokens: tuple[str, ...], merges: list[Any]) -> tuple[float, ...]:
    """Return the scores of pieces: the earlier a merge makes one, the higher. SentencePiece joins by them."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        first.setdefault(left + right, rank)
    return tuple(-float(first.get(token, len(merges) + number)) for number, token in enumerate(tokens))


def add_vocabulary(writer: Any, tokenizer: Any, vocabulary: Vocabulary, ends: list[int]) -> None:
    """Write a vocabulary, its special tokens and its chat template; `ends`: the tokens that end an answer."""
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.kind == "gpt2":
        writer.add_token_merges(list(vocabulary.merges))
    else:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("\u2581"))
    eos = tokenizer.eos_token_id
    for number, add in ((tokenizer.bos_token_id, writer.add_bos_token_id), (eos, writer.add_eos_token_id),
                        (tokenizer.unk_token_id, writer.add_unk_token_id),
                        (tokenizer.pad_token_id, writer.add_pad_token_id),
                        (next((end for end in ends if end != eos), None), writer.add_eot_token_id)):
        if number is not None:
            add(number)
    writer.add_add_bos_token(begins_texts(tokenizer))
    writer.add_add_eos_token(tokenizer("a").input_ids[-1] == eos)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def begins_texts(tokenizer: Any) -> bool:
    """Return whether a tokenizer puts its first token before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
