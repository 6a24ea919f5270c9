"""What does a confirmation say, in sentences? Those that the terminal and the report begin with."""

from __future__ import annotations

from fintx.evaluate.significance import Estimate
from fintx.report.words import UNITS, number, percent
from fintx.study import lead
from fintx.study.confirmation import Confirmation


def answer(found: Confirmation) -> str:
    """Whether the best candidate beats the best baseline, in a sentence."""
    best = found.confirmed[0] if found.confirmed else found.best
    if best is None or best.verdict is None:
        return f"{found.study}: nothing can be said yet: no candidate has been trained with a whole set of fresh seeds."
    gain = best.verdict.gain
    seeds = f"{len(found.seeds)} fresh seeds"
    interval = f"{level(found)}: {span(gain)}"
    if best.verdict.confirmed:
        return (
            f"CONFIRMED: trial {best.trial} beats {found.baseline} by {_amount(gain.mean, found)} with {seeds} "
            f"({interval}; with all {found.n_compared} trials counted p = {number(found.superior_p_value)})."
        )
    if lead.standing(gain) == "behind":
        return (
            f"NOT CONFIRMED: {found.baseline} is better than every trial trained again; trial {best.trial}, the best "
            f"with {seeds}, loses {_amount(-gain.mean, found)} to it ({level(found)}: {span(_turned(gain))})."
        )
    return (
        f"NOT CONFIRMED: no trial beats {found.baseline} with confidence; trial {best.trial}, the best with {seeds}, "
        f"{_moved(gain.mean, found)} ({interval}; with all {found.n_compared} trials counted "
        f"p = {number(found.superior_p_value)})."
    )


def alike(found: Confirmation) -> str:
    """Who can't be told from the best."""
    if found.best is None:
        return ""
    same = ", ".join(str(each.trial) for each in found.alike)
    rest = len([each for each in found.candidates if each.verdict]) - 1 - len(found.alike)
    if not same:
        return "no candidate is indistinguishable from it" if rest else ""
    return f"indistinguishable from the best: trial{'s' if ',' in same else ''} {same}"


def luck(found: Confirmation) -> str:
    """By how much the search's own winner was too good."""
    first = found.candidates[0]
    if first.too_good is None or first.mean_value is None:
        return ""
    words = (
        f"the search's winner, trial {first.trial}, had {found.metric} {number(first.search_value)}; fresh seeds give "
        f"{number(first.mean_value)}: the search's figure was {_too_good(first.too_good, found)} "
        f"({level(found)}: {span(first.too_good)})"
    )
    if found.luck is not None:
        words += (
            f". The best of {found.n_compared} equal trials looks {_amount(found.luck, found)} better than their "
            "average on these rows by chance alone, whatever its seed"
        )
    if found.overfitting is not None:
        words += (
            f". Probability of backtest overfitting: {percent(found.overfitting)} (the search's choice on half of the "
            "days is below the middle on the other half)"
        )
    return words


def level(found: Confirmation) -> str:
    """Of its intervals: 95 %."""
    return f"{100 * (1 - found.level):g} %"


def span(each: Estimate) -> str:
    """low … high."""
    return f"{number(each.low)} … {number(each.high)}"


def _turned(gain: Estimate) -> Estimate:
    return Estimate(-gain.mean, -gain.high, -gain.low, gain.se)


def _moved(gain: float, found: Confirmation) -> str:
    return f"gains {_amount(gain, found)}" if gain >= 0 else f"loses {_amount(-gain, found)}"


def _too_good(luck: Estimate, found: Confirmation) -> str:
    if luck.mean < 0:
        return f"not too good but {_amount(-luck.mean, found)} too bad; how much too good"
    return f"{_amount(luck.mean, found)} too good"


def _amount(value: float, found: Confirmation) -> str:
    return f"{number(value)} {UNITS[found.loss]}"
