"""Study page: what `just report` writes, one page on one study, as far as it is, for a person who didn't run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from fintx.report import figures, format, page, search_page
from fintx.report.figures import Interval
from fintx.report.format import number, percent, shape_words
from fintx.report.page import Block, Page, Prose, Section, Text
from fintx.report.scaling_page import siblings_section
from fintx.report.table import Score, Table, confirmation_tables, data_tables, make, opening_table, scores

_FOREST = 8
"""Unconfirmed trials in the forest plot."""


def write(analysis: StudyAnalysis) -> Path:
    """Write outputs/<study>/report/.

    Returns:
        The page.

    Raises:
        FintxError: no room on the disk.
    """
    return page.write(build(analysis), analysis.results.folder / "report")


def build(analysis: StudyAnalysis) -> Page:
    """The page as a value."""
    results = analysis.results
    answer, tone = format.study_verdict(results, analysis.confirmation)
    sections = [
        _asked(analysis),
        _baselines(results),
        _confirmation(analysis),
        _direction(analysis.direction, results),
        _calibration(analysis.calibration),
        _coverage(analysis.coverage),
        _backtest(analysis.backtest, results),
        *search_page.sections(analysis),
        siblings_section(analysis.scaling),
        search_page.outcomes(analysis),
        _test(analysis),
        _origin(analysis),
    ]
    return Page(
        title=results.name,
        kicker=f"fintx report · {analysis.label}",
        question=results.spec.study.question,
        answer=answer,
        tone=tone,
        warnings=_warnings(results),
        facts=_facts(results),
        sections=tuple(section for section in sections if section is not None),
        footer=page.footer(),
    )


def _warnings(results: StudyResults) -> tuple[str, ...]:
    warnings, finished, wanted = [], len(results.records), results.spec.study.n_trials
    if finished < wanted:
        unfinished = f"The study is unfinished: {finished} of {wanted} trials."
        warnings.append(f"{unfinished} Everything here is as far as it goes.")
    if results.best is not None and (doubt := significance.leakage_warning(results.best.best)) is not None:
        warnings.append(doubt)
    return (*warnings, *results.notes)


def _facts(results: StudyResults) -> tuple[tuple[str, str], ...]:
    """The figures in a row below the answer."""
    best, baseline = results.best, results.best_baseline
    facts = [("trials", f"{len(results.records)} of {results.spec.study.n_trials}")]
    if best is None:
        return tuple(facts)
    interval = results.skill_interval
    skill = format.share_interval(interval) if interval else percent(results.skill(best.best))
    facts += [
        (f"best {format.metric_words(results.spec.study.metric)}", number(best.value)),
        ("its skill over the prior", skill),
    ]
    if baseline is not None:
        scored = results.baselines[baseline]["metrics"]
        value = f"{number(scored.get(results.metric))} ({percent(results.skill(scored))})"
        facts.append((f"best baseline, {baseline}", value))
    facts += [
        ("best shape", f"{best.d_model} × {best.n_layers}, {best.n_heads} heads"),
        ("parameters", f"{best.param_count:,}"),
    ]
    return tuple(facts)


def _asked(analysis: StudyAnalysis) -> Section:
    blocks: list[Block] = [Prose(f"Label: {analysis.label}")]
    if analysis.prepared is not None:
        blocks += data_tables(analysis.prepared)
    else:
        note = f"The study's data are not here ({analysis.data_missing}): tables from the records alone; give "
        blocks += [Prose(f"{note}--data-dir.", "note"), _split_of_records(analysis.results)]
    return Section("asked", "What was asked, on which days", tuple(blocks))


def _split_of_records(results: StudyResults) -> Table:
    """Sizes of the parts, and the validation's days."""
    rows, folds, lines = results.rows, results.records[0].folds, []
    for index, fold in enumerate(folds):
        name = f" {index + 1}" if len(folds) > 1 else ""
        days = np.array([], "datetime64[D]") if rows is None else rows.dates[rows.fold == index]
        first, last = (str(days.min()), str(days.max())) if len(days) else ("–", "–")
        lines += [
            (f"train{name}", "–", first, fold.n_train),
            (f"validation{name}", first, last, fold.n_validation),
        ]
    return make("split", "Split", ["part", "from", "to", ("n", "whole")], lines)


