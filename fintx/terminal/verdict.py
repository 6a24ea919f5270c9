"""Does a study's best trial beat what must be beaten? The same words wherever its score is shown."""

from __future__ import annotations

from fintx.report.words import number
from fintx.study.lead import Lead


def sentence(lead: Lead, n_trials: int) -> str:
    """Whether the winner beats the best baseline by more than noise, and why even that isn't yet proof."""
    gain = lead.gain
    side = "lower" if gain.mean > 0 else "higher"
    figures = f"mean {lead.loss} {number(abs(gain.mean))} {side}; gain 95 %: {number(gain.low)} … {number(gain.high)}"
    if gain.negative:
        return f"NO SKILL beyond {lead.baseline}: it is better than the best of {n_trials} trials ({figures})."
    if not gain.positive:
        return f"NO SKILL beyond {lead.baseline}: the best of {n_trials} trials can't be told from it ({figures})."
    return (
        f"The best trial is ahead of {lead.baseline} ({figures}), "
        f"but it is the best of {n_trials}, chosen on these very rows: expect less on new days."
    )


def brief(lead: Lead | None) -> str:
    """The same in a column's width; "–" where nothing can be compared."""
    if lead is None:
        return "–"
    return "ahead of it" if lead.gain.positive else "behind it" if lead.gain.negative else "no better than it"


def to_beat(lead: Lead | None) -> str:
    """The best baseline and its score."""
    return "–" if lead is None else f"{lead.baseline} {number(lead.value)}"
