"""Study analysis: all that a study's page shows, made from its folder and, where they are here, its prices.

The best trial's forecasts beside those of the best baselines: calibration and thresholds, intervals of returns,
volatility or direction, and what following them would have earned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fintx import tasks
from fintx.analysis import confirmation, patterns, predictions, scaling_laws, study_results, test_set
from fintx.analysis.confirmation import Confirmation
from fintx.analysis.patterns import Importance, Pattern, SearchSummary
from fintx.analysis.predictions import Rows
from fintx.analysis.scaling_laws import NotFitted, ScalingLaws
from fintx.analysis.study_results import StudyResults
from fintx.analysis.test_set import TestOpening
from fintx.data import datasets, sources
from fintx.data.bars import Bars
from fintx.data.datasets import PreparedData
from fintx.errors import FintxError
from fintx.evaluate import backtest, calibration, direction, metrics
from fintx.evaluate.backtest import DeflatedSharpe, Performance, StrategyReturns, TradingRules
from fintx.evaluate.calibration import BrierParts, PrecisionRecall, RecalibrationScore, ReliabilityBin, ThresholdRow
from fintx.evaluate.direction import CumulativeGain, MirrorTest, YearRow
from fintx.study import study_file
from fintx.study.search_space import SearchSpace
from fintx.tasks import Threshold
from fintx.types import Floats

_VOLATILITY = ("volatility_", "vix_", "garch_")
"""How the names of baselines begin that know volatility alone."""


@dataclass(frozen=True)
class CalibrationAnalysis:
    """Of the best trial and the best baseline, by name."""

    reliability: dict[str, tuple[ReliabilityBin, ...]]
    brier: dict[str, BrierParts]
    error: dict[str, float | None]
    """Calibration error."""
    recalibrated: tuple[RecalibrationScore, ...]
    """The best trial's, learnt on earlier rows and judged on later ones; empty where either part has one class."""
    by_folds: bool
    """Earlier and later are folds, not halves of the days."""
    precision_recall: dict[str, PrecisionRecall]
    """Empty where the event came always or never."""
    thresholds: tuple[ThresholdRow, ...]


@dataclass(frozen=True)
class IntervalCoverage:
    """What conformal intervals of the best trial's returns promised and held, over all assets."""

    method: str
    level: float
    covered: float
    median_width: float
    n: int


@dataclass(frozen=True)
class DirectionAnalysis:
    """Whether the best trial, and the best baseline that knows volatility alone, know the side of a move."""

    mirrors: dict[str, MirrorTest]
    """By name; empty where the prices are not here."""
    within_year: dict[str, float | None]
    """AUC among days of the same year."""
    years: tuple[YearRow, ...]
    volatility: str | None
    """That baseline's name."""
    gain: CumulativeGain | None
    """Of the best trial over it."""


@dataclass(frozen=True)
class BacktestAnalysis:
    """What following the best trial would have earned; or why that can't be said."""

    performances: tuple[Performance, ...] = ()
    """Its own first."""
    assumptions: tuple[str, ...] = ()
    deflated: DeflatedSharpe | None = None
    impossible: str = ""


@dataclass(frozen=True, eq=False)
class StudyAnalysis:
    """A study as its page shows it."""

    results: StudyResults
    label: str
    prepared: PreparedData | None
    """None where the study's data are not here."""
    data_missing: str
    """Why; else empty."""
    confirmation: Confirmation | None
    calibration: CalibrationAnalysis | None
    coverage: tuple[IntervalCoverage, ...]
    direction: DirectionAnalysis | None
    backtest: BacktestAnalysis | None
    shapes: tuple[Pattern, ...]
    values: tuple[Pattern, ...]
    importance: tuple[Importance, ...]
    search: SearchSummary
    scaling: ScalingLaws | NotFitted | None
    opening_log: tuple[dict[str, Any], ...]
    openings: tuple[TestOpening, ...]
    resolved: str
    """The whole sweep file."""


