"""What `invoke train` takes by the plan, what it warns of, and how runs correct later plans."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from master.inventory.hostfile import Slots
from master.plan import history, measuring
from master.plan.history import Outcome
from master.plan.launch_default import choose, wanted_of
from master.plan.measuring import Measured, is_sound, versions
from master.plan.rates import peak_rates
from master.plan.ways import Task
from trainer.estimate.shape import of_numbers

LLAMA = {"model_type": "llama", "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 4096}
MODELS = {"1b": {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "intermediate_size": 5632},
          "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}}


def host(name: str, gpus: list[tuple[str, int]], mbit: int) -> dict[str, Any]:
    rows = [{"index": number, "name": card, "memory_total_mib": mib, "compute_capability": "8.6"}
            for number, (card, mib) in enumerate(gpus)]
    card = {"name": "eth0", "mbit": mbit, "addresses": ["10.0.0.1/24"]}
    return {"name": name, "address": "10.0.0.1", "report": {"gpus": rows},
            "facts": {"ram_bytes": 128 << 30, "nics": [card]}}


def chosen(tmp_path: Path, model: str, hosts: list[dict[str, Any]], *flags: str, config: Path | None = None
           ) -> tuple[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | MODELS[model]))
    slots = [Slots(each["name"], count, tuple(range(count)), "NVIDIA") for each in hosts
             for count in [len(each["report"]["gpus"])]]
    found = choose(config, str(tmp_path), [], flags, slots, {"hosts": hosts, "pairs": []})
    return str(found.config.relative_to(ROOT)), found.found


CARD = ("NVIDIA GeForce RTX 3090", 24576)
BIG = ("NVIDIA A100-SXM4-80GB", 81920)


@pytest.mark.parametrize(("model", "hosts", "flags", "preset"), [
    ("1b", [("gpu1", [BIG], 1000)], [], "zero0.json"),
    ("1b", [("gpu1", [CARD], 1000)], [], "zero0.json"),
    ("1b", [("gpu1", [("NVIDIA GeForce RTX 3060", 12288)], 1000)], [], "zero2_offload.json"),
    ("1b", [("gpu1", [BIG], 1000), ("gpu2", [BIG], 1000)], [], "zero0.json"),  # which sends least
    ("7b", [("gpu1", [CARD] * 4, 1000)], ["--lora", "8"], "zero0.json"),
    ("7b", [("gpu1", [BIG], 10000), ("gpu2", [BIG], 10000)], ["--global_batch_size", "64"],
     "zero1_offload.json"),
    ("7b", [("gpu1", [CARD] * 2, 10000), ("gpu2", [CARD] * 2, 10000)], ["--lora"], "zero0.json"),
    ("7b", [("gpu1", [BIG] * 8, 10000)], [], "zero1.json")])
def test_the_config_follows_from_model_and_machines(model: str, hosts: list[Any], flags: list[str], preset: str,
                                                    tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, found = chosen(tmp_path, model, [host(*each) for each in hosts], *flags)
    assert name == f"trainer/configs/{preset}", capsys.readouterr().err
    assert found.fits
    said = capsys.readouterr().err
    assert said.startswith("plan: ") and preset in said and "tokens/s" in said


def test_a_network_that_takes_most_of_the_time_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen(tmp_path, "1b", [host("gpu1", [BIG], 1000), host("gpu2", [BIG], 1000)])
    assert "% of the time will be the network's (2." in capsys.readouterr().err


def test_a_config_that_was_given_wins_and_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = ROOT / "trainer" / "ds_config.json"
    name, _ = chosen(tmp_path, "7b", [host("gpu1", [CARD], 1000)], config=seed)
    assert name == "trainer/ds_config.json"
    assert "the plan says that this doesn't fit: " in capsys.readouterr().err
    name, _ = chosen(tmp_path, "1b", [host("gpu1", [BIG], 1000)], config=seed)
    assert name == "trainer/ds_config.json" and not capsys.readouterr().err


def test_flags_of_the_batch_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = chosen(tmp_path, "1b", [host("gpu1", [CARD], 1000)], "--per-device-train-batch-size", "1",
                      "--gradient_accumulation_steps=4", "--sequence_length", "512")
    assert (found.way.batch.micro, found.way.batch.accumulation, found.tokens) == (1, 4, 2048)
    wanted = wanted_of(["--qlora", "--learning_rate", "1e-4", "--sequence_length", "many"])
    assert wanted.sequence is None  # the trainer refuses it
    assert wanted_of(["--qlora", "--max_steps", "3"]).kind == "qlora"


def test_a_model_that_nobody_knows_gets_what_sends_little(tmp_path: Path) -> None:
    slots = [Slots("gpu1", 1, (0,), "NVIDIA")]
    cluster = {"hosts": [host("gpu1", [CARD], 1000)], "pairs": []}
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    for model in (str(tmp_path), str(tmp_path / "nowhere"), None):
        found = choose(None, model, [], [], slots, cluster)
        assert found.config.name == "zero1.json" and found.found is None
    found = choose(None, "tiny", [], [], [Slots("localhost", 2, (0, 1), "CPU")], {"hosts": [], "pairs": []})
    assert found.config.name == "cpu.json" and found.found and not found.found.known


def outcome(measured: float, predicted: float = 1000.0, source: str = "peak", **others: Any) -> Outcome:
    facts: dict[str, Any] = {"model": "m", "kind": "full", "device": "RTX 3090", "versions": versions(),
                             "machines": ["gpu1"], "device_flops": 2e13, "read_at": measured}
    return Outcome(source=source, predicted=predicted, measured=measured, **(facts | others))


def test_the_last_five_runs_correct_the_plan_within_limits(tmp_path: Path) -> None:
    rates = peak_rates(["RTX 3090"])
    runs = [outcome(value) for value in (9000.0, 700.0, 800.0, 900.0, 1100.0, 850.0)]
    assert history.corrected(rates, runs)["RTX 3090"].correction == 0.85
    assert history.corrected(rates, [outcome(9000.0)])["RTX 3090"].correction == 2.0
    assert history.corrected(rates, [outcome(10.0)])["RTX 3090"].correction == 0.5
    assert history.corrected(rates, [outcome(500.0, source="measured")])["RTX 3090"].correction == 1.0
    assert history.rates_of(runs)["RTX 3090"].flops.likely == 2e13


def test_only_sound_runs_of_the_same_model_and_versions_count(tmp_path: Path) -> None:
    texts = [json.dumps(asdict(outcome(900.0))), json.dumps(asdict(outcome(900.0, model="other"))),
             json.dumps(asdict(outcome(900.0, versions={"torch": "1"}))), "{", '{"a": 1}', "[]",
             json.dumps(asdict(outcome(900.0)) | {"predicted": "x"})]
    for number, text in enumerate(texts):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "plan.json").write_text(text)
    assert [each.measured for each in history.outcomes("m", tmp_path)] == [900.0]


def test_what_was_measured_gives_the_speed_of_its_devices() -> None:
    shape = of_numbers(1e9, 16, 2048, 32000)
    task = Task(shape, 1024, 64)
    one = Measured("gpu1", "m", "full", "RTX 3090", versions(), 2, 1024, 8, 1, False, 0, "", 8000.0, 1 << 30, 1.0)
    rate = measuring.rates_of(task, [one])["RTX 3090"]
    assert rate.source == "measured" and rate.flops.likely == pytest.approx(4000 * 6.4e9, rel=0.1)
    assert measuring.known({"measured": [asdict(one)]}, "m") == [one]
    assert measuring.known({"measured": [asdict(one) | {"versions": {}}]}, "m") == []


@pytest.mark.parametrize("line", ['{"tokens_per_second": 1e99}', "[1]", '{"tokens_per_second": "fast"}', "{}"])
def test_a_hostile_worker_measures_nothing(line: str) -> None:
    assert not is_sound(json.loads(line))


def test_measured_here_and_used(tmp_path: Path) -> None:
    """This machine's own steps, then the same model's speed by an earlier run."""
    tool = [sys.executable, str(ROOT / "master" / "plan_ds_config.py"), "--model", "tiny", "--sequence-length", "64"]
    done = subprocess.run([*tool, "--measure", "--json"], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["best"]["speed_source"] == "measured" and found["best"]["tokens_per_second"][1] > 100
    assert "tokens/s with micro batch 8" in done.stderr and not list(tmp_path.iterdir())
