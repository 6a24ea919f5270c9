"""Which shapes and training values do better, and can the difference be told from noise?

Trials are put into groups (by width, depth, …). Two things make groups differ by chance: other trials of the same group
would have come out otherwise (initial weights, the values it was not grouped by), and so would other days. The variance
of a difference of two groups' mean skill is therefore

    s² (1/nᵢ + 1/nⱼ) + Var_days(meanᵢ − meanⱼ)

with s² the variance of trials within groups, pooled (one-way ANOVA), and the second part from the same resampled days
for both. Groups are compared with the best one by Tukey's studentised range, so that choosing the best of many groups
makes no difference out of nothing. Skill is 1 − loss / loss of the training prior.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from fintx.config.schema import Choices, Shape
from fintx.report import ranks
from fintx.report.evidence import Evidence
from fintx.report.ranks import Agreement
from fintx.report.words import listed
from fintx.study.records import TrialRecord
from fintx.types import Floats

DEPTHS = ((12, "≤ 12"), (24, "13–24"), (48, "25–48"), (10**9, "> 48"))
LEVEL = 0.95
_FEW_VALUES = 5
_LEAST_FREEDOM = 2


@dataclass(frozen=True)
class Group:
    """Trials alike in one respect. Skills are shares: .05 is five percent of the prior's loss saved."""

    words: str
    n: int
    best: float
    mean: float
    low: float | None
    """Bounds of the mean, over other trials and other days; none where there are too few trials."""
    high: float | None
    behind: float | None
    """Mean skill of the best group less this one's; none for the best group."""
    behind_low: float | None
    behind_high: float | None

    @property
    def verdict(self) -> str:
        """Whether it can be told from the best group."""
        if self.behind is None:
            return "best mean"
        if self.behind_low is None:
            return "too few trials to say"
        return "worse" if self.behind_low > 0 else "not distinguishable"


@dataclass(frozen=True)
class Pattern:
    """One respect in which trials differ."""

    name: str
    """As a file's stem: d_model, depth, learning_rate."""
    by: str
    """In words."""
    groups: tuple[Group, ...]
    trend: Agreement | None = None
    """Rank correlation of the value with skill, where it is a number."""

    @property
    def distinguishable(self) -> bool:
        """Whether any group can be told from the best one."""
        return any(group.verdict == "worse" for group in self.groups)

    @property
    def sentence(self) -> str:
        """What the table says."""
        if len(self.groups) < 2:
            return f"All trials have the same {self.by}."
        if all(group.behind_low is None for group in self.groups):
            return "Too few trials to compare the groups."
        best = next(group.words for group in self.groups if group.behind is None)
        worse = [group.words for group in self.groups if group.verdict == "worse"]
        equal = [group.words for group in self.groups if group.verdict == "not distinguishable"]
        if not worse:
            return f"No difference can be told from noise: {best} has the best mean, {listed(equal)} may be as good."
        rest = f"; {listed(equal)} can't be told from it" if equal else ""
        return f"{best} has the best mean; {listed(worse)} {'is' if len(worse) == 1 else 'are'} worse{rest}."


def by_shape(evidence: Evidence) -> tuple[Pattern, ...]:
    """The successful trials by width, depth, feed-forward ratio, heads and aspect ratio."""
    return (
        pattern(evidence, "d_model", "d_model", lambda r: r.d_model, str),
        pattern(evidence, "depth", "depth", lambda r: depth_bucket(r.n_layers), lambda i: DEPTHS[int(i)][1]),
        pattern(evidence, "d_ff_ratio", "d_ff / d_model", lambda r: round(r.d_ff / r.d_model, 3), "{:g}".format),
        pattern(evidence, "n_heads", "number of heads", lambda r: r.n_heads, str),
        pattern(evidence, "aspect", "aspect ratio", lambda r: aspect_octave(r.config.shape), _octave),
    )


def by_knobs(evidence: Evidence) -> tuple[Pattern, ...]:
    """The successful trials by each searched training value: by its thirds, or by its values where they are few."""
    return tuple(_knob(evidence, path) for path in evidence.spec.space)


def depth_bucket(n_layers: int) -> int:
    """Index into `DEPTHS`."""
    return next(i for i, (most, _) in enumerate(DEPTHS) if n_layers <= most)


def aspect_octave(shape: Shape) -> int:
    """⌊log2(d_model / n_layers)⌋: the aspect ratios from 2ᵏ up to 2ᵏ⁺¹."""
    return math.floor(math.log2(shape.d_model / shape.n_layers) + 1e-9)


def _octave(k: float) -> str:
    return f"{2.0**k:g}–{2.0 ** (k + 1):g}"


