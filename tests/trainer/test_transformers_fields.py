"""--set and --optim: read from transformers' source, refused where they would break what the trainer promises."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT

from trainer.errors import UserError
from trainer.flags import transformers_fields
from trainer.flags.dataset_words import DatasetPart, described, parts_of
from trainer.flags.transformers_fields import FLAGS, REFUSED, check_engine, check_optimizer, fields_set, package_of
from trainer.options import parse_options


@pytest.mark.parametrize(("word", "value"), [
    ("data_seed=7", 7), ("eval_delay=2", 2.0), ("full_determinism=true", True), ("tf32=none", None),
    ("run_name=a=b", "a=b"), ('lr_scheduler_kwargs={"num_cycles": 2}', {"num_cycles": 2}),
    ("debug=underflow_overflow", "underflow_overflow"), ("optim_target_modules=all-linear", "all-linear")])
def test_a_field_gets_a_value_of_its_type(word: str, value: Any) -> None:
    assert fields_set([word]) == {word.partition("=")[0]: value}


@pytest.mark.parametrize(("word", "message"), [
    ("data_sed=7", "no such field: did you mean data_seed?"), ("learning_rate=1", "--learning_rate is the flag for it"),
    ("label_smoothing_factor=0.1", "the loss is the trainer's own"), ("data_seed=x", "a value of int"),
    ("tf32=maybe", "a value of bool"), ("data_seed", "NAME=VALUE"), ("push_to_hub=true", "hf upload"),
    ("lr_scheduler_kwargs={'a'", "a value of dict")])
def test_a_field_that_cannot_be_set_is_told(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        parse_options(["--model_name_or_path", "tiny", "--set", word])
    assert told.value.exit_code == 2


def test_every_field_that_is_refused_is_one_of_transformers() -> None:
    from transformers import TrainingArguments

    known = set(TrainingArguments.__dataclass_fields__)
    refused = {name for names in REFUSED.values() for name in names}
    assert refused <= known and FLAGS.keys() <= known and not refused & FLAGS.keys()
    assert set(transformers_fields.members("TrainingArguments")) <= known


def test_a_wrong_field_is_told_before_torch_is_loaded() -> None:
    code = ("import sys\nfrom trainer.options import parse_options\n"
            "parse_options(['--model_name_or_path', 'x', '--set', 'data_seed=1', '--optim', 'sgd'])\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(("name", "message"), [("adamw8bit", "did you mean adamw_8bit?"), ("muonn", "mean muon?")])
def test_an_optimizer_that_nobody_knows_is_told(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_optimizer(name)


@pytest.mark.parametrize(("name", "config", "offloads", "message"), [
    ("muon", None, False, "is DeepSpeed's"), ("galore_adamw", {}, False, "needs whole weights"),
    ("sgd", {"optimizer": {"type": "Adam"}}, False, "an optimizer of its own"),
    ("adamw_8bit", {}, True, "runs on a GPU"), ("muon", {}, True, "runs on a GPU")])
def test_an_optimizer_that_the_engine_cannot_drive_is_refused(
    name: str, config: dict[str, Any] | None, offloads: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_engine(name, config, offloads)


def test_what_an_optimizer_comes_from() -> None:
    known = {name: package_of(name) for name in (None, "sgd", "adamw_torch_fused", "paged_adamw_8bit", "lion_32bit",
                                                 "apollo_adamw", "adamw_torch_8bit")}
    assert known == {None: None, "sgd": None, "adamw_torch_fused": None, "paged_adamw_8bit": "bitsandbytes",
                     "lion_32bit": "bitsandbytes", "apollo_adamw": "apollo_torch", "adamw_torch_8bit": "torchao"}


def test_datasets_have_the_shares_that_their_weights_say() -> None:
    assert parts_of(["a", "b"]) == (DatasetPart("a"), DatasetPart("b")) and described(parts_of(["a", "b"])) is None
    assert parts_of(["a:0.5"]) == (DatasetPart("a"),)
    assert parts_of(["a:3", "b:1"]) == (DatasetPart("a", 0.75), DatasetPart("b", 0.25))
    assert described(parts_of(["a:0.3", "org/b"])) == "0.3 0.7"
    shares = [part.share for part in parts_of(["a:.5", "b", "c"])]
    assert shares == pytest.approx([0.5, 0.25, 0.25])


@pytest.mark.parametrize(("words", "message"), [
    (["a:1", "b"], "leave nothing for b"), (["a", "a:2"], "names a twice"), (["a:0", "b:1"], "above 0")])
def test_weights_that_mean_nothing_are_told(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parts_of(words)


def test_a_file_with_a_colon_in_its_name_has_no_weight(tmp_path: Any) -> None:
    path = tmp_path / "a:3"
    path.touch()
    assert parts_of([str(path), "b:0.3"])[0].name == str(path)
