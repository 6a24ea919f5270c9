"""Study page: what `just report` writes, one page on one study, finished or not, for someone who didn't run it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fintx.analysis.study_analysis import (
    BacktestAnalysis,
    CalibrationAnalysis,
    DirectionAnalysis,
    IntervalCoverage,
    StudyAnalysis,
)
from fintx.analysis.study_results import StudyResults
from fintx.evaluate import significance
from fintx.evaluate.direction import MirrorTest
from fintx.report import figures, format, search_page
from fintx.report.figures import ForestRow
from fintx.report.format import number, percent, shape_words
from fintx.report.page import Block, Page, Prose, Section, Text
from fintx.report.scaling_page import siblings_section
from fintx.report.table import Score, Table, confirmation_tables, data_tables, opening_table, score_table

_N_FOREST = 8
"""Unconfirmed trials in the forest plot."""


def build(analysis: StudyAnalysis) -> Page:
    """The page, to be written to outputs/<study>/report."""
    results = analysis.results
    answer, tone = format.study_verdict(results, analysis.confirmation)
    sections = [
        _question_section(analysis),
        _baseline_section(results),
        _confirmation_section(analysis),
        _direction_section(analysis.direction, results),
        _calibration_section(analysis.calibration),
        _interval_section(analysis.coverage),
        _backtest_section(analysis.backtest, results),
        search_page.progress_section(results, analysis.search.shapes),
        search_page.patterns_section(analysis),
        siblings_section(analysis.scaling),
        search_page.outcomes_section(analysis),
        _test_section(analysis),
        _origin_section(analysis),
    ]
    return Page(
        folder=results.folder / "report",
        title=results.name,
        kicker=f"fintx report · {analysis.label}",
        question=results.spec.study.question,
        answer=answer,
        tone=tone,
        warnings=_warnings(results),
        facts=_facts(results),
        sections=tuple(section for section in sections if section is not None),
    )


def _warnings(results: StudyResults) -> tuple[str, ...]:
    warnings, finished, n_trials = [], len(results.records), results.spec.study.n_trials
    if finished < n_trials:
        warnings.append(f"The study is unfinished: {finished} of {n_trials} trials. The report covers these.")
    if results.best is not None and (doubt := significance.leakage_warning(results.best.best)) is not None:
        warnings.append(doubt)
    return (*warnings, *results.notes)


def _facts(results: StudyResults) -> tuple[tuple[str, str], ...]:
    """The figures in a row below the answer."""
    best, baseline, interval = results.best, results.best_baseline, results.skill_interval
    facts = [("trials", f"{len(results.records)} of {results.spec.study.n_trials}")]
    if best is None:
        return tuple(facts)
    skill = format.percent_interval(interval) if interval else percent(results.skill(best.best))
    facts += [(f"best {format.metric_words(results.metric)}", number(best.value)), ("its skill over the prior", skill)]
    if baseline is not None:
        scores = results.baselines[baseline]["metrics"]
        value = f"{number(scores.get(results.metric))} ({percent(results.skill(scores))})"
        facts.append((f"best baseline, {baseline}", value))
    return *facts, ("best shape", shape_words(best.config.shape)), ("parameters", f"{best.param_count:,}")


def _question_section(analysis: StudyAnalysis) -> Section:
    blocks: list[Block] = [Prose(f"Label: {analysis.label}")]
    if analysis.prepared is not None:
        blocks += data_tables(analysis.prepared)
    else:
        note = (
            f"The study's data are not here ({analysis.data_missing}): the tables come from the records alone; give "
            "--data-dir."
        )
        blocks += [Prose(note, "note"), _recorded_split_table(analysis.results)]
    return Section("asked", "The question, and the days", tuple(blocks))


def _recorded_split_table(results: StudyResults) -> Table:
    """Sizes of the parts and the days of validation, without the study's data."""
    rows, folds = results.rows, results.records[0].folds
    lines: list[tuple[object, ...]] = []
    for index, fold in enumerate(folds):
        suffix = f" {index + 1}" if len(folds) > 1 else ""
        days = np.array([], "datetime64[D]") if rows is None else rows.dates[rows.fold == index]
        first, last = (str(days.min()), str(days.max())) if len(days) else (None, None)
        lines.append((f"train{suffix}", None, first, fold.n_train))
        lines.append((f"validation{suffix}", first, last, fold.n_validation))
    return Table("split", "Split", ["part", "from", "to", ("n", "whole")], lines)


