"""Does the study's best trial beat what must be beaten? In a sentence, with its interval and its doubts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fintx.evaluate import metrics, significance
from fintx.evaluate.significance import Estimate
from fintx.report import confirmation as told
from fintx.report.evidence import LOSS_WORDS, Evidence
from fintx.report.words import UNITS, listed, measured, number, percent, shape_words, span
from fintx.study import lead
from fintx.study.confirmation import Confirmation

Tone = Literal["good", "bad", "open"]


@dataclass(frozen=True)
class Answer:
    """What the report begins with."""

    sentence: str
    tone: Tone
    """good: ahead of the best baseline with confidence; bad: not; open: can't be said yet."""
    warnings: tuple[str, ...]


def of(evidence: Evidence, confirmation: Confirmation | None) -> Answer:
    """The answer as far as the study is."""
    sentence, tone = _sentence(evidence, confirmation)
    return Answer(sentence, tone, _warnings(evidence))


def gain(evidence: Evidence, baseline: str, number_: int | None = None) -> Estimate | None:
    """How much better a trial (the best one) is than a baseline, in the study's metric; the search's own luck is not
    in it."""
    best, resamples = evidence.best, evidence.resamples
    which = best.trial_number if number_ is None and best is not None else number_
    if which not in evidence.series or resamples is None or baseline not in evidence.baseline_series:
        return None
    return significance.estimate(evidence.baseline_series[baseline] - evidence.series[which], resamples)


def luck(evidence: Evidence) -> float | None:
    """How much better than their average the best of so many equal trials looks, by chance."""
    if evidence.resamples is None or len(evidence.series) < 2:
        return None
    return significance.luck_of_the_best(np.stack(list(evidence.series.values()), axis=1), evidence.resamples)


def _sentence(evidence: Evidence, confirmation: Confirmation | None) -> tuple[str, Tone]:
    best, n = evidence.best, len(evidence.records)
    if best is None:
        failed = Counter(record.outcome.replace("_", " ") for record in evidence.records)
        return f"No trial has succeeded yet: {listed([f'{k} {name}' for name, k in failed.items()])}.", "open"
    if confirmation is not None and confirmation.best is not None:
        return told.answer(confirmation), "good" if confirmation.confirmed else "bad"
    comparison = evidence.comparison
    who = f"trial {best.trial_number} ({shape_words(best.config.shape)})"
    if comparison is None:
        value = f"{evidence.spec.study.metric} {number(best.value)}"
        return (
            f"Can't be said: the best of {n} trials, {who}, has {value}, but there is nothing to compare it with.",
            "open",
        )
    rows = f"on {comparison.n_rows:,} validation rows"
    rival, difference = comparison.baseline, comparison.difference
    saves = _saves(evidence, difference)
    beside_prior = gain(evidence, "prior")
    if beside_prior is not None and lead.standing(beside_prior) != "ahead":
        return (
            f"No skill: the best of {n} trials, {who}, can't be told from the prior: it "
            f"{_saves(evidence, beside_prior)}, {rows}.",
            "bad",
        )
    if comparison.standing == "behind":
        return f"No: {rival} is better than the best of {n} trials, {who}, which {saves}, {rows}.", "bad"
    if comparison.standing == "can't be told apart":
        return (
            f"No: the best of {n} trials, {who}, doesn't beat {rival} with confidence: it {saves}, {rows}.",
            "bad",
        )
    chance = luck(evidence)
    expected = (
        f" (the best of {n} equal ones looks {measured(chance, difference.low, difference.high)} better by chance)"
        if chance is not None
        else ""
    )
    return (
        f"Ahead, not confirmed: the best of {n} trials, {who}, {saves} against {rival}, {rows}. It was chosen "
        f"on these very rows{expected}: run `just confirm {evidence.name}` before you believe it.",
        "open",
    )


def _saves(evidence: Evidence, found: Estimate) -> str:
    mean, unit = measured(abs(found.mean), found.low, found.high), UNITS[evidence.metric]
    saves = "gains" if evidence.metric in metrics.RANKINGS else "saves"
    verb, of = (saves, "") if found.mean >= 0 else ("loses", f" of what it {saves}")
    return f"{verb} {mean} {unit} (95 % interval{of} {span(found.low, found.high)})"


def _warnings(evidence: Evidence) -> tuple[str, ...]:
    found = []
    finished, wanted = len(evidence.records), evidence.spec.study.n_trials
    if finished < wanted:
        found.append(f"The study is unfinished: {finished} of {wanted} trials. Everything here is as far as it goes.")
    if evidence.best is not None and (doubt := significance.too_good(evidence.best.best)) is not None:
        found.append(doubt)
    return (*found, *evidence.notes)


def skill_words(evidence: Evidence) -> str:
    """What skill means in this study."""
    return f"Skill is the share of the training prior's {LOSS_WORDS[evidence.skill_loss]} that is saved"


def skill_interval(evidence: Evidence, number_: int) -> tuple[float, float, float] | None:
    """(skill, low, high) of a trial over other days, 95 %; none without predictions."""
    prior, resamples = evidence.prior_skill_series, evidence.resamples
    if prior is None or resamples is None or number_ not in evidence.skill_series:
        return None
    mine = evidence.skill_series[number_]
    spread = 1 - (resamples.weights @ mine) / (resamples.weights @ prior)
    low, high = np.quantile(spread, [0.025, 0.975])
    return float(1 - mine.mean() / prior.mean()), float(low), float(high)


def percent_interval(found: tuple[float, float, float] | None) -> str:
    """12.3 % (8.1 … 15.9 %)."""
    if found is None:
        return "–"
    return f"{percent(found[0])} ({100 * found[1]:.1f} … {100 * found[2]:.1f} %)"
