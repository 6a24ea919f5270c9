"""Patterns: which shapes and training values do better, which values matter, and how much of the space was seen.

Trials are put into groups (by width, depth, …). Two things make groups differ by chance: other trials of the same group
would have come out otherwise (initial weights, the values it was not grouped by), and so would other days. The variance
of a difference of two groups' mean skill is therefore

    s² (1/nᵢ + 1/nⱼ) + Var_days(meanᵢ − meanⱼ)

with s² the variance of trials within groups, pooled (one-way ANOVA), and the second part from the same resampled days
for both. Groups are compared with the best one by Tukey's studentised range, so that choosing the best of many groups
makes no difference out of nothing. Skill is 1 − loss / loss of the training prior.
"""

from __future__ import annotations

import datetime
import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import create_trial
from scipy import stats

from fintx.analysis.study_results import StudyResults
from fintx.config.schema import ENCODER, Choices, Shape
from fintx.evaluate import metrics
from fintx.model import family
from fintx.model.family import Family
from fintx.study import search_space, trial_table
from fintx.study.records import TrialRecord
from fintx.study.search_space import SearchSpace
from fintx.types import Floats

LEAST_PAIRS = 5
"""Fewer pairs than this say nothing: the interval would be nearly −1 … 1."""
LEAST_TRIALS = 10
_SHUFFLES = 60
DEPTHS = ((12, "≤ 12"), (24, "13–24"), (48, "25–48"), (10**9, "> 48"))
CONFIDENCE = 0.95
_FEW_VALUES = 5
_LEAST_FREEDOM = 2


@dataclass(frozen=True)
class TrialGroup:
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
    groups: tuple[TrialGroup, ...]
    trend: RankCorrelation | None = None
    """Rank correlation of the value with skill, where it is a number."""

    @property
    def distinguishable(self) -> bool:
        """Whether any group can be told from the best one."""
        return any(group.verdict == "worse" for group in self.groups)


def by_shape(results: StudyResults) -> tuple[Pattern, ...]:
    """The successful trials by the numbers of their shapes: an encoder's width, depth, ratios and heads."""
    if results.spec.model.family != ENCODER:
        return tuple(
            _by_value(results, name.replace(" ", "_"), name, functools.partial(_of_shape, extent))
            for name, extent in family.of(results.spec.model).extents.items()
        )
    octave = functools.partial(_of_shape, lambda shape: math.floor(math.log2(shape.d_model / shape.n_layers) + 1e-9))
    return (
        pattern(results, "d_model", "d_model", lambda r: r.d_model, str),
        pattern(results, "depth", "depth", lambda r: depth_bucket(r.n_layers), lambda i: DEPTHS[int(i)][1]),
        pattern(results, "d_ff_ratio", "d_ff / d_model", lambda r: round(r.d_ff / r.d_model, 3), "{:g}".format),
        pattern(results, "n_heads", "number of heads", lambda r: r.n_heads, str),
        pattern(results, "aspect", "aspect ratio", octave, lambda k: f"{2.0**k:g}–{2.0 ** (k + 1):g}"),
    )


def _of_shape(number: Callable[[Shape], float], record: TrialRecord) -> float:
    return number(record.config.shape)


def by_values(results: StudyResults) -> tuple[Pattern, ...]:
    """The successful trials by each searched training value: by its thirds, or by its values where they are few."""
    patterns = []
    for path, searched in results.spec.space.items():
        key = path.partition(".")[2]
        value = operator.attrgetter(f"config.{path}")
        patterns.append(_by_value(results, key, key.replace("_", " "), value, choices=isinstance(searched, Choices)))
    return tuple(patterns)