def _baseline_section(results: StudyResults) -> Section:
    """The best trial and every baseline on the same rows; gains with intervals."""
    best, sign = results.best, 1 if results.minimize else -1
    rows = (
        []
        if best is None
        else [Score(f"best trial ({best.trial_number})", best.best, None, shape_words(best.config.shape))]
    )
    ordered = sorted(results.baselines.items(), key=lambda pair: sign * (pair[1]["metrics"].get(results.metric) or 0.0))
    rows += [Score(name, stored["metrics"], results.gain(name), stored["words"]) for name, stored in ordered]
    table = score_table(
        "baselines", f"On the same {number(best.best.get('n') if best else None)} validation rows", rows,
        metric=results.metric, gain="trial's gain", what=True, marked=(0,) if best else (),
        note=f"The trial's gain over each baseline is in {format.metric_words(results.metric)}; its interval resamples "
        "days in blocks. The best trial was chosen on these rows; the baselines were not.",
    )  # fmt: skip
    return Section("baselines", "The best trial and the baselines", (table,))


def _confirmation_section(analysis: StudyAnalysis) -> Section:
    """The best trials trained again, or else what the search alone shows of them."""
    confirmation, results = analysis.confirmation, analysis.results
    unit, rows = format.metric_words(results.metric), []
    if confirmation is not None and any(candidate.verdict for candidate in confirmation.candidates):
        for candidate in confirmation.candidates:
            if candidate.verdict is not None:
                label = f"trial {candidate.trial} · {format.shape_label(candidate.shape)}"
                rows.append(ForestRow(label, candidate.verdict.gain, candidate.verdict.confirmed))
                if candidate.ensemble is not None:
                    gain = candidate.ensemble.gain
                    rows.append(ForestRow("its ensemble", gain, gain.positive))
        forest = figures.plot_forest(
            rows, baseline=confirmation.baseline, unit=unit, title="Confirmation",
            caption=f"Mean gain of each candidate, trained again with {len(confirmation.seeds)} fresh seeds, "
            f"with its {format.level_words(confirmation)} interval over other days and seeds; green: confirmed.",
        )  # fmt: skip
        verdict = Prose((format.confirmation_verdict(confirmation), *format.confirmation_details(confirmation)))
        return Section("confirmation", "Confirmation", (verdict, forest, *confirmation_tables(confirmation)))
    note = (
        f"Nothing is confirmed yet: `just confirm {results.name}` trains the best trials again with fresh seeds. "
        "Below are the search's own figures, which include the luck of having been chosen."
    )
    blocks: list[Block] = [Prose(note, "note")]
    for record in results.ranked[:_N_FOREST]:
        if (gained := results.gain(results.best_baseline, record.trial_number)) is not None:
            label = f"trial {record.trial_number} · {format.shape_label(record.config.shape)}"
            rows.append(ForestRow(label, gained, gained.positive))
    if rows and results.best_baseline is not None:
        title = "The best trials against the best baseline, unconfirmed"
        caption = "Mean gain with its 95 % interval over other days; green where the interval lies above zero."
        blocks.append(
            figures.plot_forest(rows, baseline=results.best_baseline, unit=unit, title=title, caption=caption)
        )
    return Section("confirmation", "Confirmation", tuple(blocks))


# --- volatility or direction ------------------------------------------------------------------------------------------


