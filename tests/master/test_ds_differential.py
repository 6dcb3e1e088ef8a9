"""Configs that nobody wrote, put to DeepSpeed's own parser and to ours: both refuse, or both take them.

    python -m pytest tests/master/test_ds_differential.py --differential 200000      ten minutes and more
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from ds_configs import SLIPS, configs, refusal
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from master.ds_config.checker import Target, check
from master.ds_config.fixes import apply_fixes
from master.ds_config.json_text import Document
from master.ds_config.problem import PARSE

LIMITS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
PLAIN = Target(trainer=False, world_size=1)
JSON = st.recursive(SLIPS, lambda part: st.lists(part, max_size=3) | st.dictionaries(
    st.sampled_from(["type", "params", "enabled", "stage", "device"]), part, max_size=3))


def refused_by_us(config: Any, target: Target) -> list[str]:
    return [problem.line("config", 1) for problem in check(Document(json.dumps(config)), target)
            if problem.level == "error" and problem.phase == PARSE]


def test_deepspeed_and_we_refuse_the_same(pytestconfig: pytest.Config) -> None:
    """Both verdicts on many configs; of those that differ the simplest is shown."""
    asked = pytestconfig.getoption("--differential")
    count = asked or (3000 if pytestconfig.getoption("--all") else 500)

    @settings(max_examples=count, derandomize=not asked, **LIMITS)
    @given(configs())
    def compare(config: dict[str, Any]) -> None:
        theirs, ours = refusal(config), refused_by_us(config, PLAIN)
        note(f"config: {json.dumps(config)}\nDeepSpeed: {theirs or 'takes it'}\nwe: {ours or 'take it'}")
        assert bool(theirs) == bool(ours)

    compare()


@settings(max_examples=400, derandomize=True, **LIMITS)
@given(st.dictionaries(st.sampled_from(["optimizer", "scheduler", "zero_optimization", "fp16", "bf16", "aio", "nope",
                                        "checkpoint", "train_batch_size", "data_types", "compile"]), JSON, max_size=4),
       st.sampled_from([Target(), Target(trainer=True, completed=True, world_size=3), PLAIN]))
def test_whatever_is_written_is_answered(config: dict[str, Any], target: Target) -> None:
    for problem in check(Document(json.dumps(config)), target):
        assert "\n" not in problem.line("config", 1) and problem.code
        assert problem.level != "error" or problem.phase
        assert problem.level != "error" or problem.how_to_fix, problem


@settings(max_examples=600, derandomize=True, **LIMITS)
@given(configs(), st.sampled_from([Target(), Target(trainer=True), PLAIN]))
def test_mends_make_nothing_worse(config: dict[str, Any], target: Target) -> None:
    before = check(Document(json.dumps(config, indent=2)), target)
    text, done = apply_fixes(json.dumps(config, indent=2), target)
    after = check(Document(text), target)
    assert len(after) <= len(before) - len(done)
    note(f"{json.dumps(config)}\n{text}")
    if not refusal(copy.deepcopy(config)):
        assert not refusal(json.loads(text))