def _by_value(
    results: StudyResults, name: str, by: str, value: Callable[[TrialRecord], Any], *, choices: bool = False
) -> Pattern:
    """By thirds, or by values if they are few or a list of choices; with the rank correlation if they are numbers."""
    values = [value(record) for record in results.ranked]
    if choices or len(set(values)) <= _FEW_VALUES:
        ordered = sorted(set(values), key=lambda v: (isinstance(v, str), v))
        by_value = pattern(results, name, by, lambda r: ordered.index(value(r)), lambda i: _words(ordered[int(i)]))
    else:
        edges = np.quantile(np.array(values, float), [1 / 3, 2 / 3])
        third = lambda v: int(np.searchsorted(edges, v))  # noqa: E731
        spans = [[v for v in values if third(v) == i] for i in range(3)]
        by_value = pattern(
            results, name, by, lambda r: third(value(r)),
            lambda i: f"{_words(min(spans[int(i)]))} … {_words(max(spans[int(i)]))}",
        )  # fmt: skip
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        skills = np.array([results.skill(record.best) for record in results.ranked], float)
        return replace(by_value, trend=spearman(np.array(values, float), skills))
    return by_value


def _words(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def depth_bucket(n_layers: int) -> int:
    """Index into `DEPTHS`."""
    return next(i for i, (most, _) in enumerate(DEPTHS) if n_layers <= most)


def pattern(
    results: StudyResults, name: str, by: str, key: Callable[[TrialRecord], float], say: Callable[[float], str]
) -> Pattern:
    """Compare the successful trials that differ in one respect.

    Args:
        key: a trial's group, as a number that orders the groups.
        say: a group in words.
    """
    trials = [r for r in results.ranked if results.skill(r.best) is not None]
    order, index = np.unique(np.array([key(record) for record in trials]), return_inverse=True)
    if not len(order):
        return Pattern(name, by, ())
    skills, counts = np.array([results.skill(record.best) for record in trials], float), np.bincount(index)
    means = np.bincount(index, weights=skills) / counts
    freedom = len(trials) - len(order)
    pooled = float(np.sum(np.square(skills - means[index])) / freedom) if freedom >= _LEAST_FREEDOM else None
    by_days, apart = _over_days(results, trials, index)
    best, none = int(np.argmax(means)), (None, None)
    groups = []
    for i, value in enumerate(order):
        n, mean = int(counts[i]), float(means[i])
        behind = None if i == best else float(means[best] - mean)
        interval: tuple[float | None, float | None] = none
        behind_interval: tuple[float | None, float | None] = none
        if pooled is not None:
            half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(pooled / n + by_days[i])
            interval = mean - half, mean + half
            if behind is not None:
                half = _tukey(len(order), freedom) * math.sqrt(pooled * (1 / n + 1 / counts[best]) + apart[i, best])
                behind_interval = behind - half, behind + half
        groups.append(
            TrialGroup(say(value), n, float(skills[index == i].max()), mean, *interval, behind, *behind_interval)
        )
    return Pattern(name, by, tuple(groups))


@functools.cache
def _tukey(k: int, freedom: int) -> float:
    """Half-width of all pairwise differences of k means at once, in standard errors of a difference."""
    return float(stats.studentized_range.ppf(CONFIDENCE, k, freedom)) / math.sqrt(2) if k > 1 else 0.0


def _over_days(results: StudyResults, trials: Sequence[TrialRecord], index: np.ndarray) -> tuple[Floats, Floats]:
    """Variance by the choice of days: of each group's mean skill, (k,), and of the pairwise differences, (k, k).

    Zero where no predictions are here: then the trials alone speak.
    """
    k = int(index.max()) + 1
    resamples, prior = results.resamples, results.skill_daily_losses.get("prior")
    daily: list[list[Floats]] = [[] for _ in range(k)]
    for record, group in zip(trials, index, strict=True):
        if record.trial_number in results.skill_daily_losses:
            daily[group].append(results.skill_daily_losses[record.trial_number])
    if resamples is None or prior is None or not all(daily):
        return np.zeros(k), np.zeros((k, k))
    losses = np.stack([np.mean(of_group, axis=0) for of_group in daily])
    skills = 1 - (losses @ resamples.weights.T) / (prior @ resamples.weights.T)  # (k, R)
    differences = skills[:, None, :] - skills[None, :, :]
    return skills.var(axis=-1, ddof=1), differences.var(axis=-1, ddof=1)


# --- rank correlation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankCorrelation:
    """A rank correlation of n pairs."""

    rho: float | None
    """None where either side is constant, or the pairs are too few."""
    low: float | None
    high: float | None
    n: int


def spearman(a: Floats, b: Floats) -> RankCorrelation:
    """Spearman's ρ and its 95 % interval by Fisher's z with variance (1 + ρ²/2) / (n − 3) (Bonett & Wright 2000).

    Args:
        a, b: (n,) paired values.
    """
    n = len(a)
    if n < LEAST_PAIRS or np.ptp(a) == 0 or np.ptp(b) == 0:
        return RankCorrelation(None, None, None, n)
    ranks = [stats.rankdata(values) for values in (a, b)]
    rho = float(np.clip(np.corrcoef(*ranks)[0, 1], -1, 1))
    half = float(stats.norm.ppf(0.975)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    z = math.atanh(min(max(rho, -1 + 1e-9), 1 - 1e-9))
    return RankCorrelation(rho, math.tanh(z - half), math.tanh(z + half), n)


# --- importance -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Importance:
    """One searched coordinate or value."""

    name: str
    share: float
    """Of all importances, which sum to 1; 0 where the best trials are spread as all are."""
    by_chance: float
    """What 95 % of shuffled studies stay below."""


def ped_anova(trials: Sequence[TrialRecord], space: SearchSpace, *, seed: int = 0) -> tuple[Importance, ...]:
    """Importance of every searched name, the largest first; empty for fewer than 10 trials or a single name.

    Args:
        trials: finished; one that failed counts as a bad value, as it does for the sampler.
    """
    distributions = space.distributions
    usable = [record for record in trials if record.params.keys() == distributions.keys()]
    if len(usable) < LEAST_TRIALS or len(distributions) < 2:
        return ()
    sign = 1.0 if metrics.MINIMIZE[space.spec.study.metric] else -1.0
    values = np.array([trial_table.WORST if r.value is None else sign * r.value for r in usable])
    params = [dict(record.params) for record in usable]
    rng = np.random.default_rng(seed)
    shuffled = [_shares(params, rng.permutation(values), distributions) for _ in range(_SHUFFLES)]
    importance = [
        Importance(name, share, float(np.quantile([shares[name] for shares in shuffled], 0.95)))
        for name, share in _shares(params, values, distributions).items()
    ]
    return tuple(sorted(importance, key=lambda row: -row.share))


def _shares(
    params: Sequence[dict[str, bool | int | float | str]],
    values: np.ndarray,
    distributions: dict[str, BaseDistribution],
) -> dict[str, float]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        create_trial(params=dict(own), distributions=distributions, value=float(value))
        for own, value in zip(params, values, strict=True)
    )
    # At least five trials must count as the best ones, says Optuna's documentation.
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(max(0.1, 5 / len(values)), 0.5))
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


