"""Search sections of a study's page: its course, its patterns, its outcomes, and every trial."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fintx.analysis.patterns import LEAST_TRIALS, Importance, Pattern, SearchSummary
from fintx.analysis.study_analysis import StudyAnalysis
from fintx.analysis.study_results import StudyResults
from fintx.config.schema import FloatRange, Shape
from fintx.report import figures_search
from fintx.report.figures import Picture
from fintx.report.format import LOSSES, duration, listed, number, percent, shape_words, share_span
from fintx.report.page import Block, Prose, Section
from fintx.report.table import Column, Table, make

TOP = 5
"""Trials whose learning curves are drawn."""
_AXES = {"shape.aspect": "d_model / layers", "shape.d_ff_ratio": "d_ff / d_model", "shape.heads": "heads"}


def sections(analysis: StudyAnalysis) -> tuple[Section, Section]:
    """The search's course, and its patterns."""
    return _course(analysis.results, analysis.search.shapes), _patterns(analysis)


def _course(results: StudyResults, shapes: Sequence[Shape]) -> Section:
    """History, slices, the map of shapes, and learning curves."""
    blocks: list[Block] = [Prose("No trial has succeeded yet: there is nothing to draw.", "note")]
    if results.ranked:
        slices = _slices(results) if len(results.ranked) > 1 else None
        skills = [(record.config.shape, results.skill(record.best)) for record in results.ranked]
        trained = [(shape, skill) for shape, skill in skills if skill is not None]
        blocks = [_history(results)]
        blocks += [slices] if slices else []
        blocks += [figures_search.shape_map(trained, shapes)] if trained else []
        blocks.append(_curves(results))
    return Section("course", "Course of the search", tuple(blocks))


def _history(results: StudyResults) -> Picture:
    metric, shown = results.spec.study.metric, ("prior", results.best_baseline)
    scored = {name: kept["metrics"].get(metric) for name, kept in results.baselines.items() if name in shown}
    return figures_search.history(
        [record.trial_number for record in results.records],
        [record.value for record in results.records],
        metric=metric,
        minimize=results.minimize,
        baselines={name: value for name, value in scored.items() if value is not None},
        best_baseline=results.best_baseline,
        queued=[record.source == "queue" for record in results.records],
    )


def _slices(results: StudyResults) -> Picture | None:
    trials = [record for record in results.ranked if results.skill(record.best) is not None]
    axes = [
        figures_search.Slice("d_model", tuple(r.d_model for r in trials), True),
        figures_search.Slice("layers", tuple(r.n_layers for r in trials), True),
        figures_search.Slice("d_ff / d_model", tuple(r.d_ff / r.d_model for r in trials), True),
        figures_search.Slice("heads", tuple(r.n_heads for r in trials), True),
    ]
    for path, searched in results.spec.space.items():
        section, _, key = path.partition(".")
        values = tuple(getattr(getattr(record.config, section), key) for record in trials)
        words = any(isinstance(value, str | bool) for value in values)
        log = isinstance(searched, FloatRange) and searched.log
        axes.append(figures_search.Slice(key.replace("_", " "), tuple(map(str, values)) if words else values, log))
    axes = [axis for axis in axes if len(set(axis.values)) > 1]  # what is the same for all shows nothing
    return figures_search.slices(axes, np.array([results.skill(r.best) for r in trials], float)) if axes else None


def _curves(results: StudyResults) -> Picture:
    metric, baseline = results.spec.study.metric, results.best_baseline
    curves = [
        figures_search.Curve(
            words=f"trial {record.trial_number}",
            epochs=[int(entry["epoch"] or 0) for entry in record.folds[-1].curve],
            train=[entry.get("train_loss") for entry in record.folds[-1].curve],
            validation=[entry.get(metric) for entry in record.folds[-1].curve],
            best_epoch=record.folds[-1].best_epoch,
        )
        for record in results.ranked[:TOP]
    ]
    value = results.baselines.get(baseline or "", {}).get("metrics", {}).get(metric)
    walk_forward = len(results.ranked[0].folds) > 1
    shown = (baseline, value) if baseline and value is not None and not walk_forward else None
    return figures_search.learning_curves(curves, metric=metric, baseline=shown)