def _baselines(results: StudyResults) -> Section:
    """The best trial and every baseline on the same rows; gains with intervals."""
    best = results.best
    rows = [] if best is None else [Score(f"best trial ({best.trial_number})", best.best, None, shape_words(best))]
    sign = 1 if results.minimize else -1
    ordered = sorted(results.baselines.items(), key=lambda pair: sign * (pair[1]["metrics"].get(results.metric) or 0.0))
    rows += [Score(name, kept["metrics"], results.gain(name), kept["words"]) for name, kept in ordered]
    table = scores(
        "baselines", f"On the same {number(best.best.get('n') if best else None)} validation rows", rows,
        metric=results.metric, gain="the trial gains", what=True, marked=(0,) if best else (),
        note=f"What the trial gains is in {format.metric_words(results.metric)}; days are resampled in blocks. The "
        "best trial was chosen on these rows; the baselines were not.",
    )  # fmt: skip
    return Section("baselines", "The best trial and what it must beat", (table,))


def _confirmation(analysis: StudyAnalysis) -> Section:
    """The best trials trained again, or what the search alone says of them."""
    confirmation, results, intervals = analysis.confirmation, analysis.results, []
    unit = format.metric_words(results.metric)
    if confirmation is not None and any(each.verdict for each in confirmation.candidates):
        for each in confirmation.candidates:
            if each.verdict is not None:
                who = f"trial {each.trial} · {each.shape.d_model} × {each.shape.n_layers}"
                intervals.append(Interval.of(who, each.verdict.gain, strong=each.verdict.confirmed))
                if each.ensemble is not None:
                    intervals.append(Interval.of("its ensemble", each.ensemble.gain))
        forest = figures.forest(
            intervals, baseline=confirmation.baseline, unit=unit, title="Confirmation",
            caption=f"Mean gain of each candidate, trained again with {len(confirmation.seeds)} fresh seeds, "
            f"with its {format.level_words(confirmation)} interval over other days and seeds; green: confirmed.",
        )  # fmt: skip
        words = format.confirmation_verdict(confirmation), *format.confirmation_details(confirmation)
        return Section("confirmation", "Confirmation", (Prose(words), forest, *confirmation_tables(confirmation)))
    note = (
        f"Nothing is confirmed yet: `just confirm {results.name}` trains the best trials again with fresh seeds. "
        "Below, the search's own figures: the luck of having been chosen is in them."
    )
    blocks: list[Block] = [Prose(note, "note")]
    for record in results.ranked[:_FOREST]:
        if (gain := results.gain(results.best_baseline, record.trial_number)) is not None:
            who = f"trial {record.trial_number} · {record.d_model} × {record.n_layers}"
            intervals.append(Interval.of(who, gain))
    if intervals and results.best_baseline is not None:
        blocks.append(
            figures.forest(
                intervals, baseline=results.best_baseline, unit=unit,
                title="The best trials against the best baseline, unconfirmed",
                caption="Mean gain with its 95 % interval over other days; green where it lies above zero.",
            )
        )  # fmt: skip
    return Section("confirmation", "Confirmation", tuple(blocks))


# --- volatility or direction ------------------------------------------------------------------------------------------


