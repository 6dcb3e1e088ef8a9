"""Which documents are held out for evaluation, and that none of them is trained on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

from trainer.errors import UserError


def digest_of(text: str) -> str:
    """Return what a document is known by."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def split(texts: Iterable[str], share: float, seed: int, least: int = 0) -> tuple[list[int], list[int]]:
    """Return the numbers of the documents to train on and of those held out, about `share` of all, `least` of them.

    A document's fate hangs on a hash of seed and text: equal documents stay on the same side, so that nothing held
    out is seen in training. Fewer documents than 1/share hold nothing out.
    """
    scores = [hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest() for text in texts]
    wanted = max(int(len(scores) * share), least)
    if not wanted:
        return list(range(len(scores))), []
    limit = sorted(scores)[wanted - 1]
    outside = [number for number, score in enumerate(scores) if score <= limit]
    if len(outside) == len(scores):  # all the same text
        return outside, []
    return [number for number, score in enumerate(scores) if score > limit], outside


def same_data(name: str) -> str:
    """Return what to say of an evaluation on the training data."""
    return (f"--eval_dataset: {name} is what is trained on: name other data (--eval_split NAME), or say that it is "
            "meant: --eval_on_train")


def check_overlap(train: Iterable[str], evaluation: Iterable[str], name: str, allowed: bool, notes: Counter[str]
                  ) -> None:
    """Note how many documents of the evaluation are trained on; raise a UserError if all are and it isn't allowed."""
    digests = [digest_of(text) for text in evaluation]
    both = set(digests).intersection(map(digest_of, train))
    shared = sum(digest in both for digest in digests)
    if shared == len(digests) and not allowed:
        raise UserError(same_data(name), shared=True)
    if shared:
        notes["an evaluation document that is trained on too"] += shared
