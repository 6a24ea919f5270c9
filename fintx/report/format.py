"""Formats: numbers, intervals, metrics and shapes in words, the same everywhere that a person reads them."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fintx.analysis import predictions
from fintx.config.schema import Shape
from fintx.evaluate import metrics
from fintx.evaluate.significance import Estimate

if TYPE_CHECKING:  # types alone: to import their makers takes seconds
    from fintx.analysis.confirmation import Confirmation
    from fintx.analysis.study_results import StudyResults
    from fintx.study.records import TrialRecord

LOSSES = {"log_loss": "log loss", "brier": "Brier score", "mse": "squared error", "mae": "absolute error",
          "auc": "1 − AUC", "average_precision": "1 − average precision"}  # fmt: skip
"""What is compared for a metric."""
UNITS = {"log_loss": "nats per row", "brier": "of Brier score per row", "mse": "of squared error per row",
         "mae": "of absolute error per row", "auc": "of AUC", "average_precision": "of average precision"}  # fmt: skip
"""Of a difference in a metric: .012 of AUC."""
_METRICS = {**LOSSES, "auc": "AUC", "average_precision": "average precision"}


def number(value: float | int | None, digits: int = 4) -> str:
    """0.4321, or "–" where there is none; whole numbers with thousands separators; 0.000292 with its digits kept."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if 0 < abs(value) < 0.01:
        return f"{value:.{digits - 1}g}" if digits > 1 else f"{value:.1g}"
    return f"{value:.{digits}f}"


def metric_words(name: str) -> str:
    """A metric's name as a person says it: log loss, AUC."""
    return _METRICS.get(name, name.replace("_", " "))


def percent(value: float | None) -> str:
    """12.3 %, or "–"."""
    return "–" if value is None else f"{100 * value:.1f} %"


def count(value: float) -> str:
    """199.0M, 2.1B, 48.1K, 912: three or four leading digits and a suffix."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.1f}{suffix}"
    return str(round(value))


def duration(seconds: float | datetime.timedelta | None) -> str:
    """4 s, 3 min 20 s, 2 h 5 min, 3 d 4 h; "–" where there is none."""
    if seconds is None:
        return "–"
    whole = round(seconds.total_seconds() if isinstance(seconds, datetime.timedelta) else seconds)
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    parts = []
    for name, size in units:
        if whole >= size:
            parts.append(f"{whole // size} {name}")
            whole %= size
    return " ".join(parts[:2]) or "0 s"


def size(n_bytes: float) -> str:
    """2.3 GiB, 45 MiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{round(n_bytes)} B"


def shape_words(shape: Shape | TrialRecord) -> str:
    """d_model 768 · 28 layers · 12 heads · d_ff 3072."""
    return f"d_model {shape.d_model} · {shape.n_layers} layers · {shape.n_heads} heads · d_ff {shape.d_ff}"


def span(low: float | None, high: float | None) -> str:
    """0.0008 … 0.0337: both ends with the digits that their distance deserves; "–" where there are none."""
    if low is None or high is None:
        return "–"
    digits = _digits(high - low)
    return f"{low:.{digits}f} … {high:.{digits}f}"


def share_span(low: float | None, high: float | None) -> str | None:
    """8.1 … 15.9 %; none where there are none."""
    return None if low is None or high is None else f"{100 * low:.1f} … {100 * high:.1f} %"


def share_interval(measured: tuple[float, float, float] | None) -> str:
    """12.3 % (8.1 … 15.9 %) of (mean, low, high); "–" where there is none."""
    return "–" if measured is None else f"{percent(measured[0])} ({share_span(*measured[1:])})"


def measured(mean: float, low: float, high: float) -> str:
    """A figure with as many digits as its interval deserves: 0.0172."""
    return f"{mean:.{_digits(high - low)}f}"


def moves(gain: Estimate, metric: str) -> str:
    """What a trial saves of a loss, or gains of a ranking: saves 0.0172 nats per row; loses .01 of AUC."""
    mean, up = measured(abs(gain.mean), gain.low, gain.high), "gains" if metric in metrics.RANKINGS else "saves"
    return f"{up if gain.mean >= 0 else 'loses'} {mean} {UNITS[metric]}"


def _digits(width: float) -> int:
    return min(max(2 - math.floor(math.log10(width)), 1), 12) if width > 0 else 4


def points(value: float | None) -> str:
    """A difference of two shares, in percentage points: +1.2 pp; "–" where there is none."""
    return "–" if value is None else f"{100 * value:+.1f} pp"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


# --- verdicts ---------------------------------------------------------------------------------------------------------

Tone = Literal["good", "bad", "open"]
"""good: ahead of the best baseline with confidence; bad: not; open: can't be said yet."""


