"""The best trial against the best baseline, in words: the same wherever its score is shown."""

from __future__ import annotations

from fintx.report.format import number
from fintx.study.lead import BaselineComparison


def sentence(comparison: BaselineComparison, n_trials: int) -> str:
    """Whether the winner beats the best baseline by more than noise, and why even that isn't yet proof."""
    gain, baseline = comparison.difference, comparison.baseline
    figures = (
        f"{comparison.metric} {number(abs(gain.mean))} {'better' if gain.mean > 0 else 'worse'}; "
        f"gain 95 %: {number(gain.low)} … {number(gain.high)}"
    )
    if comparison.standing == "behind":
        return f"NO SKILL beyond {baseline}: it is better than the best of {n_trials} trials ({figures})."
    if comparison.standing == "can't be told apart":
        return f"NO SKILL beyond {baseline}: the best of {n_trials} trials can't be told apart from it ({figures})."
    return (
        f"The best trial is ahead of {baseline} ({figures}), "
        f"but it is the best of {n_trials}, chosen on these very rows: expect less on new days."
    )


def standing(comparison: BaselineComparison | None) -> str:
    """ahead, behind, can't be told apart; "–" where nothing can be compared."""
    return "–" if comparison is None else comparison.standing


def to_beat(comparison: BaselineComparison | None) -> str:
    """The best baseline and its score."""
    return "–" if comparison is None else f"{comparison.baseline} {number(comparison.baseline_value)}"