def _knob(evidence: Evidence, path: str) -> Pattern:
    section, _, key = path.partition(".")
    name = key.replace("_", " ")

    def value(record: TrialRecord) -> Any:
        return getattr(getattr(record.config, section), key)

    held = [value(record) for record in evidence.ranked]
    if isinstance(evidence.spec.space[path], Choices) or len(set(held)) <= _FEW_VALUES:
        order = sorted(set(held), key=lambda v: (isinstance(v, str), v))  # type: ignore[arg-type, return-value]
        found = pattern(evidence, key, name, lambda r: order.index(value(r)), lambda i: _said(order[int(i)]))
    else:
        edges = np.quantile(np.array(held, float), [1 / 3, 2 / 3])
        thirds = [np.array(held, float)[np.searchsorted(edges, np.array(held, float)) == i] for i in range(3)]
        spans = [f"{_said(each.min())} … {_said(each.max())}" if len(each) else "" for each in thirds]
        found = pattern(
            evidence, key, name, lambda r: int(np.searchsorted(edges, float(value(r)))), lambda i: spans[int(i)]
        )  # fmt: skip
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in held)
    trend = ranks.spearman(np.array(held, float), _skills(evidence, evidence.ranked)) if numeric else None
    return Pattern(found.name, found.by, found.groups, trend)


def _said(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _skills(evidence: Evidence, found: Sequence[TrialRecord]) -> Floats:
    """(T,); every successful trial has one."""
    return np.array([evidence.skill(record.best) for record in found], np.float64)


def pattern(
    evidence: Evidence, name: str, by: str, key: Callable[[TrialRecord], float], say: Callable[[float], str]
) -> Pattern:
    """Compare the successful trials that differ in one respect.

    Args:
        key: a trial's group, as a number that orders the groups.
        say: a group in words.
    """
    found = [r for r in evidence.ranked if evidence.skill(r.best) is not None]
    keys = np.array([key(record) for record in found])
    order, index = np.unique(keys, return_inverse=True)
    if not len(order):
        return Pattern(name, by, ())
    skills, counts = _skills(evidence, found), np.bincount(index)
    means = np.bincount(index, weights=skills) / counts
    freedom = len(found) - len(order)
    pooled = float(np.sum(np.square(skills - means[index])) / freedom) if freedom >= _LEAST_FREEDOM else None
    level, apart = _over_days(evidence, found, index)
    best = int(np.argmax(means))
    groups = []
    for i, value in enumerate(order):
        best_here = float(skills[index == i].max())
        half = behind_half = None
        if pooled is not None:
            half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(pooled / counts[i] + level[i])
            factor = _tukey(len(order), freedom)
            behind_half = factor * math.sqrt(pooled * (1 / counts[i] + 1 / counts[best]) + apart[i, best])
        mean, behind = float(means[i]), float(means[best] - means[i])
        groups.append(
            Group(
                words=say(value), n=int(counts[i]), best=best_here, mean=mean,
                low=None if half is None else mean - half, high=None if half is None else mean + half,
                behind=None if i == best else behind,
                behind_low=None if i == best or behind_half is None else behind - behind_half,
                behind_high=None if i == best or behind_half is None else behind + behind_half,
            )
        )  # fmt: skip
    return Pattern(name, by, tuple(groups))


@functools.cache
def _tukey(k: int, freedom: int) -> float:
    """Half-width of all pairwise differences of k means at once, in standard errors of a difference."""
    return float(stats.studentized_range.ppf(LEVEL, k, freedom)) / math.sqrt(2) if k > 1 else 0.0


def _over_days(evidence: Evidence, found: Sequence[TrialRecord], index: np.ndarray) -> tuple[Floats, Floats]:
    """Variance by the choice of days: of each group's mean skill, (k,), and of the pairwise differences, (k, k).

    Zero where no predictions are here: then the trials alone speak.
    """
    k = int(index.max()) + 1
    resamples, prior = evidence.resamples, evidence.prior_skill_series
    members = [[r.trial_number for r, i in zip(found, index, strict=True) if i == g] for g in range(k)]
    known = [[evidence.skill_series[n] for n in numbers if n in evidence.skill_series] for numbers in members]
    if resamples is None or prior is None or not all(known):
        return np.zeros(k), np.zeros((k, k))
    losses = np.stack([np.mean(each, axis=0) for each in known])
    skills = 1 - (losses @ resamples.weights.T) / (prior @ resamples.weights.T)  # (k, R)
    differences = skills[:, None, :] - skills[None, :, :]
    return skills.var(axis=-1, ddof=1), differences.var(axis=-1, ddof=1)
