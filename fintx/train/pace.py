"""How many steps go into one dispatch? As many as take about a second and a half, by the clock.

A dispatch can't be cut short: between two of them a trial can be stopped, saved and heard of. The steps of a small
model take well below a millisecond, and its epochs are one dispatch each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DISPATCH_S = 1.5
"""Seconds that no dispatch should exceed by much; a single step may."""


@dataclass
class Pace:
    """What is known of a trial's speed. It decides where epochs are cut, which no result depends on."""

    step_s: float = math.inf
    """Seconds per step in the latest dispatch."""

    def steps(self, left: int) -> int:
        """Steps of the next dispatch, of `left` until the epoch's end: equal parts that are short enough, or one."""
        parts = max(1, math.ceil(min(left, left * self.step_s / DISPATCH_S)))
        return math.ceil(left / parts)

    def note(self, n_steps: int, seconds: float) -> None:
        """A dispatch is over."""
        self.step_s = seconds / n_steps
