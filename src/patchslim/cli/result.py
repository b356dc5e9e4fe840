"""What a command returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CommandResult:
    """Answer of a command: `text` for people, `data` for `--json`."""

    text: str
    data: Any