# --- the search -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutcomeSummary:
    """Trials that came to one end."""

    outcome: str
    n: int
    mean_s: float
    total_s: float
    compile_s: float
    """Mean seconds of compiling, part of mean_s."""
    detail: str
    """Of the newest one, where it failed."""


@dataclass(frozen=True)
class SpaceCoverage:
    """How much of the feasible set was trained, for one width."""

    width: int
    feasible: int
    trained: int
    """Feasible shapes that were trained, each counted once."""
    depths: str
    """Feasible depths."""
    trained_depths: str
    unseen: str
    """Depth buckets with feasible shapes, none of which was trained."""


@dataclass(frozen=True)
class SearchSummary:
    """The search as a whole."""

    outcomes: tuple[OutcomeSummary, ...]
    finished: int
    wanted: int
    repeated_configs: tuple[tuple[int, ...], ...]
    """Trials that differ in nothing but their seed."""
    repeated_shapes: tuple[tuple[Shape, tuple[int, ...]], ...]
    """Shapes trained with several training values, most often first."""
    width_name: str
    """By which the coverage goes: d_model of an encoder."""
    coverage: tuple[SpaceCoverage, ...]
    shapes: tuple[Shape, ...]
    """All feasible shapes."""
    trained: int
    """How many of them were trained."""
    queued_off_grid: int
    """Trained shapes outside the candidates: they came from the queue."""
    wall_s: float
    """From the first start to the last end."""
    busy_s: float
    """Wall seconds, summed over trials."""
    machines: tuple[tuple[tuple[str, str], int], ...]
    """((host, device), trials)."""


