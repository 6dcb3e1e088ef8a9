"""schemas/ds_config.schema.json against the DeepSpeed, transformers and torch that are installed.

A key that DeepSpeed reads and the schema lacks fails here, and so does one that DeepSpeed no longer has.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import deepspeed
import jsonschema
import pytest
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as ds
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPConfig, TPTrainingConfig
from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from master.ds_config.rules import classes
from master.ds_config.schema import SCHEMA, node_of, schema

MODELS: dict[tuple[str, ...], Any] = {
    ("fp16",): DeepSpeedFP16Config, ("bf16",): DeepSpeedBF16Config, ("bfloat16",): DeepSpeedBF16Config,
    ("zero_optimization",): DeepSpeedZeroConfig, ("zero_optimization", "zenflow"): ZenFlowConfig,
    ("zero_optimization", "offload_param"): DeepSpeedZeroOffloadParamConfig,
    ("zero_optimization", "offload_optimizer"): DeepSpeedZeroOffloadOptimizerConfig,
    ("zero_optimization", "leaf_module"): DeepSpeedZeroLeafModuleConfig,
    ("tensorboard",): TensorBoardConfig, ("wandb",): WandbConfig, ("csv_monitor",): CSVConfig, ("comet",): CometConfig,
    ("comms_logger",): CommsLoggerConfig, ("compile",): CompileConfig, ("hybrid_engine",): ds.HybridEngineConfig,
    ("tensor_parallel",): TPTrainingConfig, ("tensor_parallel", "tp"): TPConfig,
    ("tensor_parallel", "tensor_parallel"): TPConfig, ("timers", "throughput"): DeepSpeedThroughputTimerConfig,
    ("weight_quantization",): WeightQuantConfig}
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
PACKAGE = Path(deepspeed.__file__).parent


def checked_sections(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if node.get("x-checked"):
        yield path
    for name, inner in node.get("properties", {}).items():
        yield from checked_sections(inner, (*path, name))


def properties(path: tuple[str, ...]) -> dict[str, Any]:
    node = node_of(path)
    assert node is not None
    return {name: inner for name, inner in node["properties"].items() if "x-removed" not in inner}


def test_the_schema_is_one_and_each_key_has_a_title_and_a_description() -> None:
    jsonschema.Draft7Validator.check_schema(schema())

    def walk(node: dict[str, Any], path: str) -> None:
        for name, inner in node.get("properties", {}).items():
            assert inner["title"] and inner["description"].strip(), f"{path}.{name}"
            assert inner.get("deprecated") is not True or inner["deprecationMessage"], f"{path}.{name}"
            walk(inner, f"{path}.{name}")

    walk(schema(), "$")


def test_checked_sections_are_deepspeeds_models() -> None:
    assert set(checked_sections(schema())) == set(MODELS)


@pytest.mark.parametrize("path", MODELS, ids=".".join)
def test_a_checked_section_has_the_models_keys_types_bounds_and_defaults(path: tuple[str, ...]) -> None:
    known = properties(path)
    fields = MODELS[path].model_fields
    assert set(known) == set(fields) | {field.alias for field in fields.values() if field.alias}
    for name, field in fields.items():
        node = known[field.alias or name]
        types = node.get("type", [])
        for kind in {KINDS[part] for part in parts(field.annotation) if part in KINDS}:
            assert kind in types or kind in ([types] if isinstance(types, str) else types), f"{path} {name} {kind}"
        assert "null" in types or type(None) not in parts(field.annotation) or "type" not in node, f"{path} {name}"
        for bound in field.metadata:
            for short, long in BOUNDS.items():
                assert not hasattr(bound, short) or node[long] == getattr(bound, short), f"{path} {name}"
        if "default" in node and not field.is_required() and isinstance(field.get_default(), (int, float, str)):
            assert node["default"] == field.get_default(), f"{path} {name}"
        choices = [value for part in parts(field.annotation) if hasattr(part, "__members__") for value in part]
        choices += [value for part in parts(field.annotation) if get_origin(part) is Literal
                    for value in get_args(part)]
        values = {getattr(value, "value", value) for value in choices}
        assert not values or values == set(node.get("enum", node.get("items", {}).get("enum"))) - {"auto"}, name


def parts(annotation: Any) -> list[Any]:
    """The parts of Optional, Union and List."""
    if get_origin(annotation) in (Union, list):
        return [part for each in get_args(annotation) for part in parts(each)]
    return [annotation]


class Asked(dict[str, Any]):
    """A section that notes which keys it is asked for; sections within are of the same kind."""

    def __init__(self, path: tuple[str, ...], log: set[tuple[str, ...]], items: dict[str, Any]) -> None:
        super().__init__(items)
        self.path, self.log = path, log

    def __contains__(self, key: object) -> bool:
        self.log.add((*self.path, str(key)))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.log.add((*self.path, key))
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.log.add((*self.path, key))
        return super().get(key, default)

    def keys(self) -> Any:
        return list(super().keys()) and self

    def part(self, *path: str) -> Asked:
        """A section within, without a note of having asked."""
        found: Asked = dict.__getitem__(self, path[0])
        return found.part(*path[1:]) if path[1:] else found

    def __copy__(self) -> Asked:
        return Asked(self.path, self.log, dict(self))


def everything(node: dict[str, Any], path: tuple[str, ...], log: set[tuple[str, ...]]) -> Asked:
    """A config with every unchecked section in it, switched on so that DeepSpeed reads all of it."""
    items: dict[str, Any] = {}
    for name, inner in node.get("properties", {}).items():
        if "object" in inner.get("type", ()) and not inner.get("x-checked") and "x-removed" not in inner \
                and name not in ("params", "schedule_config", "model_info", "arg_mappings"):
            items[name] = everything(inner, (*path, name), log)
        elif name == "enabled" and path and path[0] != "flops_profiler":
            items[name] = True
    return Asked(path, log, items)


def test_deepspeed_asks_for_no_key_that_the_schema_lacks() -> None:
    log: set[tuple[str, ...]] = set()
    config = everything(schema(), (), log)
    config.update(train_batch_size=1)
    config.part("optimizer").update(type="AdamW", params=Asked(("optimizer", "params"), log, {}))
    config.part("scheduler").update(type="WarmupLR")
    config.part("data_efficiency", "data_sampling", "curriculum_learning").update(curriculum_metrics={})
    config.part("data_efficiency", "data_sampling", "dynamic_batching").update(max_tokens=1)
    ds.DeepSpeedConfig(config)
    unknown = {".".join(path) for path in log if node_of(path) is None}
    assert not unknown
    assert len(log) > 150, "the keys are asked for in another way now"


def test_deepspeeds_constants_have_no_key_that_the_schema_lacks() -> None:
    modules = ("runtime.constants", "runtime.activation_checkpointing.config", "runtime.swap_tensor.constants",
               "autotuning.constants", "profiling.constants", "runtime.model_checkpointing.constants",
               "runtime.data_pipeline.constants")
    names = set(re.findall(r'"([^"]+)": ?\{', SCHEMA.read_text()))
    # An argument of a program, a key of DeepSpeed's own files, and a place that the schema leaves open.
    elsewhere = {"ds_config", "sparse_attention"}
    for module in modules:
        found = vars(importlib.import_module(f"deepspeed.{module}"))
        keys = {value for name, value in found.items() if isinstance(value, str) and f"{name}_DEFAULT" in found}
        assert keys, module
        assert not keys - names - elsewhere, module


def test_the_schema_has_no_key_that_deepspeed_does_not_know() -> None:
    source = "\n".join(path.read_text(errors="replace") for path in PACKAGE.rglob("*.py"))
    words = set(re.findall(r"""["'](\w+)["']""", source)) | set(re.findall(r"^\s+(\w+): [\w\[]", source, re.MULTILINE))

    def walk(node: dict[str, Any], path: str) -> Iterator[str]:
        for name, inner in node.get("properties", {}).items():
            if name not in words:
                yield f"{path}.{name}"
            if name != "params":  # those are compared with the classes' arguments, below
                yield from walk(inner, f"{path}.{name}")
        if isinstance(node.get("items"), dict):
            yield from walk(node["items"], path)

    assert set(walk(schema(), "$")) == {"$.$schema"}


def test_removed_keys_are_those_that_deepspeed_refuses_by_name() -> None:
    removed = {name for name, node in schema()["properties"].items() if "x-removed" in node}
    assert removed == set(ds._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    zero = schema()["properties"]["zero_optimization"]["properties"]
    assert {name for name, node in zero.items() if "x-removed" in node} == set(ds._REMOVED_ZERO_CONFIG_KEYS)


def test_auto_is_taken_exactly_where_the_trainer_fills_it() -> None:
    from accelerate.utils import dataclasses
    from transformers.integrations import deepspeed as trainer

    filled = set(re.findall(r'fill_(?:match|only)\(\s*"([^"]+)"', inspect.getsource(trainer)))
    mapping = inspect.getsource(dataclasses.DeepSpeedPlugin).split("plugin_to_config_mapping = {")[1].split("}")[0]
    filled |= set(re.findall(r'": "([^"]+)"', mapping))

    def walk(node: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
        for name, inner in node.get("properties", {}).items():
            if inner.get("x-auto"):
                yield ".".join((*path, name))
            yield from walk(inner, (*path, name))

    assert set(walk(schema(), ())) == filled


def arguments(class_: Any) -> tuple[set[str], set[str]]:
    """The arguments after the first two: those without a default, and the others."""
    given = list(inspect.signature(class_.__init__).parameters.values())[2:]
    must = {one.name for one in given if one.default is inspect.Parameter.empty}
    return must, {one.name for one in given} - must


def test_params_in_the_schema_are_arguments_of_some_class() -> None:
    known = set.union(*(both[0] | both[1] for both in classes.DEEPSPEED_OPTIMIZERS.values()), classes.TORCH_ADAM)
    known |= {"momentum", "muon_lr", "adam_lr", "ns_method", "per_head_muon"}  # SGD's and Muon's
    assert set(properties(("optimizer", "params"))) <= known
    known = set.union(*(both[0] | both[1] for both in classes.DEEPSPEED_SCHEDULERS.values()))
    assert set(properties(("scheduler", "params"))) == known


def test_classes_take_the_arguments_that_we_say() -> None:
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
    from deepspeed.runtime import lr_schedules

    ours = {"torch_adam", "adam_w_mode", "adamw_mode", "fp32_optimizer_states", "max_grad_norm"}
    pairs = {"adam": (FusedAdam, DeepSpeedCPUAdam), "lamb": (FusedLamb, FusedLamb),
             "lion": (FusedLion, DeepSpeedCPULion), "adagrad": (torch.optim.Adagrad, DeepSpeedCPUAdagrad)}
    for name, pair in pairs.items():
        for class_, known in zip(pair, classes.DEEPSPEED_OPTIMIZERS[name], strict=True):
            assert set.union(*arguments(class_)) - ours == known - ours, class_
    for name, known in classes.TORCH_OPTIMIZERS.items():
        assert set.union(*arguments(getattr(torch.optim, name))) == known, name
    assert set.union(*arguments(torch.optim.AdamW)) <= classes.TORCH_ADAM
    known_names = {*classes.TORCH_OPTIMIZERS, "Adam", "AdamW", "Adagrad", "Muon", "Optimizer"}
    assert {name for name in vars(torch.optim) if name[0].isupper()} == known_names
    for name, both in classes.DEEPSPEED_SCHEDULERS.items():
        assert arguments(getattr(lr_schedules, name)) == both, name
    for name, both in classes.TORCH_SCHEDULERS.items():
        assert arguments(getattr(torch.optim.lr_scheduler, name)) == both, name
    assert set(ds.DEEPSPEED_OPTIMIZERS) == set(classes.DEEPSPEED_OPTIMIZERS) | classes.UNSORTED


@pytest.mark.parametrize("path", sorted((SCHEMA.parent.parent / "trainer").rglob("*.json")), ids=lambda path: path.name)
def test_our_own_configs_are_as_the_schema_says(path: Path) -> None:
    jsonschema.validate(json.loads(path.read_text()), schema(), jsonschema.Draft7Validator)