def _direction_section(direction: DirectionAnalysis | None, results: StudyResults) -> Section | None:
    """For threshold tasks: the mirror test, years, and the gain over volatility through time."""
    if direction is None or results.best is None:
        return None
    trial, volatility, gain = f"trial {results.best.trial_number}", direction.volatility, direction.gain
    blocks: list[Block] = [Prose("The mirror test needs the study's prices: give --data-dir.", "note")]
    if direction.mirrors:
        mirrors = Table(
            "mirror", "Mirror test",
            ["", ("event AUC", "number"), ("opposite AUC", "number"), ("base rate", "percent"),
             ("opposite rate", "percent"), ("one-sided rows", "whole"), ("which-side AUC", "number"), ("SE", "number"),
             ("within-year AUC", "number")],
            [
                (name, m.auc, m.opposite_auc, m.base_rate, m.opposite_rate, m.one_sided, m.direction_auc,
                 m.direction_se, direction.within_year[name])
                for name, m in direction.mirrors.items()
            ],
            note="Within-year AUC compares only days of the same year, so that telling wild years from calm ones "
            "counts for nothing.",
        )  # fmt: skip
        blocks = [Prose(mirror_words(direction.mirrors[trial])), mirrors]
    blocks.append(
        Table(
            "by_year", "By year",
            ["year", ("rows", "whole"), ("base rate", "percent"), ("log loss", "number"), ("skill", "percent"),
             ("AUC", "number"), (f"nats per row saved against {volatility}", "number")],
            [(str(y.year), y.n, y.base_rate, y.log_loss, y.skill, y.auc, y.gain) for y in direction.years],
        )
    )  # fmt: skip
    if gain is not None:
        if gain.best_year_share is not None:
            blocks.append(
                Prose(
                    f"The best year brought {percent(gain.best_year_share)} of the whole gain over {volatility} "
                    f"({number(gain.total, 2)} nats); the deepest fall from a peak was {number(gain.deepest_fall, 2)} "
                    "nats."
                )
            )
        blocks.append(figures.plot_cumulative_gain(gain.dates, gain.gain, name=trial, against=str(volatility)))
    return Section("direction", "Volatility or direction", tuple(blocks))


def mirror_words(mirror: MirrorTest) -> str:
    """Whether probabilities know the side of a move, or only its size."""
    if mirror.auc is None or mirror.opposite_auc is None or mirror.direction_auc is None:
        return "One of the two events never happened: nothing can be said about direction."
    se = mirror.direction_se
    verdict = "more than chance" if mirror.knows_direction else "no knowledge of direction is shown"
    error = f" ± {1.96 * se:.3f} (95 %)" if se is not None else ""
    return (
        f"The same probabilities score the opposite event at AUC {mirror.opposite_auc:.3f}, the event itself at "
        f"{mirror.auc:.3f}. On the {mirror.one_sided:,} rows where exactly one side was touched, they tell which one "
        f"with AUC {mirror.direction_auc:.3f}{error}, where 0.5 is chance: {verdict}."
    )


# --- calibration, intervals, backtest ---------------------------------------------------------------------------------


def _calibration_section(calibration: CalibrationAnalysis | None) -> Section | None:
    """Reliability, Brier parts, recalibration judged on later rows, precision and recall, thresholds."""
    if calibration is None:
        return None
    brier = Table(
        "brier", "Calibration error, and the parts of the Brier score",
        ["", ("calibration error", "number"), ("Brier", "number"), ("= reliability", "number"),
         ("− resolution", "number"), ("+ uncertainty", "number"), ("+ within bins", "number")],
        [
            (name, calibration.error[name], p.brier, p.reliability, p.resolution, p.uncertainty, p.within)
            for name, p in calibration.brier.items()
        ],
        note="Reliability: how far predicted probabilities lie from observed frequencies; less is better. Resolution: "
        "how well days are told apart; more is better.",
    )  # fmt: skip
    blocks: list[Block] = [figures.plot_reliability(calibration.reliability), brier]
    if calibration.recalibrated:
        parts = "earlier folds, judged on the next" if calibration.by_folds else (
            "the older half of the validation days, judged on the newer")  # fmt: skip
        blocks.append(
            Table(
                "recalibration", "Would recalibration help?",
                ["recalibration", ("log loss", "number"), ("Brier", "number"), ("calibration error", "number"),
                 ("rows", "whole")],
                [(r.method, r.log_loss, r.brier, r.calibration_error, r.n) for r in calibration.recalibrated],
                note=f"Fitted on {parts}.",
            )
        )  # fmt: skip
    if calibration.precision_recall:
        thresholds = Table(
            "thresholds", "Thresholds",
            ["above the quantile", ("probability ≥", "number"), ("predicted", "whole"), ("precision", "percent"),
             "95 % interval", ("recall", "percent"), ("lift over base rate", "number"), "interval"],
            [
                (f"{100 * t.decile:.0f} %", t.threshold, t.predicted, t.precision.value,
                 format.percent_span(t.precision.low, t.precision.high), t.recall.value, t.lift,
                 f"{t.lift_low:.2f} … {t.lift_high:.2f}")
                for t in calibration.thresholds
            ],
            note="Wilson intervals, as if rows were independent.",
        )  # fmt: skip
        blocks += [figures.plot_precision_recall(calibration.precision_recall), thresholds]
    return Section("calibration", "Calibration and decisions", tuple(blocks))