def summarize(results: StudyResults, space: SearchSpace) -> SearchSummary:
    """Describe the search.

    Args:
        space: the study's own.
    """
    trials = results.records
    trained, feasible = {record.config.shape for record in trials}, set(space.shapes)
    starts = [datetime.datetime.fromisoformat(record.started) for record in trials]
    ends = [datetime.datetime.fromisoformat(record.finished) for record in trials]
    repeated_shapes = _repeated(trials, lambda record: record.config.shape)
    kind = family.of(results.spec.model)
    return SearchSummary(
        outcomes=tuple(_outcome(name, trials) for name, _ in Counter(r.outcome for r in trials).most_common()),
        finished=len(trials),
        wanted=results.spec.study.n_trials,
        repeated_configs=tuple(_repeated(trials, lambda record: search_space.trial_identity(record.config)).values()),
        repeated_shapes=tuple(sorted(repeated_shapes.items(), key=lambda pair: -len(pair[1]))),
        width_name=next(iter(kind.extents)),
        coverage=_coverage(kind, feasible, trained),
        shapes=space.shapes,
        trained=len(feasible & trained),
        queued_off_grid=len(trained - feasible),
        wall_s=(max(ends) - min(starts)).total_seconds(),
        busy_s=sum(record.wall_s for record in trials),
        machines=tuple(Counter((record.host or "unknown host", record.device) for record in trials).most_common()),
    )


def _outcome(name: str, trials: Sequence[TrialRecord]) -> OutcomeSummary:
    own = [record for record in trials if record.outcome == name]
    wall_s = [record.wall_s for record in own]
    return OutcomeSummary(
        outcome=name.replace("_", " "),
        n=len(own),
        mean_s=float(np.mean(wall_s)),
        total_s=float(np.sum(wall_s)),
        compile_s=float(np.mean([record.compile_s for record in own])),
        detail=own[-1].detail,
    )


def _repeated(trials: Sequence[TrialRecord], key: Callable[[TrialRecord], Any]) -> dict[Any, tuple[int, ...]]:
    """Key → the trials that have it, where there are several."""
    groups: dict[Any, tuple[int, ...]] = {}
    for record in trials:
        groups[key(record)] = (*groups.get(key(record), ()), record.trial_number)
    return {of: numbers for of, numbers in groups.items() if len(numbers) > 1}


def _coverage(kind: Family, feasible: set[Shape], trained: set[Shape]) -> tuple[SpaceCoverage, ...]:
    rows = []
    for width in sorted({kind.width(shape) for shape in feasible}):
        shapes = [shape for shape in feasible if kind.width(shape) == width]
        depths = [kind.depth(shape) for shape in shapes]
        trained_depths = [kind.depth(shape) for shape in shapes if shape in trained]
        unseen = {*map(depth_bucket, depths)} - {*map(depth_bucket, trained_depths)}
        rows.append(
            SpaceCoverage(
                width=width,
                feasible=len(depths),
                trained=len(trained_depths),
                depths=_span(depths),
                trained_depths=_span(trained_depths),
                unseen=", ".join(DEPTHS[i][1] for i in sorted(unseen)) or "–",
            )
        )
    return tuple(rows)


def _span(values: list[int]) -> str:
    if not values:
        return "–"
    return f"{min(values)} … {max(values)}" if min(values) < max(values) else str(values[0])