def study_verdict(results: StudyResults, confirmation: Confirmation | None) -> tuple[str, Tone]:
    """Whether a study's best trial beats what must be beaten, as far as the study is."""
    best, n = results.best, len(results.records)
    if best is None:
        failed = Counter(record.outcome.replace("_", " ") for record in results.records)
        return f"No trial has succeeded yet: {listed([f'{k} {name}' for name, k in failed.items()])}.", "open"
    if confirmation is not None and confirmation.best is not None:
        return confirmation_verdict(confirmation), "good" if confirmation.confirmed else "bad"
    comparison, over_prior, who = (
        results.comparison,
        results.gain("prior"),
        f"trial {best.trial_number} ({shape_words(best)})",
    )
    if comparison is None:
        value = f"{results.spec.study.metric} {number(best.value)}"
        why = f"the best of {n} trials, {who}, has {value}, but there is nothing to compare it with."
        return f"Can't be said: {why}", "open"
    gain, baseline = comparison.difference, comparison.baseline
    rows = f"on {comparison.n_rows:,} validation rows"

    def saved(gain: Estimate) -> str:
        words = moves(gain, results.metric)
        of = "" if gain.mean >= 0 else f" of what it {'gains' if results.metric in metrics.RANKINGS else 'saves'}"
        return f"{words} (95 % interval{of} {span(gain.low, gain.high)})"

    if over_prior is not None and predictions.standing(over_prior) != "ahead":
        prior = f"the best of {n} trials, {who}, can't be told from the prior: it {saved(over_prior)}, {rows}."
        return f"No skill: {prior}", "bad"
    if comparison.standing == "behind":
        return f"No: {baseline} is better than the best of {n} trials, {who}, which {saved(gain)}, {rows}.", "bad"
    if comparison.standing == "can't be told apart":
        told = f"the best of {n} trials, {who}, doesn't beat {baseline} with confidence: it {saved(gain)}, {rows}."
        return f"No: {told}", "bad"
    luck = results.luck
    chance = "" if luck is None else (
        f" (the best of {n} equal ones looks {measured(luck, gain.low, gain.high)} better by chance)"
    )  # fmt: skip
    return (
        f"Ahead, not confirmed: the best of {n} trials, {who}, {saved(gain)} against {baseline}, {rows}. It was chosen "
        f"on these very rows{chance}: run `just confirm {results.name}` before you believe it.",
        "open",
    )


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
    interval = (
        f"({level}: {span(gain.low, gain.high)}; with all {confirmation.n_compared} trials counted "
        f"p = {number(confirmation.superior_p_value)})"
    )
    if best.verdict.confirmed:
        by = f"{measured(gain.mean, gain.low, gain.high)} {UNITS[loss]}"
        return f"CONFIRMED: trial {best.trial} beats {baseline} by {by} with {seeds} {interval}."
    if predictions.standing(gain) == "behind":
        return (
            f"NOT CONFIRMED: {baseline} is better than every trial trained again; trial {best.trial}, the best with "
            f"{seeds}, {moves(gain, loss)} against it ({level} of the loss: {span(-gain.high, -gain.low)})."
        )
    return (
        f"NOT CONFIRMED: no trial beats {baseline} with confidence; trial {best.trial}, the best with {seeds}, "
        f"{moves(gain, loss)} {interval}."
    )


def confirmation_details(confirmation: Confirmation) -> tuple[str, ...]:
    """What else a confirmation says, in sentences: who is as good, what was luck, and what to know."""
    details = [_alike(confirmation), _luck(confirmation), *confirmation.notes]
    if not confirmation.complete:
        details.append(
            f"{confirmation.n_trained} of {confirmation.n_members} trainings are done; compared are the "
            f"{len(confirmation.seeds)} of {confirmation.n_seeds} seeds that every candidate has; the same command "
            "continues"
        )
    return tuple(sentence(detail) for detail in details if detail)


def level_words(confirmation: Confirmation) -> str:
    """Of its intervals: 95 %."""
    return f"{100 * (1 - confirmation.level):g} %"


def _alike(confirmation: Confirmation) -> str:
    """Who can't be told from the best."""
    if confirmation.best is None:
        return ""
    alike = [str(each.trial) for each in confirmation.alike]
    if alike:
        return f"indistinguishable from the best: trial{'s' if len(alike) > 1 else ''} {', '.join(alike)}"
    judged = [each for each in confirmation.candidates if each.verdict]
    return "no candidate is indistinguishable from it" if len(judged) > 1 else ""


def _luck(confirmation: Confirmation) -> str:
    """By how much the search's own winner was too good."""
    first, unit = confirmation.candidates[0], UNITS[confirmation.loss]
    too_good = first.too_good
    if too_good is None or first.mean_value is None:
        return ""
    much = measured(abs(too_good.mean), too_good.low, too_good.high)
    was = f"{much} {unit} too good"
    if too_good.mean < 0:
        was = f"not too good but {much} {unit} too bad; how much too good"
    words = (
        f"the search's winner, trial {first.trial}, had {confirmation.metric} {number(first.search_value)}; fresh "
        f"seeds give {number(first.mean_value)}: the search's figure was {was} ({level_words(confirmation)}: "
        f"{span(too_good.low, too_good.high)})"
    )
    if confirmation.luck is not None:
        words += (
            f". The best of {confirmation.n_compared} equal trials looks {number(confirmation.luck)} {unit} better "
            "than their average on these rows by chance alone, whatever its seed"
        )
    if confirmation.overfitting is not None:
        words += (
            f". Probability of backtest overfitting: {percent(confirmation.overfitting)} (the search's choice on half "
            "of the days is below the middle on the other half)"
        )
    return words
