"""What does a report say of a forecast's use? Calibration and thresholds, intervals of returns, and a backtest."""

from __future__ import annotations

import numpy as np

from fintx.data.bars import Bars
from fintx.evaluate import backtest, calibration, conformal, decisions, metrics
from fintx.evaluate.backtest import Ledger, Rules
from fintx.report import figures_evidence, sheet
from fintx.report.evidence import Evidence
from fintx.report.page import Block, Prose, Section
from fintx.report.sections_evidence import volatility_rival
from fintx.report.sheet import Format, Sheet
from fintx.report.words import percent
from fintx.tasks import Threshold
from fintx.types import Floats


def calibration_section(evidence: Evidence) -> Section | None:
    """Reliability, Brier parts, scaling judged on later rows, precision and recall, thresholds."""
    best, rows = evidence.best, evidence.rows
    if (
        evidence.spec.task.predicts != "probability"
        or best is None
        or rows is None
        or best.trial_number not in evidence.outputs
    ):
        return None
    outputs, name = evidence.outputs[best.trial_number], f"trial {best.trial_number}"
    forecasts = {name: outputs} | ({evidence.rival: rows.baselines[evidence.rival]} if evidence.rival else {})
    curves = {words: calibration.reliability(each, rows.labels) for words, each in forecasts.items()}
    blocks: list[Block] = [
        figures_evidence.reliability(curves),
        _brier(evidence, forecasts),
        *_scaled(evidence, outputs),
    ]
    if 0 < rows.labels.mean() < 1:
        found = {words: decisions.precision_recall(each, rows.labels) for words, each in forecasts.items()}
        blocks += [figures_evidence.precision_recall(found), _thresholds(outputs, rows.labels)]
    return Section("calibration", "Calibration and decisions", tuple(blocks))


def _brier(evidence: Evidence, forecasts: dict[str, Floats]) -> Sheet:
    assert evidence.rows is not None
    rows = []
    for name, each in forecasts.items():
        parts = calibration.brier_parts(each, evidence.rows.labels)
        error = metrics.calibration_error(each, evidence.rows.labels)
        rows.append((name, error, parts.brier, parts.reliability, parts.resolution, parts.uncertainty, parts.within))
    columns: list[tuple[str, Format]] = [
        ("", "text"), ("calibration error", "number"), ("Brier", "number"), ("= reliability", "number"),
        ("− resolution", "number"), ("+ uncertainty", "number"), ("+ within bins", "number"),
    ]  # fmt: skip
    note = "Reliability: how far what is said lies from what came, less is better. Resolution: how far days are parted."
    return sheet.of("brier", "Calibration error, and the Brier score in parts", columns, rows, note=note)


def _scaled(evidence: Evidence, outputs: Floats) -> list[Block]:
    """Temperature and isotonic scaling, learnt on earlier rows and judged on later ones."""
    rows = evidence.rows
    assert rows is not None
    groups = rows.fold if len(np.unique(rows.fold)) > 1 else calibration.halves(rows.dates, horizon=rows.horizon)
    early, late = rows.labels[groups == 0], rows.labels[groups > 0]
    if any(len(np.unique(part)) < 2 for part in (early, late)):
        return []
    found = calibration.recalibrate_forward(outputs, rows.labels, groups)
    columns: list[tuple[str, Format]] = [
        ("scaling", "text"),
        ("log loss", "number"),
        ("Brier", "number"),
        ("calibration error", "number"),
        ("rows", "whole"),
    ]
    made = [(each.method, each.log_loss, each.brier, each.calibration_error, each.n) for each in found]
    what = (
        "earlier folds, judged on the next"
        if len(np.unique(rows.fold)) > 1
        else "the older half of the validation days, judged on the newer"
    )  # noqa: E501
    return [sheet.of("recalibration", "Would recalibration help?", columns, made, note=f"Learnt on {what}.")]


def _thresholds(outputs: Floats, labels: Floats) -> Sheet:
    rows = [
        (f"{100 * t.decile:.0f} %", t.threshold, t.predicted, t.precision.value,
         f"{100 * t.precision.low:.1f} … {100 * t.precision.high:.1f} %", t.recall.value, t.lift,
         f"{t.lift_low:.2f} … {t.lift_high:.2f}")
        for t in decisions.threshold_table(outputs, labels)
    ]  # fmt: skip
    columns: list[tuple[str, Format]] = [
        ("above the decile", "text"), ("probability ≥", "number"), ("calls", "whole"), ("precision", "percent"),
        ("95 % interval", "text"), ("recall", "percent"), ("lift over base rate", "number"), ("interval", "text"),
    ]  # fmt: skip
    return sheet.of("thresholds", "Thresholds", columns, rows, note="Wilson intervals of independent rows.")


# --- intervals of returns ---------------------------------------------------------------------------------------------