def read(folder: Path, *, data_root: Path, rules: TradingRules | None = None) -> StudyAnalysis:
    """Analyse the study in a folder.

    Args:
        rules: of the backtest; none: there is none.

    Raises:
        FintxError: no study, no finished trial, different labels, or a damaged file.
    """
    results = study_results.read(folder)
    spec = results.spec
    prepared, bars, missing = None, {}, ""
    try:
        prepared = datasets.build(spec, data_root)
        bars = sources.load_pinned(spec.data, spec.data.assets, data_root)
    except FintxError as error:
        prepared, missing = None, str(error).splitlines()[0]
    space = SearchSpace.build(spec, n_features=len(spec.data.features))
    resolved = folder / "resolved.toml"
    return StudyAnalysis(
        results=results,
        label=spec.task.rule.describe(),
        prepared=prepared,
        data_missing=missing,
        confirmation=confirmation.read(folder),
        calibration=_calibration(results),
        coverage=_coverage(results),
        direction=_direction(results, bars),
        backtest=None if rules is None else _backtest(results, bars, rules),
        shapes=patterns.by_shape(results) if results.ranked else (),
        values=patterns.by_values(results) if results.ranked else (),
        importance=patterns.ped_anova(results.records, space) if results.ranked else (),
        search=patterns.summarize(results, space),
        scaling=scaling_laws.of_siblings(results),
        opening_log=tuple(study_file.openings(folder)),
        openings=test_set.read_openings(folder),
        resolved=resolved.read_text() if resolved.is_file() else "resolved.toml is missing",
    )


def _beside(results: StudyResults, outputs: Floats, baseline: str | None) -> dict[str, Floats]:
    """The best trial's outputs and a baseline's, by name."""
    assert results.best is not None and results.rows is not None
    named = {f"trial {results.best.trial_number}": outputs}
    return named if baseline is None else named | {baseline: results.rows.baselines[baseline]}


def _calibration(results: StudyResults) -> CalibrationAnalysis | None:
    rows, outputs = results.rows, results.best_outputs
    if results.spec.task.predicts != "probability" or rows is None or outputs is None:
        return None
    forecasts = _beside(results, outputs, results.best_baseline)
    by_folds = len(np.unique(rows.fold)) > 1
    groups = rows.fold if by_folds else calibration.halves(rows.dates, horizon=rows.horizon)
    both = all(len(np.unique(rows.labels[part])) > 1 for part in (groups == 0, groups > 0))
    comes_and_goes = 0 < rows.labels.mean() < 1
    return CalibrationAnalysis(
        reliability={name: calibration.reliability(each, rows.labels) for name, each in forecasts.items()},
        brier={name: calibration.brier_parts(each, rows.labels) for name, each in forecasts.items()},
        error={name: metrics.calibration_error(each, rows.labels) for name, each in forecasts.items()},
        recalibrated=calibration.recalibrate_forward(outputs, rows.labels, groups) if both else (),
        by_folds=by_folds,
        precision_recall={
            name: calibration.precision_recall(each, rows.labels) for name, each in forecasts.items() if comes_and_goes
        },
        thresholds=tuple(calibration.threshold_table(outputs, rows.labels)) if comes_and_goes else (),
    )


def _coverage(results: StudyResults) -> tuple[IntervalCoverage, ...]:
    """For regression: conformal intervals learnt on the older half of the days, judged on the newer, by asset."""
    rows, outputs = results.rows, results.best_outputs
    if results.spec.task.predicts != "value" or rows is None or outputs is None:
        return ()
    half, found = calibration.halves(rows.dates, horizon=rows.horizon), []
    for level in (0.8, 0.9):
        for method in ("split", "adaptive"):
            covered, widths = [], []
            for asset in np.unique(rows.assets):
                early, late = (rows.assets == asset) & (half == 0), (rows.assets == asset) & (half == 1)
                if early.any() and late.any():
                    parts = outputs[early], rows.labels[early], outputs[late], rows.labels[late]
                    if method == "split":
                        intervals = calibration.split_intervals(*parts, level=level)
                    else:
                        intervals = calibration.adaptive_intervals(*parts, horizon=rows.horizon, level=level)
                    covered.append(intervals.covered)
                    widths.append(intervals.high - intervals.low)
            if covered:
                every, width = np.concatenate(covered), float(np.median(np.concatenate(widths)))
                found.append(IntervalCoverage(method, level, float(every.mean()), width, len(every)))
    return tuple(found)


# --- volatility or direction ------------------------------------------------------------------------------------------