def _direction(direction: DirectionAnalysis | None, results: StudyResults) -> Section | None:
    """For threshold tasks: the mirror test, years, and the lead over volatility through time."""
    if direction is None or results.best is None:
        return None
    who, volatility, gain = f"trial {results.best.trial_number}", direction.volatility, direction.gain
    blocks: list[Block] = [Prose("The mirror test needs the study's prices: give --data-dir.", "note")]
    if direction.mirrors:
        blocks = [Prose(mirror_words(direction.mirrors[who])), _mirror_table(direction)]
    blocks.append(
        make(
            "by_year", "By year",
            ["year", ("rows", "whole"), ("base rate", "percent"), ("log loss", "number"), ("skill", "percent"),
             ("AUC", "number"), (f"nats per row saved against {volatility}", "number")],
            [(str(y.year), y.n, y.base_rate, y.log_loss, y.skill, y.auc, y.gain) for y in direction.years],
        )
    )  # fmt: skip
    if gain is not None:
        if gain.best_year_share is not None:
            words = (
                f"Of the whole lead over {volatility} ({number(gain.total, 2)} nats), the best year brought "
                f"{percent(gain.best_year_share)}; the deepest fall from a peak was {number(gain.deepest_fall, 2)} "
                "nats."
            )
            blocks.append(Prose(words))
        blocks.append(figures.cumulative(gain.dates, {who: gain.gain}, against=str(volatility), unit="nats"))
    return Section("direction", "Volatility or direction", tuple(blocks))


def mirror_words(mirror: MirrorTest) -> str:
    """Whether probabilities know the side of a move, or only its size."""
    if mirror.auc is None or mirror.opposite_auc is None or mirror.direction_auc is None:
        return "One of the two events never came: nothing can be said of direction."
    se = mirror.direction_se
    told_apart = se is not None and mirror.direction_auc - 1.645 * se > 0.5
    side = "more than chance" if told_apart else "no knowledge of direction is shown"
    error = f" ± {1.96 * se:.3f}" if se is not None else ""
    return (
        f"The same probabilities score the opposite event at AUC {mirror.opposite_auc:.3f}, the event itself at "
        f"{mirror.auc:.3f}. On the {mirror.one_sided:,} rows where exactly one side was touched they say which at AUC "
        f"{mirror.direction_auc:.3f}{error} (.5 is chance): {side}."
    )


def _mirror_table(direction: DirectionAnalysis) -> Table:
    return make(
        "mirror", "Mirror test",
        ["", ("event AUC", "number"), ("opposite AUC", "number"), ("base rate", "percent"),
         ("opposite rate", "percent"), ("one-sided rows", "whole"), ("which-side AUC", "number"), ("SE", "number"),
         ("within-year AUC", "number")],
        [
            (name, m.auc, m.opposite_auc, m.base_rate, m.opposite_rate, m.one_sided, m.direction_auc, m.direction_se,
             direction.within_year[name])
            for name, m in direction.mirrors.items()
        ],
        note="Within-year AUC compares days of the same year alone: telling wild years from calm ones is no skill in "
        "it.",
    )  # fmt: skip


# --- calibration, intervals, backtest ---------------------------------------------------------------------------------


def _calibration(calibration: CalibrationAnalysis | None) -> Section | None:
    """Reliability, Brier parts, recalibration judged on later rows, precision and recall, thresholds."""
    if calibration is None:
        return None
    brier = make(
        "brier", "Calibration error, and the Brier score in parts",
        ["", ("calibration error", "number"), ("Brier", "number"), ("= reliability", "number"),
         ("− resolution", "number"), ("+ uncertainty", "number"), ("+ within bins", "number")],
        [
            (name, calibration.error[name], p.brier, p.reliability, p.resolution, p.uncertainty, p.within)
            for name, p in calibration.brier.items()
        ],
        note="Reliability: how far predicted probabilities lie from observed frequencies, less is better. Resolution: "
        "how far days are told apart.",
    )  # fmt: skip
    blocks: list[Block] = [figures.reliability(calibration.reliability), brier]
    if calibration.recalibrated:
        learnt = "the older half of the validation days, judged on the newer"
        if calibration.by_folds:
            learnt = "earlier folds, judged on the next"
        blocks.append(
            make(
                "recalibration", "Would recalibration help?",
                ["recalibration", ("log loss", "number"), ("Brier", "number"), ("calibration error", "number"),
                 ("rows", "whole")],
                [(each.method, each.log_loss, each.brier, each.calibration_error, each.n)
                 for each in calibration.recalibrated],
                note=f"Learnt on {learnt}.",
            )
        )  # fmt: skip
    if calibration.precision_recall:
        blocks += [figures.precision_recall(calibration.precision_recall), _thresholds(calibration)]
    return Section("calibration", "Calibration and decisions", tuple(blocks))


