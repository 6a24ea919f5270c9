"""Search sections of a study's page: its progress, patterns, outcomes, and every trial."""

from __future__ import annotations

from collections.abc import Sequence

from fintx.analysis.patterns import LEAST_TRIALS, Importance, Pattern, SearchSummary
from fintx.analysis.study_analysis import StudyAnalysis
from fintx.analysis.study_results import StudyResults
from fintx.config.schema import FloatRange, Shape
from fintx.model import family
from fintx.report import figures
from fintx.report.figures import Slice
from fintx.report.format import LOSS_WORDS, duration, listed, number, percent, percent_span, shape_words
from fintx.report.page import Block, Prose, Section
from fintx.report.table import Table
from fintx.study.records import TrialRecord

_NUMBERS = {"n_layers": "layers", "n_heads": "heads", "d_ff ratio": "d_ff / d_model"}
"""An encoder's numbers as a reader knows them; those of another family have their own names."""
_AXES = {"shape.aspect": "d_model / layers", "shape.d_ff_ratio": "d_ff / d_model", "shape.heads": "heads"}


def progress_section(results: StudyResults, feasible: Sequence[Shape]) -> Section:
    """History, slices, the map of shapes, and learning curves."""
    blocks: list[Block] = [Prose("No trial has succeeded yet: there is nothing to draw.", "note")]
    if results.ranked:
        scored = [(record, skill) for record in results.ranked if (skill := results.skill(record.best)) is not None]
        blocks = [figures.plot_history(results)]
        if slices := _slices(results, [record for record, _ in scored]):
            blocks.append(figures.plot_slices(slices, [skill for _, skill in scored]))
        if scored:
            kind = family.of(results.spec.model)
            blocks.append(
                figures.plot_shape_map([(record.config.shape, skill) for record, skill in scored], feasible, kind)
            )
        blocks.append(figures.plot_learning_curves(results))
    return Section("search", "Progress of the search", tuple(blocks))


def _slices(results: StudyResults, trials: Sequence[TrialRecord]) -> list[Slice]:
    """The shape's numbers and the searched values, where trials differ in them."""
    slices = [
        Slice(_NUMBERS.get(name, name), [extent(record.config.shape) for record in trials], log=True)
        for name, extent in family.of(results.spec.model).extents.items()
    ]
    for path, searched in results.spec.space.items():
        values = [_searched_value(record, path) for record in trials]
        slices.append(Slice(_path_words(path), values, log=isinstance(searched, FloatRange) and searched.log))
    return [each for each in slices if len(set(each.values)) > 1]


def _searched_value(record: TrialRecord, path: str) -> float | int | str | bool:
    section, _, key = path.partition(".")
    return getattr(getattr(record.config, section), key)  # type: ignore[no-any-return]


def _path_words(path: str) -> str:
    return path.partition(".")[2].replace("_", " ")


# --- patterns ---------------------------------------------------------------------------------------------------------


def patterns_section(analysis: StudyAnalysis) -> Section:
    """Skill by shape and by training value, with what can be told from noise; importance."""
    if not analysis.results.ranked:
        return Section("patterns", "Patterns", (Prose("No successful trial yet: no pattern to look for.", "note"),))
    patterns = (*analysis.shapes, *analysis.values)
    summary = "Nothing here can be told from noise: no width, depth, ratio or training value is shown to be better."
    if names := [pattern.by for pattern in patterns if pattern.distinguishable]:
        summary = f"These differences can be told from noise: {listed(names)}."
    method = (
        f"Skill is the share of the training prior's {LOSS_WORDS[analysis.results.skill_loss]} that is saved. "
        "Intervals are 95 %: those of a mean are over other trials and other days; those of a difference hold for all "
        "groups of a table at once (Tukey), on the same days."
    )
    blocks: list[Block] = [Prose(summary), Prose(method, "note")]
    blocks += [_pattern_table(pattern) for pattern in patterns if len(pattern.groups) > 1]
    if alone := [f"{pattern.by} {pattern.groups[0].words}" for pattern in analysis.shapes if len(pattern.groups) == 1]:
        blocks.append(Prose(f"All trials are in one group: {listed(alone)}.", "note"))
    return Section("patterns", "Patterns", (*blocks, *_importance(analysis.importance)))