def _direction(results: StudyResults, bars: Mapping[str, Bars]) -> DirectionAnalysis | None:
    rows, outputs, level = results.rows, results.best_outputs, results.spec.task.rule.level
    if level is None or rows is None or outputs is None:
        return None
    volatility = _best_volatility_baseline(results)
    forecasts, opposite = _beside(results, outputs, volatility), _opposite(rows, level, bars)
    mirrors, within_year = {}, {}
    if opposite is not None:
        for name, each in forecasts.items():
            mirrors[name] = direction.mirror_test(each, rows.labels, opposite, horizon=rows.horizon)
            within_year[name] = direction.within_year_auc(each, rows.labels, rows.dates)
    theirs = None if volatility is None else rows.baselines[volatility]
    gain = None
    if theirs is not None:
        mine, other = (metrics.per_sample_loss(rows.predicts, each, rows.labels) for each in (outputs, theirs))
        gain = direction.cumulative_gain(mine, other, rows.dates)
    years = direction.by_year(outputs, rows.labels, rows.dates, prior=_priors(results), baseline=theirs)
    return DirectionAnalysis(mirrors, within_year, tuple(years), volatility, gain)


def _best_volatility_baseline(results: StudyResults) -> str | None:
    if results.rows is None:
        return None
    names = [name for name in results.rows.baselines if name.startswith(_VOLATILITY)]
    best = predictions.best_baseline(results.rows, among=names)
    return None if best is None else best[0]


def _opposite(rows: Rows, level: Threshold, bars: Mapping[str, Bars]) -> Floats | None:
    """(S,) labels of the mirrored event on the validation rows; none where prices are missing."""
    opposite = np.full(len(rows.labels), np.nan)
    for symbol, asset_bars in bars.items():
        mine = rows.assets == symbol
        place = np.searchsorted(asset_bars.dates, rows.dates[mine])
        mirrored = tasks.mirror_labels(level, asset_bars)
        opposite[mine] = mirrored[np.minimum(place, len(asset_bars) - 1)]
    return opposite if np.isfinite(opposite).all() else None


def _priors(results: StudyResults) -> Floats:
    """(S,) training base rate of each row's fold."""
    assert results.rows is not None
    folds = results.baselines["prior"]["folds"]
    return np.array([folds[int(fold)]["prior"] for fold in results.rows.fold])


# --- the backtest -----------------------------------------------------------------------------------------------------


def _backtest(results: StudyResults, bars: Mapping[str, Bars], rules: TradingRules) -> BacktestAnalysis | None:
    """Follow the best trial, a volatility rule and the asset itself over the validation days, after costs."""
    rows, outputs, level = results.rows, results.best_outputs, results.spec.task.rule.level
    if rows is None or outputs is None or results.best is None:
        return None
    if level is None or not backtest.applies(level):
        return BacktestAnalysis(impossible="A backtest needs a threshold task whose target lies above the close.")
    if not bars:
        return BacktestAnalysis(impossible="The backtest needs the study's prices: give --data-dir.")
    returns = {n: _follow(results, of_seeds[0], bars, level, rules) for n, of_seeds in results.seed_outputs.items()}
    mine, volatility = returns[results.best.trial_number], _best_volatility_baseline(results)
    shown = {f"trial {results.best.trial_number}": mine}
    if volatility is not None:
        shown[volatility] = _follow(results, rows.baselines[volatility], bars, level, rules)
    shown["buy and hold"] = backtest.portfolio([backtest.buy_and_hold(each, mine, rules) for each in bars.values()])
    sharpes = [sharpe for each in returns.values() if (sharpe := backtest.sharpe(each.returns)) is not None]
    variance = float(np.var(sharpes, ddof=1)) if len(sharpes) > 1 else 0.0
    return BacktestAnalysis(
        performances=tuple(backtest.performance(name, each) for name, each in shown.items()),
        assumptions=tuple(backtest.assumptions(rules, level)),
        deflated=backtest.deflated_sharpe(mine.returns, n_trials=len(results.records), sharpe_variance=variance),
    )


def _follow(
    results: StudyResults, outputs: Floats, bars: Mapping[str, Bars], level: Threshold, rules: TradingRules
) -> StrategyReturns:
    """A yes where the probability reaches the training base rate of its fold; a panel's assets have equal shares."""
    rows = results.rows
    assert rows is not None
    yes, followed = metrics.sigmoid(outputs) >= _priors(results), []
    for symbol, asset_bars in bars.items():
        own = np.flatnonzero(rows.assets == symbol)
        own = own[np.argsort(rows.dates[own], kind="stable")]
        if len(own):
            followed.append(backtest.trade(asset_bars, rows.dates[own], yes[own], level, rules))
    return followed[0] if len(followed) == 1 else backtest.portfolio(followed)
