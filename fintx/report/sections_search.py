"""What does a report say of the search itself? Its course, its patterns, its outcomes, and every trial."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fintx.config.schema import FloatRange
from fintx.report import figures_search, patterns, sheet
from fintx.report.answer import skill_words
from fintx.report.evidence import Evidence
from fintx.report.figures import Picture
from fintx.report.page import Block, Prose, Section
from fintx.report.patterns import Pattern
from fintx.report.search import Search
from fintx.report.sheet import Format, Sheet
from fintx.report.words import duration, listed, number, percent, shape_words
from fintx.study import importance
from fintx.study.importance import Importance
from fintx.study.space import SearchSpace

TOP = 5
"""Trials whose learning curves are drawn."""
_AXES = {"shape.aspect": "d_model / layers", "shape.d_ff_ratio": "d_ff / d_model", "shape.heads": "heads"}


def course(evidence: Evidence, space: SearchSpace) -> Section:
    """History, slices, the map of shapes, and learning curves."""
    blocks: list[Block] = []
    ranked = evidence.ranked
    if ranked:
        blocks.append(_history(evidence))
        if len(ranked) > 1:
            sliced = _slices(evidence)
            blocks += [sliced] if sliced is not None else []
        trained = [(record.config.shape, evidence.skill(record.best)) for record in ranked]
        known = [(shape, skill) for shape, skill in trained if skill is not None]
        if known:
            blocks.append(figures_search.shape_map(known, space.shapes))
        blocks.append(_curves(evidence))
    else:
        blocks.append(Prose("No trial has succeeded yet: there is nothing to draw.", "note"))
    return Section("course", "Course of the search", tuple(blocks))


def _history(evidence: Evidence) -> Picture:
    metric = evidence.spec.study.metric
    beaten = {name: held["metrics"].get(metric) for name, held in evidence.baselines.items()}
    shown = {name: value for name, value in beaten.items() if value is not None and name in ("prior", evidence.rival)}
    return figures_search.history(
        [record.trial_number for record in evidence.records],
        [record.value for record in evidence.records],
        metric=metric,
        minimize=evidence.minimize,
        baselines=shown,
        rival=evidence.rival,
        queued=[record.source == "queue" for record in evidence.records],
    )


def _slices(evidence: Evidence) -> Picture | None:
    found = [r for r in evidence.ranked if evidence.skill(r.best) is not None]
    axes = [
        figures_search.Slice("d_model", tuple(r.d_model for r in found), True),
        figures_search.Slice("layers", tuple(r.n_layers for r in found), True),
        figures_search.Slice("d_ff / d_model", tuple(r.d_ff / r.d_model for r in found), True),
        figures_search.Slice("heads", tuple(r.n_heads for r in found), True),
    ]
    for path, searched in evidence.spec.space.items():
        section, _, key = path.partition(".")
        held = tuple(getattr(getattr(r.config, section), key) for r in found)
        words = any(isinstance(value, str | bool) for value in held)
        log = isinstance(searched, FloatRange) and searched.log
        axes.append(figures_search.Slice(key.replace("_", " "), tuple(map(str, held)) if words else held, log))
    axes = [each for each in axes if len(set(each.values)) > 1]  # what is the same for all shows nothing
    return None if not axes else figures_search.slices(axes, np.array([evidence.skill(r.best) for r in found], float))


def _curves(evidence: Evidence) -> Picture:
    metric = evidence.spec.study.metric
    curves = []
    for record in evidence.ranked[:TOP]:
        fold = record.folds[-1]
        curves.append(
            figures_search.Curve(
                words=f"trial {record.trial_number}",
                epochs=[int(entry["epoch"] or 0) for entry in fold.curve],
                train=[entry.get("train_loss") for entry in fold.curve],
                validation=[entry.get(metric) for entry in fold.curve],
                best_epoch=fold.best_epoch,
            )
        )
    held = evidence.baselines.get(evidence.rival or "", {}).get("metrics", {}).get(metric)
    walk_forward = len(evidence.ranked[0].folds) > 1
    baseline = (evidence.rival, held) if evidence.rival and held is not None and not walk_forward else None
    return figures_search.learning_curves(curves, metric=metric, baseline=baseline)


# --- patterns ---------------------------------------------------------------------------------------------------------


def pattern_section(evidence: Evidence, space: SearchSpace) -> Section:
    """By shape and by training value, with what can be told from noise; importance."""
    if not evidence.ranked:
        return Section("patterns", "Patterns", (Prose("No successful trial yet: no pattern to look for.", "note"),))
    shapes, knobs = patterns.by_shape(evidence), patterns.by_knobs(evidence)
    told = [each for each in (*shapes, *knobs) if each.distinguishable]
    if told:
        summary = f"What can be told from noise: {listed([each.by for each in told])}."
    else:
        summary = "Nothing here can be told from noise: no width, depth, ratio or training value is shown to be better."
    how = (
        f"{skill_words(evidence)}. Intervals are 95 %: those of a mean over other trials and other days; those of a "
        "difference hold for all groups of a table at once (Tukey), on the same days."
    )
    blocks: list[Block] = [Prose(summary), Prose(how, "note")]
    blocks += [pattern_sheet(each) for each in shapes if len(each.groups) > 1]
    same = [each.by for each in shapes if len(each.groups) < 2]
    if same:
        blocks.append(Prose(f"The same for all trials: {listed(same)}.", "note"))
    blocks += [pattern_sheet(each) for each in knobs if len(each.groups) > 1]
    blocks += _importance(importance.ped_anova(evidence.records, space))
    return Section("patterns", "Patterns", tuple(blocks))


def pattern_sheet(found: Pattern) -> Sheet:
    """One pattern as a table."""
    columns: list[tuple[str, Format]] = [
        (found.by, "text"), ("trials", "whole"), ("best skill", "percent"), ("mean skill", "percent"),
        ("interval", "text"), ("against the best", "points"), ("interval", "text"), ("", "text"),
    ]  # fmt: skip
    rows = [
        (
            group.words, group.n, group.best, group.mean, _shares(group.low, group.high),
            None if group.behind is None else -group.behind,
            _shares(_minus(group.behind_high), _minus(group.behind_low)), group.verdict,
        )
        for group in found.groups
    ]  # fmt: skip
    note = found.sentence
    if found.trend is not None and found.trend.rho is not None:
        trend = found.trend
        note += f" Rank correlation with skill {number(trend.rho, 2)} ({number(trend.low, 2)} … {number(trend.high, 2)}; n = {trend.n})."  # noqa: E501
    best = tuple(i for i, group in enumerate(found.groups) if group.behind is None)
    return sheet.of(f"by_{found.name}", f"By {found.by}", columns, rows, note=note, marked=best)


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _shares(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{100 * low:.1f} … {100 * high:.1f} %"


def _importance(found: Sequence[Importance]) -> list[Block]:
    if not found:
        words = f"Importance needs at least {importance.LEAST_TRIALS} trials and two searched values."
        return [Prose(words, "note")]
    names = {each.name: _AXES.get(each.name, each.name.partition(".")[2].replace("_", " ")) for each in found}
    rows = [(names[each.name], each.share, each.by_chance, "more than chance" if each.share > each.by_chance else
             "no more than chance") for each in found]  # fmt: skip
    made = sheet.of(
        "importance", "Importance (PED-ANOVA)",
        [("value", "text"), ("share", "percent"), ("95 % of shuffled studies", "percent"), ("", "text")], rows,
    )  # fmt: skip
    return [made, figures_search.importance([(names[e.name], e.share, e.by_chance) for e in found])]


# --- outcomes ---------------------------------------------------------------------------------------------------------


def outcome_section(evidence: Evidence, search: Search) -> Section:
    """Outcomes and run times, duplicates, coverage, and every trial."""
    outcomes = sheet.of(
        "outcomes", "Outcomes and run times",
        [("outcome", "text"), ("trials", "whole"), ("mean time", "seconds"), ("of it compiling", "seconds"),
         ("total", "seconds"), ("the newest says", "text")],
        [(row.outcome, row.n, row.mean_s, row.compile_s, row.total_s, row.detail or None) for row in search.outcomes],
        note=f"{search.finished} of {search.wanted} trials finished; {duration(search.busy_s)} of training within "
        f"{duration(search.wall_s)}. {'; '.join(search.machines)}.",
    )  # fmt: skip
    coverage = sheet.of(
        "coverage", "Coverage of the feasible set",
        [("d_model", "text"), ("feasible shapes", "whole"), ("trained", "whole"), ("feasible depths", "text"),
         ("trained depths", "text"), ("depths never tried", "text")],
        [(str(r.d_model), r.feasible, r.trained, r.depths, r.trained_depths, r.unseen) for r in search.coverage],
        note=f"{search.trained} of {search.feasible:,} feasible shapes were trained"
        f" ({percent(search.trained / search.feasible)})"
        + (f", and {search.queued_off_grid} from the queue outside the candidates" if search.queued_off_grid else "")
        + ".",
    )  # fmt: skip
    return Section(
        "outcomes", "Outcomes, duplicates, coverage", (outcomes, *_duplicates(search), coverage, _all_trials(evidence))
    )


def _duplicates(search: Search) -> list[Block]:
    if search.repeated_configs:
        groups = "; ".join(", ".join(map(str, numbers)) for numbers in search.repeated_configs)
        config = f"Trials that differ in their seed alone: {groups}."
    else:
        config = "No two trials are alike but for their seed."
    blocks: list[Block] = [
        Prose(f"Duplicates: {config} {_several(len(search.repeated_shapes))} trained several times.")
    ]
    if search.repeated_shapes:
        rows = [
            (shape_words(shape), len(numbers), ", ".join(map(str, numbers)))
            for shape, numbers in search.repeated_shapes
        ]
        columns: list[tuple[str, Format]] = [("shape", "text"), ("trials", "whole"), ("numbers", "text")]
        blocks.append(sheet.of("repeated_shapes", "Shapes trained several times", columns, rows))
    return blocks


def _several(n: int) -> str:
    return "No shape was" if n == 0 else "One shape was" if n == 1 else f"{n} shapes were"


def _all_trials(evidence: Evidence) -> Sheet:
    """Best first, failures last."""
    metric, paths = evidence.spec.study.metric, list(evidence.spec.space)
    columns: list[tuple[str, Format]] = [
        ("trial", "text"), (metric, "number"), ("skill", "percent"), ("d_model", "text"), ("layers", "text"),
        ("heads", "text"), ("d_ff", "text"), ("parameters", "whole"),
        *((path.partition(".")[2].replace("_", " "), "text") for path in paths),
        ("best epoch", "whole"), ("outcome", "text"), ("source", "text"), ("seed", "text"), ("time", "seconds"),
        ("note", "text"),
    ]  # fmt: skip
    failed = [record for record in evidence.records if record.value is None]
    rows = []
    for r in (*evidence.ranked, *failed):
        values = [getattr(getattr(r.config, path.partition(".")[0]), path.partition(".")[2]) for path in paths]
        rows.append(
            [str(r.trial_number), r.value, evidence.skill(r.best) if r.value is not None else None, str(r.d_model),
             str(r.n_layers), str(r.n_heads), str(r.d_ff), r.param_count,
             *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values),
             r.folds[-1].best_epoch if r.folds else None, r.outcome.replace("_", " "), r.source, str(r.config.seed),
             r.wall_s, r.note or None]
        )  # fmt: skip
    marked = (0,) if evidence.ranked else ()
    return sheet.of("all_trials", "Every trial, best first", columns, rows, marked=marked)
