"""Formats: numbers, intervals, metrics, shapes and verdicts in words, the same wherever a person reads them."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fintx.analysis import predictions
from fintx.analysis.predictions import BaselineComparison
from fintx.config.schema import Shape
from fintx.evaluate import metrics
from fintx.evaluate.significance import Estimate

if TYPE_CHECKING:  # importing these takes seconds
    from fintx.analysis.confirmation import Confirmation
    from fintx.analysis.study_results import StudyResults
    from fintx.study.records import TrialRecord

LOSS_WORDS = {"log_loss": "log loss", "brier": "Brier score", "mse": "squared error", "mae": "absolute error",
          "auc": "1 − AUC", "average_precision": "1 − average precision"}  # fmt: skip
"""The loss that stands for a metric in comparisons."""
UNITS = {"log_loss": "nats per row", "brier": "of Brier score per row", "mse": "of squared error per row",
         "mae": "of absolute error per row", "auc": "of AUC", "average_precision": "of average precision"}  # fmt: skip
"""Unit of a difference in a metric."""
_METRICS = {**LOSS_WORDS, "auc": "AUC", "average_precision": "average precision"}


def number(value: float | int | None, digits: int = 4) -> str:
    """0.4321, 1,234 for whole numbers, 0.000292 with significant digits where it is small; "–" for none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if 0 < abs(value) < 0.01:
        return f"{value:.{max(digits - 1, 1)}g}"
    return f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """12.3 %, or "–"."""
    return "–" if value is None else f"{100 * value:.1f} %".replace("-", "−")


def points(value: float) -> str:
    """A difference of two shares, in percentage points: +1.2 pp."""
    return f"{100 * value:+.1f} pp".replace("-", "−")


def count(value: float) -> str:
    """2.1B, 199.0M, 48.1K, 912."""
    for scale, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= scale:
            return f"{value / scale:.1f}{suffix}"
    return str(round(value))


def size(n_bytes: float) -> str:
    """2.3 GiB, 45.0 MiB, 12 B."""
    for scale, suffix in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {suffix}"
    return f"{round(n_bytes)} B"


def duration(seconds: float | datetime.timedelta | None) -> str:
    """4 s, 3 min 20 s, 2 h 5 min, 3 d 4 h; "–" for none."""
    if seconds is None:
        return "–"
    rest = round(seconds.total_seconds() if isinstance(seconds, datetime.timedelta) else seconds)
    parts = []
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if rest >= length:
            parts.append(f"{rest // length} {unit}")
            rest %= length
    return " ".join(parts[:2]) or "0 s"


def shape_words(shape: Shape) -> str:
    """d_model 768 · 28 layers · 12 heads · d_ff 3072; of another model family than the encoder: width 16 · …"""
    numbers = shape.model_dump()
    if numbers.keys() == {"d_model", "n_layers", "n_heads", "d_ff"}:
        return f"d_model {shape.d_model} · {shape.n_layers} layers · {shape.n_heads} heads · d_ff {shape.d_ff}"
    return " · ".join(f"{name} {value}" for name, value in numbers.items())


def shape_label(shape: Shape) -> str:
    """768 × 28 of an encoder's width and depth, where there is no room for all numbers."""
    return f"{shape.d_model} × {shape.n_layers}" if "n_layers" in shape.model_dump() else shape_words(shape)


def metric_words(name: str) -> str:
    """A metric's name in words: log loss, AUC."""
    return _METRICS.get(name, name.replace("_", " "))


def span(low: float | None, high: float | None) -> str:
    """0.0008 … 0.0337, with the digits that the width deserves; "–" for none."""
    if low is None or high is None:
        return "–"
    digits = _digits(high - low)
    return f"{low:.{digits}f} … {high:.{digits}f}".replace("-", "−")


def percent_span(low: float | None, high: float | None) -> str | None:
    """8.1 … 15.9 %."""
    return None if low is None or high is None else f"{100 * low:.1f} … {100 * high:.1f} %".replace("-", "−")


