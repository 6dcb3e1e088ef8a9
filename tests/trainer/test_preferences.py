"""DPO: pairs of answers in the forms that people have, trained by TRL with the checks of every training."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run, Train
from transformers import PreTrainedTokenizerFast

from trainer.data.preferences import encode, normalized_pair
from trainer.data.rows import settled_form
from trainer.data.tokenizer import own_tokenizer
from trainer.errors import UserError
from trainer.options import parse_options
from trainer.preference import pairs

NO_SAMPLES = ("--num_samples", "0")
SHORT = ("--eval_steps", "6", "--eval_fraction", "0.2", "--num_samples", "1", "--global_batch_size", "16")


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


HELLO, YES, NO = said("user", "hello"), said("assistant", "yes"), said("assistant", "no")
TALK = {"prompt": [HELLO], "chosen": [YES], "rejected": [NO]}


@pytest.mark.parametrize(("row", "found"), [
    ({"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": "a", "chosen": " b", "rejected": " c"}),
    ({"chosen": "Human: hi\n\nAssistant: I am", "rejected": "Human: hi\n\nAssistant: Is it"},
     {"prompt": "Human: hi\n\nAssistant: ", "chosen": "I am", "rejected": "Is it"}),
    (TALK, TALK), ({"chosen": [HELLO, YES], "rejected": [HELLO, NO]}, TALK),
    ({"prompt": "hello", "chosen": [HELLO, YES], "rejected": [HELLO, NO]}, TALK),
    ({"prompt": "hello", "chosen": [YES], "rejected": [NO]}, TALK),
    ({"prompt": [HELLO], "chosen": [HELLO, YES], "rejected": [HELLO, NO]}, TALK),
    ({"prompt": "hello", "chosen": json.dumps([YES]), "rejected": json.dumps([NO])}, TALK),
    (TALK | {"system": "be brief"}, TALK | {"prompt": [said("system", "be brief"), HELLO]}),
    ({"chosen": [HELLO, YES], "rejected": [HELLO, NO, HELLO, YES]}, TALK | {"rejected": [NO, HELLO, YES]})])
def test_pairs_come_in_one_form(row: dict[str, Any], found: dict[str, Any]) -> None:
    assert json.loads(normalized_pair(row, "a.jsonl:1")) == found


@pytest.mark.parametrize(("row", "message"), [
    ({"chosen": [HELLO, YES], "rejected": [YES]}, "begin with no common message"),
    ({"prompt": "a", "chosen": [HELLO], "rejected": [YES]}, "'chosen' doesn't end with an answer of the assistant"),
    ({"prompt": [HELLO], "chosen": "yes", "rejected": "no"}, "a conversation, and chosen and rejected plain text"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "column 'rejected'"),
    ({"prompt": "a", "chosen": [said("wizard", "b")], "rejected": [YES]}, "the role 'wizard'")])
def test_rows_that_are_no_pair_are_refused_by_line(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"a.jsonl:1.*{message}"):
        normalized_pair(row, "a.jsonl:1")


def test_columns_that_are_good_for_two_methods_are_asked_about() -> None:
    both = ["prompt", "chosen", "rejected", "messages"]  # as UltraFeedback has them
    with pytest.raises(UserError, match=r"messages and chosen \+ rejected: say which: --method sft or"):
        settled_form(both, "text", None, "here")
    assert settled_form(both, "text", "sft", "here") == "messages"
    assert settled_form(both, "text", "dpo", "here") == settled_form(both[:3], "text", None, "here") \
        == "chosen + rejected"
    with pytest.raises(UserError, match=r"--method dpo needs columns chosen and rejected.* here are text"):
        settled_form(["text"], "text", "dpo", "here")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made: PreTrainedTokenizerFast = own_tokenizer(["the weather is fine today, and tomorrow it is not"] * 40)
    return made


def encoded(row: dict[str, Any], tokenizer: Any, longest: int = 64) -> tuple[dict[str, Any] | None, Counter[str]]:
    notes: Counter[str] = Counter()
    return encode(normalized_pair(row, "here"), tokenizer, longest, notes), notes


@pytest.mark.parametrize("row", [{"prompt": "the weather", "chosen": " is fine", "rejected": " is not"}, TALK])
def test_a_pair_becomes_a_prompt_and_two_answers(row: dict[str, Any], tokenizer: Any) -> None:
    found, notes = encoded(row, tokenizer)
    assert found and not notes
    text = {name: tokenizer.decode(found[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    talks = row is TALK
    assert ("hello" if talks else "the weather") in text["prompt_ids"]
    assert text["chosen_ids"].startswith("yes" if talks else " is fine")
    assert text["rejected_ids"].startswith("no" if talks else " is not")
    assert tokenizer.eos_token_id in found["chosen_ids"][-2:]  # where an answer ends is learnt
    assert found["length"] == 2 * len(found["prompt_ids"]) + len(found["chosen_ids"]) + len(found["rejected_ids"])


@pytest.mark.parametrize(("row", "longest", "note"), [
    ({"prompt": "the weather", "chosen": " is fine", "rejected": " is fine"}, 64, "whose answers are the same"),
    ({"prompt": "the weather " * 20, "chosen": " is fine", "rejected": " is not"}, 16, "don't differ within"),
    ({"prompt": "the weather", "chosen": " it" * 30, "rejected": " is" * 30}, 16, "whose end is cut off")])
def test_a_pair_that_teaches_nothing_is_left_out_and_told(row: dict[str, Any], longest: int, note: str, tokenizer: Any
                                                          ) -> None:
    found, notes = encoded(row, tokenizer, longest)
    assert note in str(notes) and (found is None) == ("cut" not in note)
    if found:
        assert len(found["prompt_ids"]) + max(len(found["chosen_ids"]), len(found["rejected_ids"])) == longest


@pytest.fixture
def polite(tmp_path: Path) -> Path:
    """Questions with a polite and a rude answer, in words that don't come twice."""
    choose = random.Random(3)
    names = ["".join(choose.choices("aeioubdfklmnprst", k=5)) for _ in range(240)]
    rows = [{"prompt": f"where is {name}?", "chosen": f" kindly look at {name}", "rejected": f" go away {name}"}
            for name in names]
    (tmp_path / "polite.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "polite.jsonl"


def accuracy(run: Run) -> dict[int, float]:
    return run.losses("eval_rewards/accuracies")


@pytest.mark.parametrize(("ranks", "config", "words"), [
    (1, None, ()), (2, "configs/zero1", ("--lora", "4", "--learning_rate", "1e-2")),
    pytest.param(2, "configs/zero3", (), marks=pytest.mark.slow),
    pytest.param(2, "configs/zero2", (), marks=pytest.mark.slow),
    pytest.param(2, "configs/zero3", ("--lora", "4", "--learning_rate", "1e-2", "--eval_steps", "12", *NO_SAMPLES),
                 marks=pytest.mark.slow)])
def test_dpo_learns_which_answer_is_better(
    train: Train, polite: Path, ranks: int, config: str | None, words: tuple[str, ...]
) -> None:
    run = train(*SHORT, *words, "--max_steps", "12", data=polite, ranks=ranks, config=config)
    assert "method        DPO, beta 0.1" in run.output and "DPO by TRL" in run.output
    assert "gradients checked against the sum of all ranks' own" in run.output
    assert accuracy(run)[0] == 0 and accuracy(run)[12] > 0.9  # at first both are as the reference has them
    assert run.losses("eval_loss")[0] == pytest.approx(0.6931, abs=1e-3) and run.losses("eval_loss")[12] < 0.65
    assert {"rewards/margins", "rewards/accuracies"} <= next(row for row in run.metrics if "loss" in row).keys()
    facts = json.loads((run.path / "run.json").read_text())
    assert facts["method"] == "dpo" and facts["summary"]["accuracy"] == accuracy(run)[12]
    assert (run.path / "model" / "config.json").exists() and run.metrics[1]["tokens"] > 0


@pytest.mark.slow
def test_beta_keeps_the_model_close(train: Train, polite: Path) -> None:
    near, far = (train("--dpo_beta", beta, *SHORT, "--max_steps", "6", data=polite, name=beta)
                 for beta in ("1", "0.05"))
    margin = {run.path.name: run.losses("eval_rewards/margins")[6] / float(run.path.name) for run in (near, far)}
    assert margin["1"] < margin["0.05"]


@pytest.mark.parametrize(("config", "words"), [
    ("configs/zero1", ()), pytest.param("configs/zero3", (), marks=pytest.mark.slow),
    pytest.param("configs/zero1", ("--lora", "4"), marks=pytest.mark.slow)])
def test_dpo_resumes_as_if_never_stopped(train: Train, polite: Path, config: str, words: tuple[str, ...]) -> None:
    more = (*SHORT, *NO_SAMPLES, *words, "--lr_scheduler_type", "constant")
    whole = train(*more, "--max_steps", "6", data=polite, ranks=2, config=config, name="whole")
    train(*more, "--max_steps", "3", data=polite, ranks=2, config=config, name="parts")
    parts = train(*more, "--max_steps", "6", "--resume_from_checkpoint", "auto", data=polite, ranks=2, config=config,
                  name="parts")
    assert parts.losses()[6] == pytest.approx(whole.losses()[6], abs=1e-4)
    other = train(*more, "--max_steps", "7", "--dpo_beta", "0.3", "--resume_from_checkpoint", "auto", data=polite,
                  ranks=2, config=config, name="parts", expect=1)
    assert "was trained with --dpo_beta 0.1, and this training runs with --dpo_beta 0.3" in other.output


@pytest.mark.slow
def test_an_adapter_is_compared_with_itself_as_it_was(train: Train, polite: Path) -> None:
    base = train("--max_steps", "2", "--sequence_length", "64", name="base").path / "model"
    first = train("--lora", "4", *SHORT, "--max_steps", "4", "--learning_rate", "1e-2", data=polite, model=str(base),
                  name="first")
    more = train("--adapter", str(first.path / "model"), *SHORT, "--max_steps", "3", data=polite, model=str(base),
                 name="more", ranks=2, config="configs/zero1")
    assert more.losses("eval_loss")[0] == pytest.approx(0.6931, abs=1e-3)  # and not what the first run has gained
    assert [path.name for path in (more.path / "model").iterdir() if path.is_dir()] == []  # no copy of TRL's


@pytest.mark.parametrize("flag", [["--streaming", "--max_steps", "2"], ["--torch_compile"], ["--liger"]])
def test_what_dpo_cannot_do_is_told(flag: list[str], polite: Path) -> None:
    options = parse_options(["--model_name_or_path", "tiny", "--dataset_path", str(polite), *flag])
    with pytest.raises(UserError, match=f"holds pairs of answers .DPO., which {flag[0]} isn't for"):
        pairs.settle(options, "polite.jsonl")


def test_without_trl_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it weren't installed
    with pytest.raises(UserError, match=r"DPO needs TRL, on every host: pip install 'trl>=1\.0'"):
        pairs.settle(parse_options(["--model_name_or_path", "tiny"]), "polite.jsonl")
    assert "trl>=1.0" in (ROOT / "setup.cfg").read_text()


def test_text_and_pairs_are_not_trained_together(train: Train, polite: Path, texts: Path) -> None:
    run = train("--dataset_path", str(polite), str(texts), "--max_steps", "1", data=None, expect=1)
    assert "can't be trained together: one is learnt as text, the other by comparison" in run.output
