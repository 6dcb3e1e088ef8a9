"""The trainer's command line: each spelling that its users know, and the nearest flag for one that nobody knows."""

from __future__ import annotations

import pytest

from trainer.errors import UserError
from trainer.options import DEFAULT_DS_CONFIG, parse_options


def parse(*words: str) -> object:
    return parse_options(["--model_name_or_path", "tiny", *words])


@pytest.mark.parametrize(("words", "path"), [
    ([], None),
    (["--deepspeed"], str(DEFAULT_DS_CONFIG)),
    (["--deepspeed", "--deepspeed_config", "a.json"], "a.json"),
    (["--deepspeed_config=a.json"], "a.json"),
    (["--deepspeed", "a.json"], "a.json"),
    (["--deepspeed", "a.json", "--local_rank=1"], "a.json"),
])
def test_deepspeed_is_asked_for_in_any_spelling(words: list[str], path: str | None) -> None:
    found = parse(*words).deepspeed  # type: ignore[attr-defined]
    assert (found and str(found)) == path


def test_dashes_serve_as_underscores() -> None:
    assert parse("--max-steps", "7", "--num-epochs=3").max_steps == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(("words", "message"), [
    (["--max_step", "5"], "unknown argument --max_step: did you mean --max_steps?"),
    (["--learning-rat=1"], "unknown argument --learning_rat=1: did you mean --learning_rate?"),
    (["--xyzzy"], "unknown argument --xyzzy: all flags: python trainer/train.py --help"),
    (["stray"], "unknown argument stray"),
    (["--num_epochs", "0"], "0 is not above 0"),
    (["--eval_fraction", "1.5"], "1.5 is not in [0, 1)"),
    (["--save_steps", "2.5"], "2.5 is neither whole steps"),
    (["--deepspeed", "a.json", "--deepspeed_config", "b.json"], "name two files"),
])
def test_a_wrong_use_is_one_line_and_exit_code_2(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*words)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_model_is_required() -> None:
    with pytest.raises(UserError, match="--model_name_or_path"):
        parse_options([])