def _pattern_table(pattern: Pattern) -> Table:
    rows = []
    for group in pattern.groups:
        behind = None if group.behind is None else -group.behind
        interval = None
        if group.behind_low is not None and group.behind_high is not None:
            interval = percent_span(-group.behind_high, -group.behind_low)
        rows.append((group.words, group.n, group.best, group.mean, percent_span(group.low, group.high), behind,
                     interval, group.verdict))  # fmt: skip
    note, trend = pattern_words(pattern), pattern.trend
    if trend is not None and trend.rho is not None:
        span = f"{number(trend.low, 2)} … {number(trend.high, 2)}"
        note += f" Rank correlation with skill {number(trend.rho, 2)} ({span}; n = {trend.n})."
    return Table(
        f"by_{pattern.name}", f"By {pattern.by}",
        [pattern.by, ("trials", "whole"), ("best skill", "percent"), ("mean skill", "percent"), "interval",
         ("against the best", "points"), "interval", ""],
        rows, note=note, marked=[i for i, group in enumerate(pattern.groups) if group.behind is None],
    )  # fmt: skip


def pattern_words(pattern: Pattern) -> str:
    """What a pattern's table shows, in a sentence."""
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
    shares = [(_AXES.get(each.name, _path_words(each.name)), each.share, each.by_chance) for each in importance]
    table = Table(
        "importance", "Importance (PED-ANOVA)",
        ["value", ("share", "percent"), ("95 % of shuffled studies", "percent"), ""],
        [(*row, "more than chance" if row[1] > row[2] else "no more than chance") for row in shares],
    )  # fmt: skip
    return [table, figures.plot_importance(shares)]


# --- outcomes ---------------------------------------------------------------------------------------------------------


def outcomes_section(analysis: StudyAnalysis) -> Section:
    """Outcomes and run times, duplicates, coverage, and every trial."""
    search, feasible = analysis.search, len(analysis.search.shapes)
    machines = "; ".join(f"{host}: {device}, {n} trials" for (host, device), n in search.machines)
    outcomes = Table(
        "outcomes", "Outcomes and run times",
        ["outcome", ("trials", "whole"), ("mean time", "seconds"), ("of it compiling", "seconds"),
         ("total", "seconds"), "latest detail"],
        [(row.outcome, row.n, row.mean_s, row.compile_s, row.total_s, row.detail or None) for row in search.outcomes],
        note=f"{search.finished} of {search.wanted} trials finished; {duration(search.busy_s)} of training within "
        f"{duration(search.wall_s)}. {machines}.",
    )  # fmt: skip
    off_grid = f", and {search.queued_off_grid} from the queue outside the candidates" if search.queued_off_grid else ""
    coverage = Table(
        "coverage", "Coverage of the feasible set",
        [search.width_name, ("feasible shapes", "whole"), ("trained", "whole"), "feasible depths", "trained depths",
         "depth ranges never tried"],
        [(str(r.width), r.feasible, r.trained, r.depths, r.trained_depths, r.unseen) for r in search.coverage],
        note=f"{search.trained} of {feasible:,} feasible shapes were trained ({percent(search.trained / feasible)})"
        f"{off_grid}.",
    )  # fmt: skip
    blocks = outcomes, *_duplicates(search), coverage, _trial_table(analysis.results)
    return Section("outcomes", "Outcomes, duplicates, coverage", blocks)


def _duplicates(search: SearchSummary) -> list[Block]:
    config, n = "No two trials are alike but for their seed.", len(search.repeated_shapes)
    if search.repeated_configs:
        groups = "; ".join(", ".join(map(str, numbers)) for numbers in search.repeated_configs)
        config = f"Trials that differ in their seed alone: {groups}."
    shapes = "No shape was" if n == 0 else "One shape was" if n == 1 else f"{n} shapes were"
    blocks: list[Block] = [Prose(f"Duplicates: {config} {shapes} trained several times.")]
    if n:
        rows = [
            (shape_words(shape), len(numbers), ", ".join(map(str, numbers)))
            for shape, numbers in search.repeated_shapes
        ]
        title = "Shapes trained several times"
        blocks.append(Table("repeated_shapes", title, ["shape", ("trials", "whole"), "numbers"], rows))
    return blocks


def _trial_table(results: StudyResults) -> Table:
    """Every trial, best first, failures last."""
    paths, rows = list(results.spec.space), []
    for r in (*results.ranked, *(record for record in results.records if record.value is None)):
        values = [_searched_value(r, path) for path in paths]
        rows.append(
            [str(r.trial_number), r.value, results.skill(r.best) if r.value is not None else None,
             *map(str, r.config.shape.model_dump().values()), r.param_count,
             *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values),
             r.folds[-1].best_epoch if r.folds else None, r.outcome.replace("_", " "), r.source, str(r.config.seed),
             r.wall_s, r.note or None]
        )  # fmt: skip
    return Table(
        "all_trials", "Every trial, best first",
        ["trial", (results.metric, "number"), ("skill", "percent"),
         *(_NUMBERS.get(name, name) for name in results.records[0].config.shape.model_dump()),
         ("parameters", "whole"), *map(_path_words, paths), ("best epoch", "whole"), "outcome", "source", "seed",
         ("time", "seconds"), "note"],
        rows, marked=(0,) if results.ranked else (),
    )  # fmt: skip
