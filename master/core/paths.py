"""Where this checkout's files are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = ROOT / "worker"
SCHEMAS = ROOT / "schemas"
TRAINER = ROOT / "trainer" / "train.py"
PRESETS = ROOT / "trainer" / "configs"
