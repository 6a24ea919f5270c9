"""How does an interrupted trial go on where it stopped?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Saves:
    """Where a trial's training states lie, and when another is due."""

    folder: Path
    """Of this trial and fold alone; made when needed."""
    every_s: float | None
    """Seconds between saves; none: 60, or 50 times as long as the last save took where that is longer."""
    guard: Callable[[], None]
    """Called right before anything is committed; raises if another worker has taken the trial over."""
