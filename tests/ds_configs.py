"""DeepSpeed configs drawn from schemas/ds_config.schema.json, with mistakes among them, and DeepSpeed's own verdicts.

    python tests/ds_configs.py < configs.jsonl     how far each gets: parse, init, step or ok, and why not further
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from typing import Any

from hypothesis import strategies as st

from master.ds_config.schema import schema

# What people write where something else is wanted.
SLIPS = st.sampled_from([
    None, True, False, 0, 1, 2, 3, -1, 0.5, 1.0, 2.5, 1e3, 5e8, 10**20, "", "2", "-1", "+2", " 3 ", "3.0", "1.5", "5e8",
    "5_0", "_1", "0x10", "nan", "auto", "true", "no", "none", "cpu", "fp16", "abc", [], {}, ["x"], [1], ["auto"],
    {"a": 1}])
NAMES = st.sampled_from(["_comment", "enabledd", "nope"])
# Read from elsewhere (the number of ranks, the accelerator) and not by the parse alone.
ELSEWHERE = {"sequence_parallel_size", "use_gds"}


RARELY = st.sampled_from([False] * 9 + [True])
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "boolean": st.booleans(), "integer": st.sampled_from([0, 1, 2, 8, 500_000_000]), "null": st.none(),
    "number": st.sampled_from([0, 0.1, 0.5, 1.0, 2]), "string": st.sampled_from(["x", "/tmp", "auto"])}


@st.composite
def values(draw: st.DrawFn, node: dict[str, Any]) -> Any:
    """Return a value that the schema has for a node."""
    if "enum" in node:
        return draw(st.sampled_from(node["enum"]))
    types = node.get("type", "integer")
    kind = types if isinstance(types, str) else draw(st.sampled_from(types))
    if kind == "object":
        return draw(objects(node))
    if kind == "array":
        return draw(st.lists(values(node.get("items", {"type": "string"})), max_size=2))
    return "auto" if kind == "string" and "pattern" in node else draw(KINDS[kind])


@st.composite
def objects(draw: st.DrawFn, node: dict[str, Any]) -> dict[str, Any]:
    """Return an object with a few of a node's keys, now and then one that it hasn't, now and then a wrong value."""
    known = {key: inner for key, inner in node.get("properties", {}).items() if key not in ELSEWHERE}
    found: dict[str, Any] = {}
    for key in draw(st.lists(st.sampled_from(list(known) or ["nope"]), max_size=4, unique=True)):
        if "x-removed" not in known.get(key, {}) or draw(RARELY):
            found[key] = draw(SLIPS if key not in known or draw(RARELY) or draw(RARELY) else values(known[key]))
    if draw(RARELY) and draw(st.booleans()):
        found[draw(NAMES)] = draw(SLIPS)
    return found


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Return a config, mostly with a batch size, so that other mistakes show."""
    found = draw(objects(schema()))
    if not draw(RARELY):
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            found.pop(key, None)
        found[draw(st.sampled_from(["train_batch_size", "train_micro_batch_size_per_gpu"]))] = 2
    if draw(st.booleans()):
        zero = draw(objects(schema()["properties"]["zero_optimization"]))
        found["zero_optimization"] = {**zero, "stage": draw(st.sampled_from([0, 1, 2, 3]))}
    return found


def refusal(config: dict[str, Any]) -> str:
    """Return why DeepSpeedConfig refuses a config, '' if it takes it."""
    import hjson
    from deepspeed.runtime.config import DeepSpeedConfig

    logging.disable(logging.CRITICAL)
    try:
        DeepSpeedConfig(hjson.loads(json.dumps(config)))  # as from a file: Hjson makes integers of 1.0 and 5e8
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        logging.disable(logging.NOTSET)
    return ""


def how_far(config: dict[str, Any]) -> tuple[str, str]:
    """Return where a config ends on one CPU rank, and why."""
    import deepspeed
    import hjson
    import torch

    if refused := refusal(config):
        return "parse", refused
    stage = "init"
    try:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(),
                                          config=hjson.loads(json.dumps(config)))
        stage = "step"
        for _ in range(4):
            rows = torch.randn(4, 8)
            loss = engine(rows.bfloat16() if engine.bfloat16_enabled() else rows).float().pow(2).mean()
            engine.backward(loss)
            engine.step()
    except Exception as error:
        return stage, f"{type(error).__name__}: {error}"
    return "ok", ""


def main() -> int:
    """Answer each line of standard input with one."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=port)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for a minute
    logging.disable(logging.CRITICAL)
    deepspeed.init_distributed("gloo")
    for line in sys.stdin:
        print("=> " + json.dumps(how_far(json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