# --- patterns ---------------------------------------------------------------------------------------------------------


def _patterns(analysis: StudyAnalysis) -> Section:
    """By shape and by training value, with what can be told from noise; importance."""
    if not analysis.results.ranked:
        return Section("patterns", "Patterns", (Prose("No successful trial yet: no pattern to look for.", "note"),))
    every = (*analysis.shapes, *analysis.values)
    told_apart = [pattern.by for pattern in every if pattern.distinguishable]
    summary = "Nothing here can be told from noise: no width, depth, ratio or training value is shown to be better."
    if told_apart:
        summary = f"What can be told from noise: {listed(told_apart)}."
    how = (
        f"Skill is the share of the training prior's {LOSSES[analysis.results.skill_loss]} that is saved. Intervals "
        "are 95 %: those of a mean over other trials and other days; those of a difference hold for all groups of a "
        "table at once (Tukey), on the same days."
    )
    blocks: list[Block] = [Prose(summary), Prose(how, "note")]
    blocks += [pattern_table(pattern) for pattern in analysis.shapes if len(pattern.groups) > 1]
    if same := [pattern.by for pattern in analysis.shapes if len(pattern.groups) < 2]:
        blocks.append(Prose(f"The same for all trials: {listed(same)}.", "note"))
    blocks += [pattern_table(pattern) for pattern in analysis.values if len(pattern.groups) > 1]
    return Section("patterns", "Patterns", (*blocks, *_importance(analysis.importance)))


def pattern_table(pattern: Pattern) -> Table:
    """One pattern as a table."""
    rows = []
    for group in pattern.groups:
        behind = low = high = None
        if group.behind is not None:
            behind = -group.behind
        if group.behind_low is not None and group.behind_high is not None:
            low, high = -group.behind_high, -group.behind_low
        rows.append(
            (group.words, group.n, group.best, group.mean, share_span(group.low, group.high), behind,
             share_span(low, high), group.verdict)
        )  # fmt: skip
    note, trend = pattern_words(pattern), pattern.trend
    if trend is not None and trend.rho is not None:
        span = f"{number(trend.low, 2)} … {number(trend.high, 2)}"
        note += f" Rank correlation with skill {number(trend.rho, 2)} ({span}; n = {trend.n})."
    return make(
        f"by_{pattern.name}", f"By {pattern.by}",
        [pattern.by, ("trials", "whole"), ("best skill", "percent"), ("mean skill", "percent"), "interval",
         ("against the best", "points"), "interval", ""],
        rows, note=note, marked=[i for i, group in enumerate(pattern.groups) if group.behind is None],
    )  # fmt: skip


def pattern_words(pattern: Pattern) -> str:
    """What a pattern's table says."""
    if len(pattern.groups) < 2:
        return f"All trials have the same {pattern.by}."
    if all(group.behind_low is None for group in pattern.groups):
        return "Too few trials to compare the groups."
    best = next(group.words for group in pattern.groups if group.behind is None)
    worse = [group.words for group in pattern.groups if group.verdict == "worse"]
    equal = [group.words for group in pattern.groups if group.verdict == "not distinguishable"]
    if not worse:
        return f"No difference can be told from noise: {best} has the best mean, {listed(equal)} may be as good."
    rest = f"; {listed(equal)} can't be told from it" if equal else ""
    return f"{best} has the best mean; {listed(worse)} {'is' if len(worse) == 1 else 'are'} worse{rest}."


def _importance(importance: Sequence[Importance]) -> list[Block]:
    if not importance:
        return [Prose(f"Importance needs at least {LEAST_TRIALS} trials and two searched values.", "note")]
    names = [_AXES.get(each.name, each.name.partition(".")[2].replace("_", " ")) for each in importance]
    shares = [(name, each.share, each.by_chance) for name, each in zip(names, importance, strict=True)]
    table = make(
        "importance", "Importance (PED-ANOVA)",
        ["value", ("share", "percent"), ("95 % of shuffled studies", "percent"), ""],
        [(*row, "more than chance" if row[1] > row[2] else "no more than chance") for row in shares],
    )  # fmt: skip
    return [table, figures_search.importance(shares)]