def percent_interval(interval: tuple[float, float, float] | None) -> str:
    """12.3 % (8.1 … 15.9 %) for (mean, low, high); "–" for none."""
    return "–" if interval is None else f"{percent(interval[0])} ({percent_span(*interval[1:])})"


def rounded(value: float, low: float, high: float) -> str:
    """A value with the digits that its interval deserves: 0.0172."""
    return f"{value:.{_digits(high - low)}f}"


def _digits(width: float) -> int:
    return min(max(2 - math.floor(math.log10(width)), 1), 12) if width > 0 else 4


def gain_words(gain: Estimate, metric: str) -> str:
    """What a trial saves of a loss, or gains in a ranking: saves 0.0172 nats per row; loses 0.012 of AUC."""
    verb = "loses" if gain.mean < 0 else "gains" if metric in metrics.RANKINGS else "saves"
    return f"{verb} {rounded(abs(gain.mean), gain.low, gain.high)} {UNITS[metric]}"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def as_sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


# --- verdicts ---------------------------------------------------------------------------------------------------------

Tone = Literal["good", "bad", "open"]
"""good: better than the best baseline, with confidence; bad: not; open: not decided yet."""


def study_verdict(results: StudyResults, confirmation: Confirmation | None) -> tuple[str, Tone]:
    """Whether a study's best trial beats the best baseline, as far as is known yet."""
    best, n, comparison = results.best, len(results.records), results.comparison
    if best is None:
        failures = Counter(record.outcome.replace("_", " ") for record in results.records)
        return f"No trial has succeeded yet: {listed([f'{k} {name}' for name, k in failures.items()])}.", "open"
    if confirmation is not None and confirmation.best is not None:
        return confirmation_verdict(confirmation), "good" if confirmation.confirmed else "bad"
    if comparison is None:
        value = f"{results.metric} {number(best.value)}"
        return f"Not decided: {best_trial_words(n, best)} has {value}, and there is nothing to compare it with.", "open"
    over_prior = results.gain("prior")
    if over_prior is not None and predictions.standing(over_prior) != "ahead":
        difference = _difference(over_prior, comparison)
        return f"No skill: {best_trial_words(n, best)} can't be told from the prior: it {difference}.", "bad"
    return comparison_verdict(comparison, best_trial_words(n, best), results.name, luck=results.luck)


def best_trial_words(n_trials: int, best: TrialRecord) -> str:
    """the best of 50 trials, trial 7 (d_model 768 · …),"""
    return f"the best of {n_trials} trials, trial {best.trial_number} ({shape_words(best.config.shape)}),"


def comparison_verdict(
    comparison: BaselineComparison, trial: str, study: str, *, luck: float | None = None
) -> tuple[str, Tone]:
    """Whether the best trial beats the best baseline by more than noise, and why even that is no proof yet.

    Args:
        trial: as `best_trial_words` names it.
        luck: how much better the best of as many equal trials looks by chance.
    """
    baseline, gain = comparison.baseline, comparison.difference
    difference = _difference(gain, comparison)
    if comparison.standing == "behind":
        return f"No: {baseline} is better than {trial} which {difference}.", "bad"
    if comparison.standing == "can't be told apart":
        return f"No: {trial} doesn't beat {baseline} with confidence: it {difference}.", "bad"
    chance = ""
    if luck is not None:
        chance = f" (by chance the best of as many equal trials looks {rounded(luck, gain.low, gain.high)} better)"
    return (
        f"Ahead, not confirmed: {trial} beats {baseline}: it {difference}. It was chosen on these very rows{chance}: "
        f"run `just confirm {study}` before you believe it.",
        "open",
    )


def _difference(gain: Estimate, comparison: BaselineComparison) -> str:
    verb = "gains" if comparison.metric in metrics.RANKINGS else "saves"
    of = "" if gain.mean >= 0 else f" of what it {verb}"
    interval = f"95 % interval{of} {span(gain.low, gain.high)}"
    return f"{gain_words(gain, comparison.metric)} ({interval}), on {comparison.n_rows:,} validation rows"


