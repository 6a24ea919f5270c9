"""Study comparison: skills side by side, shapes across horizons and budgets, and each winner in the other studies.

Raw losses are not compared across labels. A shape is the same in two studies if all of its numbers are. Studies share
the shapes that both happened to train: a cell of a table that no trial fills says how to fill it.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fintx.analysis import study_results
from fintx.analysis.patterns import RankCorrelation, depth_bucket, spearman
from fintx.analysis.predictions import BaselineComparison
from fintx.analysis.study_results import StudyResults
from fintx.config.schema import ENCODER, Shape, StudySpec
from fintx.errors import FintxError
from fintx.evaluate import significance
from fintx.evaluate.significance import Estimate
from fintx.model import family, param_count
from fintx.study.search_space import model_variants


@dataclass(frozen=True)
class StudyRow:
    """One study in the comparison."""

    name: str
    label: str
    label_hash: str
    budget: int
    n_finished: int
    n_trials: int
    n_rows: int | None
    base_rate: float | None
    best: tuple[float, float, float] | None
    """Skill of its best trial with its 95 % interval; none without predictions."""
    best_skill: float | None
    baseline: str | None
    """Name of the best baseline."""
    baseline_skill: float | None
    comparison: BaselineComparison | None
    """Its best trial against its best baseline; none without predictions."""
    gain_share: tuple[float, float, float] | None
    """Their difference as a share of the prior's loss, so that studies of other labels compare: (mean, low, high)."""
    shape: Shape
    param_count: int


@dataclass(frozen=True)
class Transfer:
    """The winner of one study, trained in another."""

    winner_of: str
    trained_in: str
    shape: Shape
    skill: float | None
    """Best of its trials there; none: never trained there."""
    n: int
    behind: float | None
    """Skill of that study's own best less this one's."""
    fill: str
    """The command that fills the cell, or why nothing can; empty where it is filled."""


@dataclass(frozen=True)
class SharedShape:
    """A shape that several studies trained."""

    shape: Shape
    skills: tuple[float | None, ...]
    """Mean skill in each study."""
    counts: tuple[int, ...]


@dataclass(frozen=True)
class StudyPair:
    """Whether two studies rank shapes alike."""

    first: str
    second: str
    shapes: RankCorrelation
    """Over shapes that both trained."""
    cells: RankCorrelation
    """Over cells of width and depth bucket that both trained, by mean skill."""
    difference: Estimate | None
    """Loss per row that the second's best trial saves against the first's; only of equal labels on equal rows."""


@dataclass(frozen=True)
class Comparison:
    """Several studies side by side."""

    studies: tuple[StudyResults, ...]
    rows: tuple[StudyRow, ...]
    common: tuple[SharedShape, ...]
    """Best mean skill over all first."""
    transfers: tuple[Transfer, ...]
    pairs: tuple[StudyPair, ...]
    notes: tuple[str, ...]


def read(folders: Sequence[Path]) -> Comparison:
    """Compare studies.

    Raises:
        FintxError: fewer than two studies, one without a successful trial, or tasks whose skills mean different things.
    """
    if len(folders) < 2:
        raise FintxError("compare: wanted two studies or more, such as: just compare 2M_h1 2M_h3 2M_h5")
    studies = tuple(study_results.read(folder) for folder in folders)
    for results in studies:
        if results.best is None:
            raise FintxError(f"{results.folder}: has no successful trial yet ({len(results.records)} finished)")
    if len({(results.skill_loss, results.spec.task.predicts) for results in studies}) > 1:
        losses = ", ".join(f"{r.name}: {r.skill_loss} of a {r.spec.task.kind} task" for r in studies)
        raise FintxError(f"compare: the studies' skills are of different losses ({losses}); compare those of one kind")
    return Comparison(
        studies=studies,
        rows=tuple(_row(results) for results in studies),
        common=_shared_shapes(studies),
        transfers=tuple(_transfer(a, b) for a in studies for b in studies),
        pairs=tuple(_pair(a, b) for i, a in enumerate(studies) for b in studies[i + 1 :]),
        notes=(_label_note(studies), *(f"{results.name}: {note}" for results in studies for note in results.notes)),
    )


def _row(results: StudyResults) -> StudyRow:
    best, comparison, prior = results.best, results.comparison, results.daily_losses.get("prior")
    assert best is not None
    share, baseline = None, results.best_baseline
    if comparison is not None and prior is not None:
        scale, gain = float(prior.mean()), comparison.difference
        share = gain.mean / scale, gain.low / scale, gain.high / scale
    return StudyRow(
        name=results.name,
        label=results.spec.task.rule.describe(),
        label_hash=best.folds[0].label_hash,
        budget=results.spec.budget.parameters,
        n_finished=len(results.records),
        n_trials=results.spec.study.n_trials,
        n_rows=None if results.rows is None else len(results.rows.labels),
        base_rate=best.best.get("base_rate"),
        best=results.skill_interval,
        best_skill=results.skill(best.best),
        baseline=baseline,
        baseline_skill=None if baseline is None else results.skill(results.baselines[baseline]["metrics"]),
        comparison=comparison,
        gain_share=share,
        shape=best.config.shape,
        param_count=best.param_count,
    )


