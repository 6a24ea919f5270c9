"""A best trial that isn't ahead with confidence is called so, wherever its score is shown."""

from __future__ import annotations

import pytest

from fintx.analysis.predictions import BaselineComparison
from fintx.cli import display
from fintx.evaluate.significance import Estimate


def comparison_of(mean: float, half: float) -> BaselineComparison:
    difference = Estimate(mean, mean - half, mean + half, half / 2)
    return BaselineComparison("log_loss", "garch_touch", 0.6123, 0.6123 - mean, difference, 1000)


@pytest.mark.parametrize(
    "mean, half, begins, short",
    [
        (-0.01, 0.002, "NO SKILL beyond garch_touch: it is better than the best of 50", "behind"),
        (0.01, 0.02, "NO SKILL beyond garch_touch: the best of 50 trials can't be told apart", "can't be told apart"),
        (0.01, 0.002, "The best trial is ahead of garch_touch", "ahead"),
    ],
    ids=["worse", "equal", "better"],
)
def test_the_verdict_is_that_of_the_interval(mean, half, begins, short):
    found = comparison_of(mean, half)
    assert display.sentence(found, 50).startswith(begins)
    assert display.standing(found) == short
    assert display.to_beat(found) == "garch_touch 0.6123"


def test_nothing_to_compare_with_is_a_dash():
    assert display.standing(None) == display.to_beat(None) == "–"
