"""The detectors against what torch and nvidia-smi say of the cards that are here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("command", [["bash", str(ROOT / "worker" / "detect_gpus.sh")],
                                     [sys.executable, str(ROOT / "worker" / "detect_gpus.py")]])
def test_the_report_is_what_torch_sees(command: list[str]) -> None:
    import torch

    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{"):])
    assert report["status"] == "ok" and len(report["slots_use"]) == torch.cuda.device_count()
    for number, card in enumerate(report["gpus"][: torch.cuda.device_count()]):
        properties = torch.cuda.get_device_properties(number)
        assert card["name"] == properties.name
        assert card["memory_total_mib"] == pytest.approx(properties.total_memory / 2**20, rel=0.03)
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True,
                                text=True, timeout=60).stdout.split()
        assert [card["uuid"] for card in report["gpus"]] == listed