def _label_note(studies: Sequence[StudyResults]) -> str:
    by_label: dict[str, list[str]] = {}
    for results in studies:
        by_label.setdefault(results.records[0].folds[0].label_hash, []).append(results.name)
    if len(by_label) == 1:
        return "All studies have the same labels: losses may be compared as well as skills."
    equal = "; ".join(" = ".join(names) for names in by_label.values() if len(names) > 1)
    note = "The studies' labels differ: their losses can't be compared, their skills can with care."
    return f"{note} Equal labels: {equal}." if equal else note


# --- shapes -----------------------------------------------------------------------------------------------------------


def _skills_by_shape(results: StudyResults) -> dict[Shape, list[float]]:
    skills: dict[Shape, list[float]] = {}
    for record in results.ranked:
        if (skill := results.skill(record.best)) is not None:
            skills.setdefault(record.config.shape, []).append(skill)
    return skills


def _skills_by_cell(results: StudyResults) -> dict[tuple[str, int, int], list[float]]:
    """(model family, width, depth bucket) → skills."""
    name, kind = results.spec.model.family, family.of(results.spec.model)
    skills: dict[tuple[str, int, int], list[float]] = {}
    for shape, own in _skills_by_shape(results).items():
        skills.setdefault((name, kind.width(shape), depth_bucket(kind.depth(shape))), []).extend(own)
    return skills


def _shared_shapes(studies: Sequence[StudyResults]) -> tuple[SharedShape, ...]:
    by_study = [_skills_by_shape(results) for results in studies]
    rows = []
    for shape, n_studies in Counter(shape for skills in by_study for shape in skills).items():
        if n_studies > 1:
            means = [float(np.mean(skills[shape])) if shape in skills else None for skills in by_study]
            rows.append(SharedShape(shape, tuple(means), tuple(len(skills.get(shape, ())) for skills in by_study)))
    best_first = [(-float(np.mean([s for s in row.skills if s is not None])), str(row.shape)) for row in rows]
    return tuple(row for _, row in sorted(zip(best_first, rows, strict=True), key=lambda pair: pair[0]))


def _transfer(winner_of: StudyResults, trained_in: StudyResults) -> Transfer:
    assert winner_of.best is not None and trained_in.best is not None
    shape = winner_of.best.config.shape
    skills, own = _skills_by_shape(trained_in).get(shape, []), trained_in.skill(trained_in.best.best)
    best = max(skills, default=None)
    return Transfer(
        winner_of=winner_of.name,
        trained_in=trained_in.name,
        shape=shape,
        skill=best,
        n=len(skills),
        behind=None if best is None or own is None else own - best,
        fill="" if best is not None else _fill(winner_of.spec, shape, trained_in),
    )


def _fill(winner_of: StudySpec, shape: Shape, trained_in: StudyResults) -> str:
    """The command that fills a cell; or why none can: another model family, or a size that is not that study's."""
    spec, budget = trained_in.spec, trained_in.spec.budget
    if spec.model.family != winner_of.model.family:
        return f"its models are of another family, {spec.model.family}"
    for model in model_variants(spec):
        total = param_count.count_params(model, shape, len(spec.data.features)).total
        if not budget.low <= total <= budget.high:
            return f"{total:,} parameters lie outside the budget {budget.low:,} … {budget.high:,}"
    file, numbers = f"sweeps/{trained_in.name}.toml", shape.model_dump()
    if spec.model.family != ENCODER:  # `queue add` takes the numbers of an encoder alone
        return f"add to {file}: [[queue]] {', '.join(f'{name} = {n}' for name, n in numbers.items())}"
    options = " ".join(f"--{name.replace('_', '-')} {n}" for name, n in numbers.items())
    return f"just queue add {shlex.quote(file)} {options}"


def _pair(first: StudyResults, second: StudyResults) -> StudyPair:
    return StudyPair(
        first.name,
        second.name,
        shapes=_agreement(_skills_by_shape(first), _skills_by_shape(second)),
        cells=_agreement(_skills_by_cell(first), _skills_by_cell(second)),
        difference=_difference(first, second),
    )


def _agreement(first: Mapping[Any, list[float]], second: Mapping[Any, list[float]]) -> RankCorrelation:
    shared = [key for key in first if key in second]
    return spearman(*(np.array([np.mean(skills[key]) for key in shared], float) for skills in (first, second)))


def _difference(first: StudyResults, second: StudyResults) -> Estimate | None:
    """Of the two best trials, on the same days of the same rows."""
    if first.rows is None or second.rows is None or first.best is None or second.best is None:
        return None
    a, b = first.daily_losses.get(first.best.trial_number), second.daily_losses.get(second.best.trial_number)
    if a is None or b is None or first.metric != second.metric or not first.rows.key.equals(second.rows.key):
        return None
    block = significance.block_length(a - b, horizon=first.spec.task.horizon)
    return significance.estimate(a - b, significance.resample(len(a), block))
