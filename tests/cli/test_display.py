"""A best trial that isn't ahead with confidence is called so, wherever its score is shown."""

from __future__ import annotations

import pytest

from fintx.analysis.predictions import BaselineComparison
from fintx.cli import display
from fintx.evaluate.significance import Estimate
from fintx.report import format


def comparison_of(mean: float, half: float) -> BaselineComparison:
    difference = Estimate(mean, mean - half, mean + half, half / 2)
    return BaselineComparison("log_loss", "garch_touch", 0.6123, 0.6123 - mean, difference, 1000)


@pytest.mark.parametrize(
    "mean, half, begins, short",
    [
        (-0.01, 0.002, "No: garch_touch is better than the best of 50", "behind"),
        (0.01, 0.02, "No: the best of 50 trials doesn't beat garch_touch with confidence", "can't be told apart"),
        (0.01, 0.002, "Ahead, not confirmed: the best of 50 trials beats garch_touch", "ahead"),
    ],
    ids=["worse", "equal", "better"],
)
def test_the_verdict_is_that_of_the_interval(mean, half, begins, short):
    comparison = comparison_of(mean, half)
    assert format.comparison_verdict(comparison, "the best of 50 trials", "study")[0].startswith(begins)
    assert display.baseline_cells(comparison) == ("garch_touch 0.6123", short)


def test_nothing_to_compare_with_leaves_the_cells_empty():
    assert display.baseline_cells(None) == (None, None)