def _interval_section(coverage: Sequence[IntervalCoverage]) -> Section | None:
    """For regression: conformal intervals."""
    if not coverage:
        return None
    table = Table(
        "conformal", "Conformal intervals",
        ["method", ("nominal coverage", "percent"), ("observed coverage", "percent"),
         ("median width (log return)", "number"), ("rows", "whole")],
        [(row.method, row.level, row.covered, row.median_width, row.n) for row in coverage],
        note="Fitted on the older half of the validation days, judged on the newer, asset by asset.",
    )  # fmt: skip
    method = "Split: one width for all days. Adaptive: the width grows after misses, so that coverage recovers."
    return Section("intervals", "Intervals", (Prose(method), table))


def _backtest_section(backtest: BacktestAnalysis | None, results: StudyResults) -> Section | None:
    if backtest is None:
        return None
    if backtest.impossible:
        return Section("backtest", "Backtest", (Prose(backtest.impossible, "note"),))
    table = Table(
        "backtest", "After costs, on the validation days",
        ["", ("trades", "whole"), ("won", "percent"), ("days invested", "percent"), ("return a year", "percent"),
         ("volatility a year", "percent"), ("Sharpe", "number"), ("deepest fall", "percent")],
        [
            (p.name, p.trades, p.win_rate, p.exposure, p.annual_return, p.annual_volatility, p.sharpe, p.max_drawdown)
            for p in backtest.performances
        ],
        marked=(0,),
    )  # fmt: skip
    sharpe = Prose("The trial never traded: there is no Sharpe ratio to judge.", "note")
    if (deflated := backtest.deflated) is not None:
        verdict = "evidence of more than luck" if deflated.probability > 0.95 else "no evidence of more than luck"
        sharpe = Prose(
            f"Deflated Sharpe ratio, with all {len(results.records)} trials counted: {percent(deflated.probability)} "
            f"that the true one is above {deflated.threshold:.2f} a year, which the best of so many worthless trials "
            f"shows: {verdict}."
        )
    assumptions = Prose("Assumptions:"), Prose(backtest.assumptions)
    return Section("backtest", "Backtest", (*assumptions, table, sharpe))


# --- the sealed test, the origin --------------------------------------------------------------------------------------


def _test_section(analysis: StudyAnalysis) -> Section:
    """Every opening of the sealed test part, and its results."""
    log = analysis.opening_log
    if not log:
        return Section("test", "The sealed test", (Prose("The sealed test part has never been opened."),))
    rows = [
        (str(i + 1), entry.get("opened"), ", ".join(entry.get("models", [])) or None,
         {None: None, True: "yes", False: "no"}[entry.get("confirmed")])
        for i, entry in enumerate(log)
    ]  # fmt: skip
    text = f"The sealed test part was opened {'once' if len(log) == 1 else f'{len(log)} times'}."
    if len(log) > 1:
        text += " From the second time on it is no longer a test: if you look again, you can choose by it."
    blocks: list[Block] = [Prose(text), Table("openings", "Openings", ["", "opened", "for", "confirmed"], rows)]
    for opening in analysis.openings:
        blocks += [opening_table(opening), Prose(tuple(map(format.as_sentence, opening.notes)), "note")]
    return Section("test", "The sealed test", tuple(blocks))


def _origin_section(analysis: StudyAnalysis) -> Section:
    """The resolved sweep file, the environment, and where the records are."""
    results, records = analysis.results, analysis.results.records
    libraries = dict.fromkeys(name for record in records for name in record.libraries)
    values = {name: [record.libraries.get(name, "–") for record in records] for name in libraries}
    values["device"] = [record.device for record in records]
    values["commit"] = [(record.git_commit or "not from a checkout")[:19] for record in records]
    rows = [(name, format.listed(list(dict.fromkeys(versions)))) for name, versions in values.items()]
    text = f"Records: {results.folder}/trials/*/record.json. Definition hash {results.study.definition_hash[:16]}."
    blocks = (
        Table("environment", "Environment", ["what", "version"], rows),
        Text("The whole sweep file, resolved", analysis.resolved),
        Prose(text, "note"),
    )
    return Section("origin", "File and environment", blocks)
