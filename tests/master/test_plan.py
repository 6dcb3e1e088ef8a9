"""`invoke plan`: what it says of machines and models, what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from master.plan import config_file, sweep
from master.plan.machines import Machine, Network, of_words, speed_of, subsets
from master.plan.ranking import beats, rank
from master.plan.rates import measured_rate, peak_rates
from master.plan.ways import FULL, LORA, Estimate, Task, all_estimates
from trainer.estimate.shape import of_numbers
from trainer.estimate.traffic import goodput

TOOL = ROOT / "master" / "plan_ds_config.py"
ONE_B = ["--parameters", "1.1e9", "--layers", "22", "--hidden", "2048"]
PAIR = "1xRTX 3090:24GiB/64GiB,1xRTX 3090:24GiB/64GiB"
TASK = Task(of_numbers(1.1e9, 22, 2048, 32000), 1024, 64)


def plan(*words: Any, cwd: Path | None = None, variables: dict[str, str] | None = None
         ) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, words)], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, **(variables or {})})


def plan_json(*words: Any, cwd: Path | None = None) -> dict[str, Any]:
    done = plan(*words, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# Models as they were published, and machines from one small card to four servers: what to do there, and why.
CASES = json.loads((Path(__file__).parent / "data" / "plan_cases.json").read_text())


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: f"{case['model']} on {case['gpus']}")
def test_the_choice_and_its_reasons(case: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CASES["models"][case["model"]]))
    found = plan_json("--model", tmp_path, "--gpus", case["gpus"],
                      *(["--network", case["network"]] if case["network"] else []))
    assert found["sentences"] == case["sentences"]
    assert found["certain"] is case["certain"]


def test_it_needs_neither_torch_nor_a_second() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", TOOL, *ONE_B, "--gpus", PAIR], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "best: full training on host1 alone" in done.stdout
    assert not {"torch", "transformers", "deepspeed", "paramiko"} & {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_the_readme_shows_what_is_printed() -> None:
    typed, _, shown, *_ = (ROOT / "README.md").read_text().split("## Know before you start")[1].split("```\n")
    command = typed.splitlines()[-1]
    assert command.startswith("invoke plan --parameters ")
    assert shown.rstrip() in plan(*shlex.split(command)[2:]).stdout


def test_a_second_machine_over_a_slow_link_hurts_and_more_accumulation_helps() -> None:
    done = plan(*ONE_B, "--gpus", PAIR, "--network", "1Gbit")
    lines = done.stdout.splitlines()
    alone, both = lines[lines.index("will another machine help?") + 1 :][:2]
    assert alone.startswith("  host1 alone: ") and both.startswith("  host1 + host2 over a link of 118 MB/s")
    rates = [int(word.replace(",", "")) for word in both.replace("(", " ").split() if word.replace(",", "").isdigit()
             and len(word) > 3]
    first = int(alone.split("alone: ")[1].split(" ")[0].replace(",", ""))
    assert rates[0] < first < rates[1]  # with the same global batch, and with eight times as much accumulation


@pytest.mark.parametrize(("words", "said"), [
    ([], "which model?"), (["--model", "tiny", "--parameters", "1e9"], "two ways to say which model"),
    (["--model", "./nowhere"], "no config.json there"), ([*ONE_B, "--gpus", "0x24GiB"], "--gpus 0x24GiB: like"),
    ([*ONE_B, "--gpus", "4x24"], "'24' is no size: like 24GiB"), ([*ONE_B, "--gpus", ","], "name one host at least"),
    ([*ONE_B, "--gpus", "24GiB", "--network", "fast"], "--network fast: like 1Gbit"),
    ([*ONE_B, "--gpus", "24GiB", "--hostfile", "h"], "leave out --hostfile"),
    ([*ONE_B, "--gpus", "24GiB", "--full", "--lora"], "two ways to train"),
    ([*ONE_B, "--gpus", "24GiB", "--nodes-sweep", "8"], "--nodes-sweep 8: like 1..64"),
    ([*ONE_B, "--gpus", "24GiB", "--measure"], "--measure"),
    (["--model", "tiny", "--sequence-length", "9000", "--gpus", "24GiB"], "takes 2 to 2,048 tokens"),
    ([*ONE_B, "--gpus", "24GiB", "--global-batch", "0"], "at least 1")])
def test_mistakes_are_told_in_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    done = plan(*words, cwd=tmp_path)
    assert done.returncode in (1, 2) and not done.stdout
    assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_hub_that_is_not_there_is_told_at_once_and_its_cache_is_used(tmp_path: Path) -> None:
    away = {"HF_HUB_OFFLINE": "", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = plan("--model", "some/model", "--gpus", "24GiB", variables=away)
    assert done.returncode == 1 and "127.0.0.1 can't be reached (Connection refused): name a folder" in done.stderr
    snapshot = tmp_path / "hf" / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CASES["models"]["0.5b"]))
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    done = plan("--model", "some/model", "--gpus", "1xRTX 3090:24GiB", variables=away)
    assert done.returncode == 0 and done.stdout.startswith("some/model: 494M parameters, 24 layers of 896"), done.stderr


def test_nothing_fits_is_an_answer_and_nothing_to_write_a_fault(tmp_path: Path) -> None:
    words = ["--parameters", "70e9", "--layers", "80", "--hidden", "8192", "--gpus", "1x8GiB/16GiB"]
    done = plan(*words, cwd=tmp_path)
    assert done.returncode == 0 and "nothing fits: the nearest is " in done.stdout
    assert "too large by " in done.stdout
    done = plan(*words, "--write", "ds_config.json", cwd=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "ds_config.json").exists()


@pytest.mark.parametrize("gpus", ["1xRTX 4090:24GiB/64GiB", "4xRTX 3090:24GiB/256GiB", "1xRTX 3060:12GiB/64GiB"])
def test_what_is_written_passes_validate_and_train_takes_it(gpus: str, tmp_path: Path) -> None:
    words = ["--parameters", "3e9", "--layers", "36", "--hidden", "2048", "--vocab", "151936", "--gpus", gpus]
    assert plan(*words, "--write", "ds_config.json", cwd=tmp_path).returncode == 0
    checked = subprocess.run([sys.executable, ROOT / "master" / "validate_ds_config.py", "ds_config.json"],
                             cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    from trainer.distributed.deepspeed_config import adopt_values, read_config
    from trainer.options import parse_options

    config = read_config(tmp_path / "ds_config.json")
    options = adopt_values(parse_options(["--model_name_or_path", "tiny"]), config, 4)
    assert options.per_device_train_batch_size == config["train_micro_batch_size_per_gpu"]
    assert options.gradient_accumulation_steps == config["gradient_accumulation_steps"]


def test_every_way_has_a_config_and_every_preset_is_one_of_them() -> None:
    machines, network = of_words("2xRTX 3090:24GiB/64GiB,2xRTX 3090:24GiB/64GiB", None)
    task = replace(TASK, nvme="/fast")
    seen = {}
    for found in all_estimates(task, [tuple(machines)], network, {}):
        zero = config_file.ds_config(found.way, "/fast")["zero_optimization"]
        seen[found.way.stage, found.way.offload] = zero
    assert seen[3, "nvme"]["offload_param"] == {"device": "nvme", "nvme_path": "/fast"}
    assert all(zero["reduce_bucket_size"] == 50_000_000 for (stage, _), zero in seen.items() if stage)
    assert "offload_optimizer" not in seen[1, ""] and seen[2, "optimizer"]["offload_optimizer"] == {"device": "cpu"}
    from master.plan.presets import PRESETS, way_of

    for way, path in PRESETS.items():
        assert way in seen and way_of(ROOT / path) == way
        zero = json.loads((ROOT / path).read_text())["zero_optimization"]
        assert zero.get("reduce_bucket_size", 50_000_000) == 50_000_000


def of(machines: tuple[Machine, ...], network: Network, rates: Any, kind: str = FULL) -> Estimate:
    return next(each for each in all_estimates(replace(TASK, kinds=(kind,)), [machines], network, rates) if each.fits)


def test_no_winner_is_named_where_what_is_unknown_decides() -> None:
    machines, network = of_words("1xRTX 3090:24GiB/64GiB,1xRTX 3090:24GiB/64GiB", speed_of("2Gbit"))
    rates = peak_rates(["RTX 3090"])
    alone, both = of((machines[0],), network, rates), of(tuple(machines), network, rates)
    assert alone.rate("low", "high") > both.rate("low", "high") and alone.rate("high", "low") < both.rate("high", "low")
    assert not beats(alone, both) and not beats(both, alone)
    ranking = rank(replace(TASK, kinds=(FULL,)), subsets(machines, 9), network, rates)
    assert ranking.rivals
    measured = {"RTX 3090": measured_rate(25e12, 0.1, "measured")}
    known = Network({("host1", "host2"): 2.5e9, ("host2", "host1"): 2.5e9}, {})
    assert beats(of(tuple(machines), known, measured), of((machines[0],), known, measured))


def test_the_slowest_link_and_the_smallest_card_decide() -> None:
    machines, _ = of_words("1xRTX 3090:24GiB,1xRTX 3090:12GiB,1xRTX 4090:24GiB", None)
    pairs = {("host1", "host2"): 1e9, ("host2", "host1"): 9e8, ("host3", "host1"): 1e8, ("host1", "host3"): 1e8}
    network = Network(pairs, {("host1", "host3"): 0.01})
    assert network.between(machines)[0::2] == (1e8, "host1")
    assert network.between(machines[:2])[0::2] == (9e8, "host2")
    assert network.latency(machines) == 0.01 and network.latency(machines[:2]) < 0.001
    rates = peak_rates(["RTX 3090", "RTX 4090"])
    found = of(tuple(machines), network, rates, LORA)
    assert found.device_name == "RTX 3090"
    assert sum(found.device.values()) < 12 * 2**30
    assert replace(machines[2], rate=1e7) and Network({}, {}).between([replace(machines[2], rate=1e7)])[0] == 1e7


def test_a_gigabit_carries_what_frames_leave() -> None:
    assert goodput(1e9) == pytest.approx(117.7e6, rel=0.001)
    assert speed_of("2.5Gbit/s") == pytest.approx(2.5 * goodput(1e9)) and speed_of("100Mbit") == goodput(1e8)


def test_alike_machines_are_tried_once_and_many_kinds_not_all() -> None:
    machines, _ = of_words("2x24GiB,2x24GiB,1x12GiB", None)
    names = [[machine.name for machine in chosen] for chosen in subsets(machines, 256)]
    assert names == [["host1", "host2", "host3"], ["host1", "host2"], ["host1", "host3"], ["host1"], ["host3"]]
    assert [len(chosen) for chosen in subsets(machines, 3)] == [3, 2, 1]


def test_a_slow_host_and_a_slow_link_are_left_out(tmp_path: Path) -> None:
    """Three cards of one name: one of them throttled, one behind a slow port; the two others are faster alone."""
    machines, _ = of_words("1xRTX 3090:24GiB,1xRTX 3090:24GiB,1xRTX 3090:24GiB,1xRTX 3090:24GiB", None)
    names = [machine.name for machine in machines]
    pairs = {(one, other): 1e7 if "host4" in (one, other) else 2e9 for one in names for other in names if one != other}
    rates = {"RTX 3090": measured_rate(2e13, 0.1, "measured"),
             "RTX 3090 on host3": measured_rate(2e12, 0.1, "measured")}
    network = Network(pairs, {})

    def speed(machine: Machine) -> Any:
        found = rates.get(f"RTX 3090 on {machine.name}", rates["RTX 3090"])
        return found.flops.likely, network.own_rate(machine, machines)

    ranking = rank(replace(TASK, kinds=(FULL,)), subsets(machines, 64, speed), network, rates)
    assert ranking.best and [machine.name for machine in ranking.best.way.machines] == ["host1", "host2"]


def test_the_sweep_draws_each_link(tmp_path: Path) -> None:
    assert sweep.counts_of("1..1024") == [2**n for n in range(11)] and sweep.counts_of("3..20") == [3, 6, 12, 20]
    done = plan(*ONE_B, "--gpus", "1xRTX 4090:24GiB/64GiB", "--nodes-sweep", "1..16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "nodes-sweep.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "4", "8", "16"]
    last = [int(word.replace(",", "")) for word in rows[-1][1::2]]
    assert last == sorted(last) and last[0] < last[-1]  # a faster link never hurts
    done = plan(*ONE_B, "--gpus", "1xRTX 4090:24GiB/64GiB", "--nodes-sweep", "1..2", "--json", cwd=tmp_path)
    assert all(0 < point["efficiency"] <= 1.0001 for point in json.loads(done.stdout))


def test_a_hostfile_s_machines_are_planned_for(tmp_path: Path) -> None:
    def host(name: str, memory: int) -> dict[str, Any]:
        gpu = {"index": 0, "name": "NVIDIA GeForce RTX 3090", "memory_total_mib": memory, "compute_capability": "8.6"}
        card = {"name": "eth0", "mbit": 2500, "addresses": ["10.0.0.1/24"]}
        return {"name": name, "reached": None, "address": "10.0.0.1", "host_key": None, "macs": [], "dir": None,
                "python": None, "read_at": 1.0, "report": {"gpus": [gpu]},
                "facts": {"ram_bytes": 64 << 30, "nics": [card]}}

    pairs = [{"from": "gpu1", "to": "gpu2", "bandwidth_bytes_per_s": 5e7, "latency_s": 0.001, "read_at": 1.0}]
    (tmp_path / "hostfile.txt").write_text("gpu1 slots=1 type=NVIDIA\ngpu2 slots=1 type=NVIDIA\n")
    (tmp_path / "cluster.json").write_text(json.dumps(
        {"schema": "cluster/1", "hosts": [host("gpu1", 24576), host("gpu2", 12288)], "pairs": pairs}))
    found = plan_json(*ONE_B, cwd=tmp_path)
    both = next(way for way in found["ways"] if way["machines"] == ["gpu1", "gpu2"] and way["fits"])
    assert both["communication_s"][1] * 5e7 == pytest.approx(both["sent_bytes_per_step"], rel=0.1)
    assert max(sum(way["device_bytes"].values()) for way in found["ways"]
               if way["fits"] and "gpu2" in way["machines"]) <= 0.9 * 12 * 2**30
    report = {"slots_use": [0], "vendor": "NVIDIA"}
    hosts = [host("gpu1", 24576), host("gpu2", 12288)]
    for each in hosts:
        each["report"] |= report
    (tmp_path / "other.json").write_text(json.dumps({"schema": "cluster/1", "hosts": hosts, "pairs": pairs}))
    alone = plan_json(*ONE_B, "--cluster", "other.json", cwd=tmp_path)
    assert alone["sentences"] == found["sentences"]
    refused = plan(*ONE_B, "--cluster", "cluster.json", cwd=tmp_path)
    assert refused.returncode == 2 and "no host there has a usable GPU" in refused.stderr
    done = plan(*ONE_B, "--include", "gpu1", cwd=tmp_path)
    assert "will another machine help?" not in done.stdout and "gpu1 alone" in done.stdout
