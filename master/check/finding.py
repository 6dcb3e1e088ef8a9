"""What a check says of hosts: a finding, its effect, and how to fix it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """Something about hosts: error (no training), warning (it will hurt) or info, its effect and how to fix it."""

    level: str
    hosts: tuple[str, ...]
    what: str
    effect: str
    fix: str

    def line(self) -> str:
        """Return it as one line."""
        text = f"{', '.join(self.hosts)}: {self.level}: {self.what}: {self.effect}"
        return f"{text}. {self.fix}" if self.fix else text
