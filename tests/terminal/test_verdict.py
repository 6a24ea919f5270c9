"""A best trial that isn't ahead with confidence is called so, wherever its score is shown."""

from __future__ import annotations

import pytest

from fintx.evaluate.significance import Estimate
from fintx.study import lead
from fintx.study.lead import Lead
from fintx.terminal import verdict


def a_lead(mean: float, half: float) -> Lead:
    gain = Estimate(mean, mean - half, mean + half, half / 2)
    return Lead("garch_touch", 0.6123, "log_loss", gain, 1000)


@pytest.mark.parametrize(
    "mean, half, begins, short",
    [
        (-0.01, 0.002, "NO SKILL beyond garch_touch: it is better than the best of 50", "behind it"),
        (0.01, 0.02, "NO SKILL beyond garch_touch: the best of 50 trials can't be told", "no better than it"),
        (0.01, 0.002, "The best trial is ahead of garch_touch", "ahead of it"),
    ],
    ids=["worse", "equal", "better"],
)
def test_the_verdict_is_that_of_the_interval(mean, half, begins, short):
    found = a_lead(mean, half)
    assert verdict.sentence(found, 50).startswith(begins)
    assert verdict.brief(found) == short
    assert verdict.to_beat(found) == "garch_touch 0.6123"


def test_nothing_to_compare_with_is_a_dash():
    assert verdict.brief(None) == verdict.to_beat(None) == "–"


def test_the_best_baseline_is_the_lowest_loss_or_the_highest_auc():
    held = {name: {"metrics": {"log_loss": loss, "auc": auc}} for name, loss, auc in (("a", 0.5, 0.6), ("b", 0.6, 0.7))}
    assert lead.best_baseline(held, "log_loss") == ("a", 0.5)
    assert lead.best_baseline(held, "auc") == ("b", 0.7)
    assert lead.best_baseline(held, "mse") is None
