"""A GPU report is found in any noise, checked against its schema, and refused with the place of its first fault."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest

from master.inventory.gpu_report import (
    NOTICES,
    SCHEMA,
    GpuReport,
    Problem,
    ReportError,
    check_report,
    new_nonce,
    parse_report,
)

GPU = {"index": 0, "name": "NVIDIA GeForce RTX 3090", "uuid": "GPU-1", "memory_total_mib": 24576,
       "memory_free_mib": 24260, "compute_capability": "8.6", "arch": None, "mig": False, "integrated": False,
       "usable": True, "busy_mib": 0}
REPORT = {"schema": "gpu-report/1", "detector": "detect_gpus.sh", "hostname": "gpu1", "vendor": "NVIDIA",
          "status": "ok", "slots_total": 1, "slots_use": [0], "driver_version": "560.35.03", "gpus": [GPU],
          "problems": []}


def line(nonce: str = "n1", **changes: Any) -> str:
    return f"@@GPU_REPORT {nonce} " + json.dumps({**REPORT, **changes})


NOISE = "Welcome!\nstty: 'standard input': Inappropriate ioctl for device\n{[\"@@GPU_REPORT\n"


@pytest.mark.parametrize("text", [
    line(),
    NOISE + "quota 90%" + "\n" + line() + "\nGood bye {}\n",
    "no newline before" + line() + "garbage right behind",
    "\x1b[0m\x1b]0;title\x07\r\n" + line().replace('", "', '"\x1b[0m, \x1b[1;31m"') + "\x1b[0m\r\n",
    line(hostname="an older one") + "\n" + line(),
    line() + "\n" + line("other", hostname="of another session"),
    line() + "\n" + line(hostname="cut short")[:80],
    "@" * 150_000 + line() + '{"' * 75_000,
])
def test_a_report_is_found_in_noise(text: str) -> None:
    started = time.process_time()
    report = parse_report(text, "n1")
    assert report.hostname == "gpu1"
    assert report.usable[0].name == "NVIDIA GeForce RTX 3090"
    assert time.process_time() - started < 10  # of computing


@pytest.mark.parametrize(("text", "message"), [
    ("", "no GPU report among 0 characters"),
    (NOISE, "no GPU report among"),
    (line("n2"), "no GPU report among"),
    (line()[:-10], "cut short or garbled"),
    ("@@GPU_REPORT n1 " + "[" * 100_000, "cut short or garbled"),
    ("@@GPU_REPORT n1 {" * 20_000, "cut short or garbled"),
    ("@@GPU_REPORT n1 []", r"\$: \[\] is not of type 'object'"),
])
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(ReportError, match=message):
        parse_report(text, "n1")
    assert time.process_time() - started < 10  # of computing


@pytest.mark.parametrize(("changes", "message"), [
    ({"schema": "gpu-report/2"}, r"\$\.schema: "),
    ({"extra": 1}, r"\$: .*'extra'"),
    ({"vendor": "nvidia"}, r"\$\.vendor: 'nvidia'"),
    ({"slots_total": -1, "slots_use": [], "gpus": []}, r"\$\.slots_total: -1"),
    ({"slots_total": True}, r"\$\.slots_total: True"),
    ({"gpus": [{**GPU, "memory_total_mib": 0}]}, r"\$\.gpus\[0\]\.memory_total_mib: 0"),
    ({"gpus": [{**GPU, "name": ""}]}, r"\$\.gpus\[0\]\.name"),
    ({"gpus": [{key: value for key, value in GPU.items() if key != "mig"}]}, r"\$\.gpus\[0\]: 'mig' is a required"),
    ({"problems": [{"code": "SOMETHING", "message": "x"}]}, r"\$\.problems\[0\]\.code: 'SOMETHING'"),
    ({"status": "error", "slots_use": [], "gpus": [{**GPU, "usable": False}]}, r"\$\.problems: \[\]"),
    ({"status": "none"}, r"\$\."),
    ({"vendor": "NONE"}, r"\$\."),
    ({"slots_total": 2}, r"\$\.gpus: slots 0 to 1 are announced"),
    ({"gpus": [{**GPU, "name": "3090\ngpu9 slots=8"}]}, r"\$\.gpus\[0\]\.name: unprintable .*3090.ngpu9"),
    ({"hostname": "\x1b]0;owned\x07"}, r"\$\.hostname: unprintable"),
    ({"gpus": [{**GPU, "usable": False}]}, r"\$\.slots_use: \[0\] isn't what the usable GPUs have"),
])
def test_a_wrong_report_is_refused_with_its_first_fault(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        parse_report(line(**changes), "n1")


def test_a_report_goes_there_and_back() -> None:
    report = check_report(REPORT)
    assert isinstance(report, GpuReport)
    assert report.to_json() == REPORT
    told = check_report({**REPORT, "hand_over": "not sure"})
    assert told.hand_over == "not sure" and told.to_json()["hand_over"] == "not sure"


def test_the_schema_is_one_and_describes_every_property() -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)

    def walk(node: Any, name: str) -> None:
        for key, part in node.get("properties", {}).items():
            assert part.get("description") or "$ref" in part, f"{name}.{key}"
            walk(part, f"{name}.{key}")
        if "properties" in node:
            assert node["additionalProperties"] is False and node["required"]

    walk({key: value for key, value in schema.items() if key != "allOf"}, "$")
    for name, part in schema["$defs"].items():
        if name == "problem":
            part["properties"]["code"]["description"] = "its parts are described"
        walk(part, name)


def test_notices_are_those_of_the_schema() -> None:
    kinds = json.loads(SCHEMA.read_text())["$defs"]["problem"]["properties"]["code"]["anyOf"]
    assert set(kinds[1]["enum"]) == NOTICES
    assert not any(Problem(code, "x").is_fault for code in [*NOTICES, "CUDA_VISIBLE_DEVICES_SET"])
    assert all(Problem(code, "x").is_fault for code in kinds[0]["enum"])


def test_nonces_differ() -> None:
    assert len({new_nonce() for _ in range(100)}) == 100
