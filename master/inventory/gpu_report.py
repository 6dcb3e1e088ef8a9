"""A worker's GPU report: found in whatever its session printed, checked, and handed on as data.

The report is one line, `@@GPU_REPORT NONCE {...}`, as schemas/gpu_report.schema.json describes it; login banners,
terminal codes and other rubbish may surround it. `invoke detect` shows this machine's.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, fields
from typing import Any

from master.core.json_schema import first_error
from master.core.paths import SCHEMAS
from master.core.run_cli import UserError

SCHEMA = SCHEMAS / "gpu_report.schema.json"
TERMINAL_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])|\r")
# The codes that a healthy machine may have, as the schema tells them from faults.
NOTICES = {"MIG_ENABLED", "PARTITIONED", "IGPU_PRESENT", "IGPU_ONLY", "MIXED_MODELS", "MIXED_VENDORS", "GPU_BUSY",
           "AMD_GROUPS"}
LATEST = 20  # reports that are tried, from the last one: enough for any honest session


class ReportError(UserError):
    """There is no report, or it isn't what the schema says; the message begins with the place of the first fault."""


@dataclass(frozen=True)
class Gpu:
    """One GPU; None is unknown. `index` is its slot, None if the runtime doesn't enumerate it."""

    index: int | None
    name: str | None
    uuid: str | None
    memory_total_mib: int | None
    memory_free_mib: int | None
    compute_capability: str | None
    arch: str | None
    mig: bool
    integrated: bool
    usable: bool
    busy_mib: int | None


@dataclass(frozen=True)
class Problem:
    """A fault or a notice, and how to fix it."""

    code: str
    message: str

    @property
    def is_fault(self) -> bool:
        """False for what is only worth knowing."""
        return self.code not in NOTICES and not self.code.endswith("_SET")


@dataclass(frozen=True)
class GpuReport:
    """What one machine says of its GPUs. `hand_over`: why detect_gpus.py should be asked too, None if it needn't."""

    detector: str
    hostname: str
    vendor: str
    status: str
    slots_total: int
    slots_use: tuple[int, ...]
    driver_version: str | None
    gpus: tuple[Gpu, ...]
    problems: tuple[Problem, ...]
    hand_over: str | None = None

    @property
    def usable(self) -> tuple[Gpu, ...]:
        """The GPUs to train on, in the order of `slots_use`."""
        return tuple(gpu for gpu in self.gpus if gpu.usable)

    def to_json(self) -> dict[str, Any]:
        """Return the report as the detectors print it."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        own |= {"slots_use": list(self.slots_use), "gpus": [vars(gpu) for gpu in self.gpus],
                "problems": [vars(problem) for problem in self.problems]}
        return {"schema": "gpu-report/1", **{key: value for key, value in own.items()
                                             if key != "hand_over" or value is not None}}


def new_nonce() -> str:
    """Return a word that no banner and no earlier report has in it."""
    return secrets.token_hex(8)


def parse_report(text: str, nonce: str) -> GpuReport:
    """Return the last complete report with this nonce in what a session printed; raise ReportError if none is right."""
    text = TERMINAL_CODE.sub("", text)
    mark = f"@@GPU_REPORT {nonce} "
    places = [found.end() for found in re.finditer(re.escape(mark), text)]
    if not places:
        raise ReportError(f"no GPU report among {len(text)} characters of output")
    for place in reversed(places[-LATEST:]):
        try:
            raw, _ = json.JSONDecoder().raw_decode(text, place)
        except (ValueError, RecursionError):
            continue
        return check_report(raw)
    raise ReportError(f"the GPU report is cut short or garbled after {len(text) - places[-1]} characters")


def check_report(raw: Any) -> GpuReport:
    """Return a decoded report as data; raise ReportError with the path of the first fault."""
    if error := first_error(SCHEMA, raw):
        raise ReportError(error)
    check_slots(raw)
    check_texts(raw)
    whole = {key: value for key, value in raw.items() if key != "schema"}
    whole.update(slots_total=int(raw["slots_total"]), slots_use=tuple(map(int, raw["slots_use"])),
                 gpus=tuple(Gpu(**gpu) for gpu in raw["gpus"]),
                 problems=tuple(Problem(**problem) for problem in raw["problems"]))
    return GpuReport(**whole)


def check_texts(value: Any, path: str = "$") -> None:
    """Raise ReportError for text that could act on a terminal or begin a line of its own in a file."""
    if isinstance(value, str) and not value.isprintable():
        raise ReportError(f"{path}: unprintable characters in {ascii(value)[:80]}")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        check_texts(part, f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}")


def check_slots(raw: dict[str, Any]) -> None:
    """Raise ReportError where slots and GPUs contradict each other, which a schema can't tell."""
    total, numbers = raw["slots_total"], [gpu["index"] for gpu in raw["gpus"] if gpu["index"] is not None]
    if numbers != list(range(total)):
        raise ReportError(f"$.gpus: slots 0 to {total - 1} are announced, and the GPUs have {numbers[:20]}")
    usable = [gpu["index"] for gpu in raw["gpus"] if gpu["usable"]]
    if usable != raw["slots_use"]:
        raise ReportError(f"$.slots_use: {raw['slots_use'][:20]} isn't what the usable GPUs have, {usable[:20]}")
