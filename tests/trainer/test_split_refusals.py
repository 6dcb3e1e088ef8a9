"""--split_layers: what can't be is told in under a second, by flags, config.json and the number of ranks alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from trainer import check_inputs
from trainer.distributed.devices import host_memory
from trainer.errors import UserError
from trainer.split import allowed

LLAMA: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 6, "tie_word_embeddings": False}


def checked(folder: Path, config: dict[str, Any], ranks: int, *words: str) -> None:
    from trainer.options import parse_options

    (folder / "config.json").write_text(json.dumps(config))
    options = parse_options(["--model_name_or_path", str(folder), "--dataset_path", str(ROOT / "README.md"), *words])
    allowed.check(options, ranks, allowed.config_of(str(folder)))


@pytest.mark.parametrize(("words", "ranks", "more", "line"), [
    (["--split_layers", "--lora"], 1, {}, "needs two ranks or more"),
    (["--split_layers", "--lora"], 8, {}, "6 layers can't be split over 8 ranks"),
    (["--split_layers", "4,4", "--lora"], 2, {}, "2 ranks share 6 layers, each at least one, as in 3,3"),
    (["--split_layers", "[4,2]", "--lora"], 3, {}, "4,2: 3 ranks share 6 layers"),
    (["--split_layers", "--lora", "--gradient_accumulation_steps", "2"], 3, {},
     "2 micro batches can't keep 3 ranks busy"),
    (["--split_layers"], 2, {"tie_word_embeddings": True}, "the head of llama shares the embedding's weights"),
    (["--split_layers"], 2, {"model_type": "gemma2", "tie_word_embeddings": None}, "the head of gemma2 shares"),
    (["--split_layers"], 2, {"text_config": {"num_hidden_layers": 6}}, "only an adapter can be trained"),
    (["--split_layers", "--lora"], 2, {"output_router_logits": True}, "the router's loss of this model"),
    (["--split_layers", "4,2", "--lora", "--lora_targets", "layers.0.mlp.up_proj", "model.layers.3.mlp.up_proj"], 2, {},
     "rank 1 has layers 4 to 5 and nothing to train there"),
    (["--split_layers", "--lora", "--lora_targets", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj"], 2, {},
     "1 of the layers are named, and each of 2 ranks trains in some")])
def test_what_cannot_be_is_told_by_flags_and_configuration(words: list[str], ranks: int, more: dict[str, Any],
                                                           line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line) as told:
        checked(tmp_path, LLAMA | more, ranks, *words)
    assert told.value.exit_code == 2


@pytest.mark.parametrize("words", [["--split_layers", "4,2"], ["--split_layers", "4,2", "--lora", "--lora_targets",
                                                               "layers.0.mlp.up_proj", "layers.5.mlp.up_proj"]])
def test_what_can_be_passes(words: list[str], tmp_path: Path) -> None:
    checked(tmp_path, LLAMA, 2, *words)


def test_a_family_says_whether_it_is_tied_where_its_configuration_does_not(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "n_layer": 6}
    with pytest.raises(UserError, match="the head of gpt2 shares"):
        checked(tmp_path, gpt2, 2, "--split_layers")
    checked(tmp_path, gpt2, 2, "--split_layers", "--lora")


def test_the_launcher_tells_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    words = [sys.executable, str(ROOT / "master" / "launch_training.py"), "--model", "model", "--slots", "2",
             "--dataset", str(ROOT / "README.md"), "--lora", "--split-layers", "5,5"]
    started = time.monotonic()
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "2 ranks share 6 layers" in done.stderr, done.stderr
    assert time.monotonic() - started < 20  # a second on a machine that does nothing else
    assert not (tmp_path / "runs").exists()


def test_without_ranks_only_the_rest_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    words = ["--model_name_or_path", str(tmp_path), "--dataset_path", str(ROOT / "README.md"), "--lora",
             "--split_layers", "5,5"]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert check_inputs.main(words) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert check_inputs.main(words) == 2


def test_the_limit_of_a_control_group_is_a_hosts_memory(tmp_path: Path) -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    assert host_memory(str(groups), str(root)) == whole
    groups.write_text("5:memory:/a/b\n4:cpu,cpuacct:/\n0::/c/d\n")
    assert host_memory(str(groups), str(root)) == whole
    for path, text in (("memory/a/memory.limit_in_bytes", "3000000"), ("memory/a/b/memory.limit_in_bytes", str(2**62)),
                       ("c/d/memory.max", "max"), ("c/memory.max", "2000000")):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    assert host_memory(str(groups), str(root)) == 2_000_000
    groups.write_text("5:memory:/a/b\n")
    assert host_memory(str(groups), str(root)) == 3_000_000
