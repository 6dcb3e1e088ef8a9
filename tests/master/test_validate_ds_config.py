"""`validate_ds_config.py`: what it prints, what it exits with, and what --fix writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from terminal import type_into

from master.ds_config.checker import check
from master.ds_config.fixes import apply_fixes
from master.ds_config.json_text import Document
from master.ds_config.problem import Target

TOOL = ROOT / "master" / "validate_ds_config.py"
OLD = """{
  "train_batch_size": "8",  // eight
  "fp16": { "enabled": true, "opt_level": "O2" },
  "zero_optimization": {
      "stage":            2,
      "cpu_offload":      true,
      "reduce_bucket_size": "500000000",
  },
  "amp": {"enabled": false},
  "optimizer": {"type": "adamw_torch"},
  "steps_per_print": 10,
  "steps_per_print": 10
}
"""
FIXED = """{
  "train_batch_size": 8,
  "fp16": { "enabled": true },
  "zero_optimization": {
      "stage":            2,
      "offload_optimizer":      {"device": "cpu"},
      "reduce_bucket_size": 500000000
  },
  "optimizer": {"type": "AdamW"},
  "steps_per_print": 10
}
"""


def validate(*words: Any, text: str | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, words)], input=text, capture_output=True, text=True, cwd=cwd)


def test_a_finding_is_a_line_with_place_and_mend(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(OLD)
    done = validate("old.json", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[1] == (
        'old.json:2: error $.train_batch_size: expected an integer, got "8". Write the number without quotes [parse]')
    assert [line.split(":")[1] for line in done.stdout.splitlines()[:-1]] == ["1", "2", "2", "3", "6", "7", "9", "10",
                                                                              "12"]
    assert done.stdout.splitlines()[-1] == "1 file: 6 errors, 0 warnings, 3 info"
    assert done.stderr == "--fix fixes some of it: invoke validate --fix old.json\n"


def test_good_files_are_ok_and_every_file_is_looked_at(tmp_path: Path) -> None:
    done = validate(*sorted((ROOT / "trainer" / "configs").glob("*.json")), ROOT / "trainer" / "ds_config.json")
    assert done.returncode == 0 and done.stdout.count(": ok\n") == 9 and not done.stderr
    (tmp_path / "bad.json").write_bytes(b'{"a":\n"\xff"}')
    (tmp_path / "list.json").write_text("[1]")
    done = validate("nowhere.json", "bad.json", "list.json", ROOT / "trainer" / "ds_config.json", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[:3] == [
        "nowhere.json:1: error $: No such file or directory. Name a file that is there [parse]",
        "bad.json:2: error $: not UTF-8. Save it as UTF-8 [parse]",
        "list.json:1: error $: a config is an object {...}, not [1]. Write an object [parse]"]


def test_json_is_for_programs(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(OLD)
    done = validate("--json", "old.json", cwd=tmp_path)
    (entry,) = json.loads(done.stdout)
    assert done.returncode == 1 and entry["file"] == "old.json" and not done.stderr
    first = next(problem for problem in entry["problems"] if problem["path"] == "$.fp16.opt_level")
    assert first == {"level": "error", "code": "unknown-key", "path": "$.fp16.opt_level", "line": 3, "column": 30,
                     "message": "no such key in fp16: it is refused", "fix": "take it out", "phase": "parse",
                     "fixable": True}


def test_standard_input_and_exit_codes() -> None:
    warns = '{"train_batch_size": 1, "nope": 1}'
    assert validate(text=warns).returncode == 0
    assert "stdin:1: warning $.nope: no such key at the top level" in validate("-", text=warns).stdout
    assert validate("--strict", text=warns).returncode == 1
    assert validate("--plain-deepspeed", text='{"train_batch_size": "auto"}').returncode == 1
    assert validate("--trainer", text='{"train_batch_size": 1}').returncode == 1
    assert validate("--plain-deepspeed", text='{"train_batch_size": 1,}').returncode == 0  # Hjson takes the comma
    assert validate(text="").stdout.startswith("stdin:1: error $: not JSON: the file is empty")
    for words in (["--world-size", "0"], ["--trainer", "--plain-deepspeed"], ["--fix"], ["--fix", "--yes", "-"]):
        assert validate(*words, text=warns).returncode == 2


def test_a_hostile_config_does_nothing_to_the_terminal(tmp_path: Path) -> None:
    done = validate(text=json.dumps({"train_batch_size": 1, "\x1b[2J\n": "\x1b]0;x\x07", "fp16": "\x1b[31m"}))
    assert "\x1b" not in done.stdout and done.stdout.count("\n") == 5
    assert validate(text="[" * 100_000).stdout.startswith("stdin:1: error $: not JSON: nested deeper than 64")
    assert validate(text='{"a":' * 60 + "1" + "}" * 60).returncode == 1


def cluster(*hosts: tuple[str, str, int]) -> dict[str, Any]:
    def report(gpus: int, capability: str) -> dict[str, Any]:
        return {"schema": "gpu-report/1", "detector": "detect_gpus.sh", "hostname": "x", "vendor": "NVIDIA",
                "status": "ok", "slots_total": gpus, "slots_use": list(range(gpus)), "driver_version": "560.35.03",
                "problems": [], "gpus": [
                    {"index": number, "name": "A card", "uuid": f"GPU-{number}", "memory_total_mib": 24576,
                     "memory_free_mib": 24000, "compute_capability": capability, "arch": None, "mig": False,
                     "integrated": False, "usable": True, "busy_mib": 0} for number in range(gpus)]}

    return {"schema": "cluster/1", "pairs": [], "hosts": [
        {"name": name, "reached": None, "address": None, "host_key": None, "macs": [], "facts": {}, "dir": None,
         "report": report(gpus, capability), "python": None, "read_at": 0} for name, capability, gpus in hosts]}


def test_hosts_give_ranks_and_gpus(tmp_path: Path) -> None:
    (tmp_path / "hostfile.txt").write_text("gpu1 slots=2 type=NVIDIA\ngpu2 slots=1 type=NVIDIA\n")
    (tmp_path / "cluster.json").write_text(json.dumps(cluster(("gpu1", "8.6", 2), ("gpu2", "7.5", 1), ("x", "5.0", 8))))
    text = '{"train_batch_size": 8, "bf16": {"enabled": true}}'
    by_hostfile = validate("--hostfile", tmp_path / "hostfile.txt", text=text)
    assert "a batch of 8 can't be shared by 3 ranks" in by_hostfile.stdout
    assert "no bf16 units on gpu2 (A card): it" in by_hostfile.stdout
    by_cluster = validate("--cluster", tmp_path / "cluster.json", text=text)
    assert "by 11 ranks" in by_cluster.stdout and "gpu2 (A card), x (A card)" in by_cluster.stdout
    assert validate("--world-size", "4", text=text).returncode == 0
    (tmp_path / "hostfile.txt").write_text("gpu2 slots=1 type=NVIDIA\n")
    assert "by 11 ranks" not in validate("--hostfile", tmp_path / "hostfile.txt", text=text).stdout
    good = cluster(("gpu1", "8.6", 2))
    for report in ({"slots_use": 3}, {**good["hosts"][0]["report"], "gpus": ["x"]}, {"gpus": None}):
        bad = {**good, "hosts": [{**good["hosts"][0], "report": report}]}
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        done = validate("--cluster", tmp_path / "bad.json", text=text)
        assert done.returncode == 1 and "delete it; it will be written again" in done.stderr and not done.stdout
    (tmp_path / "bad.json").write_text("[" * 100_000)
    assert "delete it" in validate("--cluster", tmp_path / "bad.json", text=text).stderr
    for words in (["--hostfile", tmp_path / "no"], ["--cluster", tmp_path / "no"]):
        done = validate(*words, text=text)
        assert done.returncode == 1 and str(tmp_path / "no") in done.stderr and not done.stdout


def test_fix_mends_what_has_one_mend(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(OLD)
    done = validate("--fix", "--yes", path)
    assert path.read_text() == FIXED
    assert '-  "amp": {"enabled": false},' in done.stderr and "8 fixed" in done.stderr
    assert done.returncode == 0 and "0 errors" in done.stdout
    again = validate("--fix", "--yes", path)
    assert path.read_text() == FIXED and not again.stderr


@pytest.mark.parametrize(("answer", "written"), [("y", True), ("n", False), ("", False)])
def test_fix_asks_first(answer: str, written: bool, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(OLD)
    code, screen = type_into([sys.executable, str(TOOL), "--fix", str(path)], {"[y/N] ": answer})
    assert path.read_text() == (FIXED if written else OLD)
    assert code == (0 if written else 1) and ("fixed" in screen if written else "left as it was" in screen)


def test_fix_takes_care_of_the_file(tmp_path: Path) -> None:
    path, link = tmp_path / "old.json", tmp_path / "link.json"
    path.write_text(OLD)
    path.chmod(0o600)
    link.symlink_to(path)
    assert validate("--fix", "--yes", link).returncode == 0
    assert path.read_text() == FIXED and path.stat().st_mode & 0o777 == 0o600 and link.is_symlink()
    path.write_text(OLD)
    path.chmod(0o400)
    done = validate("--fix", "--yes", path)
    assert path.read_text() == OLD and "is read-only: chmod u+w" in done.stderr


def test_what_the_system_does_is_no_traceback(tmp_path: Path) -> None:
    text = '{"train_batch_size": 1}'
    (tmp_path / "a.json").write_text(text)
    for words, code in (("<&-", 2), (f"{tmp_path}/a.json > /dev/full", 1), (f"--json {tmp_path}/a.json | true", 0),
                        (f"{tmp_path}", 1)):
        command = f"{sys.executable} {TOOL} {words}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
        assert "Traceback" not in done.stderr and done.returncode == code, (command, done)
    done = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True)
    assert done.stdout.splitlines()[0].endswith(": error $: Is a directory. Name a file that can be read [parse]")


@pytest.mark.parametrize("text", [
    '{"train_batch_size": 1, "amp": {"enabled": true}}',  # switching it off is not what was meant
    '{"train_batch_size": 1, "a": word\n}',  # a text or a slip, nobody knows
    '{"train_batch_size": 1, "steps_per_print": 1, "steps_per_print": 2}',
    '{"train_batch_size": 1, "zero_optimization": {"stage": "9"}}',
    '{"train_batch_size": 1, "gradient_acumulation_steps": "x"}',
    '{"train_batch_size": 1, "aio": {"thread_count": 1, "intra_op_parallelism": 2}}',
    '{"train_batch_size": 1, "zero_optimization": true, "allgather_size": 7}',
])
def test_what_has_no_sure_mend_is_left(text: str) -> None:
    assert apply_fixes(text, Target()) == (text, [])


def test_a_mend_that_brings_up_something_else_is_not_made() -> None:
    text = '{"train_batch_size": 1, "zero_optimization": {"stage": 1, "stage3_max_reuse_distnce": 1}}'
    assert [problem.fix for problem in check(Document(text), Target()) if problem.fix]
    assert apply_fixes(text, Target())[0] == text  # spelt right, it would be a setting without effect


def test_what_is_loaded_is_light(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", TOOL, ROOT / "trainer" / "ds_config.json"],
                          capture_output=True, text=True)
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "jsonschema" in loaded and not loaded & {"torch", "deepspeed", "transformers", "hjson", "pydantic", "numpy",
                                                    "rich", "paramiko"}
