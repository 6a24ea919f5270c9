"""Study analysis: all that a study's page shows, made from its folder and, where they are here, its prices.

The best trial's forecasts beside those of the best baselines: calibration and thresholds, intervals of returns,
volatility or direction, and what following them would have earned.
"""

from __future__ import annotations

import functools
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
"""How the names of baselines begin that see volatility alone."""


@dataclass(frozen=True)
class CalibrationAnalysis:
    """The calibration of the best trial and of the best baseline, by name."""

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
    """The promised and the observed coverage of conformal intervals of the best trial's returns, over all assets."""

    method: str
    level: float
    covered: float
    median_width: float
    n: int


@dataclass(frozen=True)
class DirectionAnalysis:
    """Whether the best trial, and the best baseline that sees volatility alone, know the side of a move."""

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
    """The returns of following the best trial; or why there are none."""

    performances: tuple[Performance, ...] = ()
    """The strategy's own first, then those it is held against."""
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
    """Why the prices are not here; empty: they are."""
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


def _with_baseline(results: StudyResults, outputs: Floats, baseline: str | None) -> dict[str, Floats]:
    """The best trial's outputs and a baseline's, by name."""
    assert results.best is not None and results.rows is not None
    forecasts = {f"trial {results.best.trial_number}": outputs}
    return forecasts if baseline is None else forecasts | {baseline: results.rows.baselines[baseline]}


def _calibration(results: StudyResults) -> CalibrationAnalysis | None:
    rows, outputs = results.rows, results.best_outputs
    if results.spec.task.predicts != "probability" or rows is None or outputs is None:
        return None
    labels, forecasts = rows.labels, _with_baseline(results, outputs, results.best_baseline)
    by_folds = len(np.unique(rows.fold)) > 1
    groups = rows.fold if by_folds else calibration.halves(rows.dates, horizon=rows.horizon)
    both_classes = all(len(np.unique(labels[part])) > 1 for part in (groups == 0, groups > 0))
    comes_and_goes = 0 < labels.mean() < 1
    return CalibrationAnalysis(
        reliability={name: calibration.reliability(own, labels) for name, own in forecasts.items()},
        brier={name: calibration.brier_parts(own, labels) for name, own in forecasts.items()},
        error={name: metrics.calibration_error(own, labels) for name, own in forecasts.items()},
        recalibrated=calibration.recalibrate_forward(outputs, labels, groups) if both_classes else (),
        by_folds=by_folds,
        precision_recall={
            name: calibration.precision_recall(own, labels) for name, own in forecasts.items() if comes_and_goes
        },
        thresholds=tuple(calibration.threshold_table(outputs, labels)) if comes_and_goes else (),
    )


def _coverage(results: StudyResults) -> tuple[IntervalCoverage, ...]:
    """For regression: conformal intervals learnt on the older half of the days, judged on the newer, by asset."""
    rows, outputs = results.rows, results.best_outputs
    if results.spec.task.predicts != "value" or rows is None or outputs is None:
        return ()
    half = calibration.halves(rows.dates, horizon=rows.horizon)
    halves = [
        ((rows.assets == asset) & (half == 0), (rows.assets == asset) & (half == 1)) for asset in np.unique(rows.assets)
    ]
    parts = [
        (outputs[early], rows.labels[early], outputs[late], rows.labels[late])
        for early, late in halves if early.any() and late.any()
    ]  # fmt: skip
    adaptive = functools.partial(calibration.adaptive_intervals, horizon=rows.horizon)
    coverage = []
    for level in (0.8, 0.9) if parts else ():
        for method, intervals_of in (("split", calibration.split_intervals), ("adaptive", adaptive)):
            intervals = [intervals_of(*of_asset, level=level) for of_asset in parts]
            covered = np.concatenate([own.covered for own in intervals])
            width = np.median(np.concatenate([own.high - own.low for own in intervals]))
            coverage.append(IntervalCoverage(method, level, float(covered.mean()), float(width), len(covered)))
    return tuple(coverage)


# --- volatility or direction ------------------------------------------------------------------------------------------


def _direction(results: StudyResults, bars: Mapping[str, Bars]) -> DirectionAnalysis | None:
    rows, outputs, level = results.rows, results.best_outputs, results.spec.task.rule.level
    if level is None or rows is None or outputs is None:
        return None
    labels, dates, opposite = rows.labels, rows.dates, _opposite(rows, level, bars)
    volatility = _best_volatility_baseline(results)
    mirrors, within_year = {}, {}
    if opposite is not None:
        for name, own in _with_baseline(results, outputs, volatility).items():
            mirrors[name] = direction.mirror_test(own, labels, opposite, horizon=rows.horizon)
            within_year[name] = direction.within_year_auc(own, labels, dates)
    baseline = None if volatility is None else rows.baselines[volatility]
    gain = None
    if baseline is not None:
        best_losses, losses = (metrics.per_sample_loss(rows.predicts, o, labels) for o in (outputs, baseline))
        gain = direction.cumulative_gain(best_losses, losses, dates)
    years = direction.by_year(outputs, labels, dates, prior=_priors(results), baseline=baseline)
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
        inside = rows.assets == symbol
        days = np.searchsorted(asset_bars.dates, rows.dates[inside])
        opposite[inside] = tasks.mirror_labels(level, asset_bars)[np.minimum(days, len(asset_bars) - 1)]
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
    best, volatility = returns[results.best.trial_number], _best_volatility_baseline(results)
    strategies = {f"trial {results.best.trial_number}": best}
    if volatility is not None:
        strategies[volatility] = _follow(results, rows.baselines[volatility], bars, level, rules)
    strategies["buy and hold"] = backtest.portfolio([backtest.buy_and_hold(own, best, rules) for own in bars.values()])
    sharpes = [sharpe for own in returns.values() if (sharpe := backtest.sharpe(own.returns)) is not None]
    variance = float(np.var(sharpes, ddof=1)) if len(sharpes) > 1 else 0.0
    return BacktestAnalysis(
        performances=tuple(backtest.performance(name, own) for name, own in strategies.items()),
        assumptions=tuple(backtest.assumptions(rules, level)),
        deflated=backtest.deflated_sharpe(best.returns, n_trials=len(results.records), sharpe_variance=variance),
    )


def _follow(
    results: StudyResults, outputs: Floats, bars: Mapping[str, Bars], level: Threshold, rules: TradingRules
) -> StrategyReturns:
    """A yes where the probability reaches the training base rate of its fold; a panel's assets have equal shares."""
    rows = results.rows
    assert rows is not None
    yes, by_asset = metrics.sigmoid(outputs) >= _priors(results), []
    for symbol, asset_bars in bars.items():
        own = np.flatnonzero(rows.assets == symbol)
        own = own[np.argsort(rows.dates[own], kind="stable")]
        if len(own):
            by_asset.append(backtest.trade(asset_bars, rows.dates[own], yes[own], level, rules))
    return by_asset[0] if len(by_asset) == 1 else backtest.portfolio(by_asset)