def _thresholds(calibration: CalibrationAnalysis) -> Table:
    return make(
        "thresholds", "Thresholds",
        ["above the decile", ("probability ≥", "number"), ("calls", "whole"), ("precision", "percent"),
         "95 % interval", ("recall", "percent"), ("lift over base rate", "number"), "interval"],
        [
            (f"{100 * t.decile:.0f} %", t.threshold, t.predicted, t.precision.value,
             format.share_span(t.precision.low, t.precision.high), t.recall.value, t.lift,
             f"{t.lift_low:.2f} … {t.lift_high:.2f}")
            for t in calibration.thresholds
        ],
        note="Wilson intervals of independent rows.",
    )  # fmt: skip


def _coverage(coverage: Sequence[IntervalCoverage]) -> Section | None:
    """For regression: conformal intervals."""
    if not coverage:
        return None
    table = make(
        "conformal", "Conformal intervals",
        ["method", ("promised", "percent"), ("held", "percent"), ("median width (log return)", "number"),
         ("rows", "whole")],
        [(each.method, each.level, each.covered, each.median_width, each.n) for each in coverage],
        note="Learnt on the older half of the validation days, judged on the newer, asset by asset.",
    )  # fmt: skip
    words = "Split: one width for all days. Adaptive: the width follows the misses, so that coverage comes back."
    return Section("intervals", "Intervals", (Prose(words), table))


def _backtest(backtest: BacktestAnalysis | None, results: StudyResults) -> Section | None:
    if backtest is None:
        return None
    if backtest.impossible:
        return Section("backtest", "Backtest", (Prose(backtest.impossible, "note"),))
    table = make(
        "backtest", "After costs, on the validation days",
        ["", ("trades", "whole"), ("won", "percent"), ("days in", "percent"), ("return a year", "percent"),
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
    assumed = Prose("What is taken for granted:"), Prose(backtest.assumptions)
    return Section("backtest", "Backtest", (*assumed, table, sharpe))


# --- the sealed test, the origin --------------------------------------------------------------------------------------


def _test(analysis: StudyAnalysis) -> Section:
    """Every opening of the sealed test part, and what each one said."""
    log = analysis.opening_log
    if not log:
        return Section("test", "The sealed test", (Prose("The sealed test part has never been opened."),))
    rows = [
        (str(i + 1), each.get("opened"), ", ".join(each.get("models", [])) or None,
         {None: None, True: "yes", False: "no"}[each.get("confirmed")])
        for i, each in enumerate(log)
    ]  # fmt: skip
    words = f"The sealed test part was opened {'once' if len(log) == 1 else f'{len(log)} times'}."
    if len(log) > 1:
        words += " From the second time on it is no test any more: whoever looks again chooses by it."
    table = make("openings", "Openings", ["", "opened", "for", "confirmed"], rows)
    said: list[Block] = []
    for opening in analysis.openings:
        said += [opening_table(opening), Prose(tuple(map(format.sentence, opening.notes)), "note")]
    return Section("test", "The sealed test", (Prose(words), table, *said))


def _origin(analysis: StudyAnalysis) -> Section:
    """The whole resolved file, the environment, and where the records lie."""
    results = analysis.results
    where = f"Records: {results.folder}/trials/*/record.json."
    return Section(
        "origin", "File and environment",
        (
            _environment(results),
            Text("The whole sweep file, resolved", analysis.resolved),
            Prose(f"{where} Definition hash {results.study.definition_hash[:16]}.", "note"),
        ),
    )  # fmt: skip


def _environment(results: StudyResults) -> Table:
    """Libraries, devices and commits; several where trials ran in several environments."""
    records = results.records
    libraries = dict.fromkeys(name for record in records for name in record.libraries)
    values = {name: [record.libraries.get(name, "–") for record in records] for name in libraries}
    values["device"] = [record.device for record in records]
    values["commit"] = [(record.git_commit or "not from a checkout")[:19] for record in records]
    rows = [(what, format.listed(list(dict.fromkeys(each)))) for what, each in values.items()]
    return make("environment", "Environment", ["what", "version"], rows)