def interval_section(evidence: Evidence) -> Section | None:
    """For regression: conformal intervals learnt on the older half of the validation days, judged on the newer."""
    best, rows = evidence.best, evidence.rows
    if evidence.spec.task.predicts != "value" or best is None or rows is None:
        return None
    if best.trial_number not in evidence.outputs:
        return None
    outputs, half = evidence.outputs[best.trial_number], calibration.halves(rows.dates, horizon=rows.horizon)
    assets = np.asarray(rows.key["asset"].to_pylist())
    made: list[tuple[object, ...]] = []
    for level in (0.8, 0.9):
        for method in ("split", "adaptive"):
            covered, widths = [], []
            for asset in np.unique(assets):
                early, late = (assets == asset) & (half == 0), (assets == asset) & (half == 1)
                if early.any() and late.any():
                    found = _conformal(method, outputs, rows.labels, early, late, level=level, horizon=rows.horizon)
                    covered.append(found.covered)
                    widths.append(found.high - found.low)
            if covered:
                every = np.concatenate(covered)
                made.append((method, level, float(every.mean()), float(np.median(np.concatenate(widths))), len(every)))
    if not made:
        return None
    columns: list[tuple[str, Format]] = [
        ("method", "text"), ("promised", "percent"), ("held", "percent"), ("median width (log return)", "number"),
        ("rows", "whole"),
    ]  # fmt: skip
    note = "Learnt on the older half of the validation days, judged on the newer, asset by asset."
    words = "Split: one width for all days. Adaptive: the width follows the misses, so that coverage comes back."
    table = sheet.of("conformal", "Conformal intervals", columns, made, note=note)
    return Section("intervals", "Intervals", (Prose(words), table))


def _conformal(
    method: str, outputs: Floats, targets: Floats, early: np.ndarray, late: np.ndarray, *, level: float, horizon: int
) -> conformal.Intervals:
    parts = outputs[early], targets[early], outputs[late], targets[late]
    if method == "split":
        return conformal.split_intervals(*parts, level=level)
    return conformal.adaptive_intervals(*parts, horizon=horizon, level=level)


# --- the backtest -----------------------------------------------------------------------------------------------------


def backtest_section(evidence: Evidence, bars: dict[str, Bars], rules: Rules) -> Section | None:
    """Follow the best trial, a volatility rule and the asset itself over the validation days, after costs."""
    best, level = evidence.best, evidence.spec.task.rule.level
    title = "Backtest"
    if best is None or best.trial_number not in evidence.outputs:
        return None
    if level is None or not backtest.applies(level):
        words = "A backtest needs a threshold task whose target lies above the close."
        return Section("backtest", title, (Prose(words, "note"),))
    if not bars:
        words = "The backtest needs the study's prices: give --data-dir."
        return Section("backtest", title, (Prose(words, "note"),))
    assert evidence.rows is not None
    rival = volatility_rival(evidence)
    ledgers = {number: _follow(evidence, outputs, bars, level, rules) for number, outputs in evidence.outputs.items()}
    mine = ledgers[best.trial_number]
    shown = {f"trial {best.trial_number}": mine}
    if rival is not None:
        shown[rival] = _follow(evidence, evidence.rows.baselines[rival], bars, level, rules)
    shown["buy and hold"] = backtest.portfolio([backtest.buy_and_hold(held, mine, rules) for held in bars.values()])
    performances = [backtest.performance(name, ledger) for name, ledger in shown.items()]
    columns: list[tuple[str, Format]] = [
        ("", "text"), ("trades", "whole"), ("won", "percent"), ("days in", "percent"), ("return a year", "percent"),
        ("volatility a year", "percent"), ("Sharpe", "number"), ("deepest fall", "percent"),
    ]  # fmt: skip
    made = [
        (p.name, p.trades, p.win_rate, p.exposure, p.annual_return, p.annual_volatility, p.sharpe, p.max_drawdown)
        for p in performances
    ]
    table = sheet.of("backtest", "After costs, on the validation days", columns, made, marked=(0,))
    taken = Prose(tuple(backtest.assumptions(rules, level)))
    return Section(
        "backtest", title, (Prose("What is taken for granted:"), taken, table, _deflated(evidence, ledgers, mine))
    )


def _follow(evidence: Evidence, outputs: Floats, bars: dict[str, Bars], level: Threshold, rules: Rules) -> Ledger:
    """A yes where the probability reaches the training base rate of its fold; a panel's assets have equal shares."""
    rows = evidence.rows
    assert rows is not None
    priors = np.array([evidence.baselines["prior"]["folds"][int(fold)]["prior"] for fold in rows.fold])
    yes = metrics.sigmoid(outputs) >= priors
    assets = np.asarray(rows.key["asset"].to_pylist())
    ledgers = []
    for symbol, held in bars.items():
        own = np.flatnonzero(assets == symbol)
        own = own[np.argsort(rows.dates[own], kind="stable")]
        if len(own):
            ledgers.append(backtest.trade(held, rows.dates[own], yes[own], level, rules))
    return ledgers[0] if len(ledgers) == 1 else backtest.portfolio(ledgers)


def _deflated(evidence: Evidence, ledgers: dict[int, Ledger], mine: Ledger) -> Prose:
    """The best trial's Sharpe ratio, with all trials counted."""
    known = [each for each in (backtest.sharpe(ledger.returns) for ledger in ledgers.values()) if each is not None]
    n_trials = len(evidence.records)
    variance = float(np.var(known, ddof=1)) if len(known) > 1 else 0.0
    found = backtest.deflated_sharpe(mine.returns, n_trials=n_trials, sharpe_variance=variance)
    if found is None:
        return Prose("The trial never traded: there is no Sharpe ratio to judge.", "note")
    verdict = "evidence of more than luck" if found.probability > 0.95 else "no evidence of more than luck"
    return Prose(
        f"Deflated Sharpe ratio, with all {n_trials} trials counted: {percent(found.probability)} that the true one is "
        f"above {found.threshold:.2f} a year, which the best of so many worthless trials shows: {verdict}."
    )