def confirmation_verdict(confirmation: Confirmation) -> str:
    """Whether the best candidate beats the best baseline, in a sentence."""
    best = confirmation.confirmed[0] if confirmation.confirmed else confirmation.best
    if best is None or best.verdict is None:
        return (
            f"{confirmation.study}: nothing can be said yet: no candidate has been trained with a whole set of fresh "
            "seeds."
        )
    gain, baseline, loss = best.verdict.gain, confirmation.baseline, confirmation.loss
    seeds, level = f"{len(confirmation.seeds)} fresh seeds", level_words(confirmation)
    p_value = f"p = {number(confirmation.superior_p_value)}"
    interval = (
        f"({level} interval {span(gain.low, gain.high)}; {p_value} with all {confirmation.n_compared} trials counted)"
    )
    if best.verdict.confirmed:
        by = f"{rounded(gain.mean, gain.low, gain.high)} {UNITS[loss]}"
        return f"CONFIRMED: trial {best.trial} beats {baseline} by {by} with {seeds} {interval}."
    if predictions.standing(gain) == "behind":
        return (
            f"NOT CONFIRMED: {baseline} is better than every trial trained again; trial {best.trial}, the best with "
            f"{seeds}, {gain_words(gain, loss)} against it ({level} interval of the loss "
            f"{span(-gain.high, -gain.low)})."
        )
    return (
        f"NOT CONFIRMED: no trial beats {baseline} with confidence; trial {best.trial}, the best with {seeds}, "
        f"{gain_words(gain, loss)} {interval}."
    )


def confirmation_details(confirmation: Confirmation) -> tuple[str, ...]:
    """What else a confirmation says, in sentences: which candidates are as good, how large luck was, notes."""
    details = []
    if confirmation.alike:
        numbers = ", ".join(str(candidate.trial) for candidate in confirmation.alike)
        plural = "s" if len(confirmation.alike) > 1 else ""
        details.append(f"indistinguishable from the best: trial{plural} {numbers}")
    elif confirmation.best is not None and sum(c.verdict is not None for c in confirmation.candidates) > 1:
        details.append("no candidate is indistinguishable from the best")
    details += [*_luck(confirmation), *confirmation.notes]
    if not confirmation.complete:
        details.append(
            f"{confirmation.n_trained} of {confirmation.n_members} trainings are done; compared are the "
            f"{len(confirmation.seeds)} of {confirmation.n_seeds} seeds that every candidate has; the same command "
            "continues"
        )
    return tuple(map(as_sentence, details))


def level_words(confirmation: Confirmation) -> str:
    """Confidence level of its intervals: 95 %."""
    return f"{100 * (1 - confirmation.level):g} %"


def _luck(confirmation: Confirmation) -> list[str]:
    """By how much the search's figure for its winner was too good."""
    winner, unit = confirmation.candidates[0], UNITS[confirmation.loss]
    too_good = winner.too_good
    if too_good is None or winner.mean_value is None:
        return []
    size = f"{rounded(abs(too_good.mean), too_good.low, too_good.high)} {unit}"
    error = f"{size} too good" if too_good.mean >= 0 else f"not too good but {size} too bad; how much too good"
    details = [
        f"the search's winner, trial {winner.trial}, had {confirmation.metric} {number(winner.search_value)}; fresh "
        f"seeds give {number(winner.mean_value)}: the search's figure was {error} ({level_words(confirmation)}: "
        f"{span(too_good.low, too_good.high)})"
    ]
    if confirmation.luck is not None:
        details.append(
            f"the best of {confirmation.n_compared} equal trials looks {number(confirmation.luck)} {unit} better "
            "than their average on these rows by chance alone, whatever its seed"
        )
    if confirmation.overfitting is not None:
        details.append(
            f"probability of backtest overfitting: {percent(confirmation.overfitting)} (how often the best trial on "
            "one half of the days is below the median on the other half)"
        )
    return details
