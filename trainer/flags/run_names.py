"""What a run is called after its model: gpt2 of openai-community/gpt2, of gpt2/, and of the run that trained gpt2."""

from __future__ import annotations

import re
from pathlib import Path

INSIDE = ("model", "adapter")  # of a run folder
RUN = re.compile(r"[0-9]{8}-[0-9]{6}-(.+)")


def short_name(model: str) -> str:
    """Return a model's name as a part of a folder's name; a run's model/ has that of its run, without the time."""
    path = Path(model)
    name = path.name
    if name in INSIDE and path.resolve().parent.name:
        name = path.resolve().parent.name
    run = RUN.fullmatch(name)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run[1] if run else name).strip("-.") or "model"