# --- outcomes ---------------------------------------------------------------------------------------------------------


def outcomes(analysis: StudyAnalysis) -> Section:
    """Outcomes and run times, duplicates, coverage, and every trial."""
    search, feasible = analysis.search, len(analysis.search.shapes)
    machines = "; ".join(f"{host}: {device}, {n} trials" for (host, device), n in search.machines)
    ends = make(
        "outcomes", "Outcomes and run times",
        ["outcome", ("trials", "whole"), ("mean time", "seconds"), ("of it compiling", "seconds"),
         ("total", "seconds"), "the newest says"],
        [(row.outcome, row.n, row.mean_s, row.compile_s, row.total_s, row.detail or None) for row in search.outcomes],
        note=f"{search.finished} of {search.wanted} trials finished; {duration(search.busy_s)} of training within "
        f"{duration(search.wall_s)}. {machines}.",
    )  # fmt: skip
    off_grid = f", and {search.queued_off_grid} from the queue outside the candidates" if search.queued_off_grid else ""
    coverage = make(
        "coverage", "Coverage of the feasible set",
        [search.width_name, ("feasible shapes", "whole"), ("trained", "whole"), "feasible depths", "trained depths",
         "depths never tried"],
        [(str(r.width), r.feasible, r.trained, r.depths, r.trained_depths, r.unseen) for r in search.coverage],
        note=f"{search.trained} of {feasible:,} feasible shapes were trained ({percent(search.trained / feasible)})"
        f"{off_grid}.",
    )  # fmt: skip
    blocks = ends, *_duplicates(search), coverage, _all_trials(analysis.results)
    return Section("outcomes", "Outcomes, duplicates, coverage", blocks)


def _duplicates(search: SearchSummary) -> list[Block]:
    config, n = "No two trials are alike but for their seed.", len(search.repeated_shapes)
    if search.repeated_configs:
        groups = "; ".join(", ".join(map(str, numbers)) for numbers in search.repeated_configs)
        config = f"Trials that differ in their seed alone: {groups}."
    several = "No shape was" if n == 0 else "One shape was" if n == 1 else f"{n} shapes were"
    blocks: list[Block] = [Prose(f"Duplicates: {config} {several} trained several times.")]
    if n:
        rows = [(shape_words(shape), len(found), ", ".join(map(str, found))) for shape, found in search.repeated_shapes]
        columns: list[Column] = ["shape", ("trials", "whole"), "numbers"]
        blocks.append(make("repeated_shapes", "Shapes trained several times", columns, rows))
    return blocks


def _all_trials(results: StudyResults) -> Table:
    """Best first, failures last."""
    paths = [path.partition(".") for path in results.spec.space]
    rows = []
    for r in (*results.ranked, *(record for record in results.records if record.value is None)):
        values = [getattr(getattr(r.config, section), key) for section, _, key in paths]
        rows.append(
            [str(r.trial_number), r.value, results.skill(r.best) if r.value is not None else None, str(r.d_model),
             str(r.n_layers), str(r.n_heads), str(r.d_ff), r.param_count,
             *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values),
             r.folds[-1].best_epoch if r.folds else None, r.outcome.replace("_", " "), r.source, str(r.config.seed),
             r.wall_s, r.note or None]
        )  # fmt: skip
    return make(
        "all_trials", "Every trial, best first",
        ["trial", (results.spec.study.metric, "number"), ("skill", "percent"), "d_model", "layers", "heads", "d_ff",
         ("parameters", "whole"), *(key.replace("_", " ") for _, _, key in paths), ("best epoch", "whole"), "outcome",
         "source", "seed", ("time", "seconds"), "note"],
        rows, marked=(0,) if results.ranked else (),
    )  # fmt: skip
