"""How do studies compare? By skill, never by raw loss across labels; shapes across horizons and budgets; transfers.

A shape is the same in two studies if all four of its numbers are. What studies have in common is what they happened to
train: a cell that no trial fills says how to fill it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fintx.config.schema import Shape
from fintx.evaluate import significance
from fintx.evaluate.significance import Estimate
from fintx.model import sizes
from fintx.report import answer, evidence, ranks
from fintx.report.evidence import Evidence
from fintx.report.patterns import depth_bucket
from fintx.report.ranks import Agreement
from fintx.study.lead import BaselineComparison
from fintx.study.space import model_variants
from fintx.types import FintxError, Floats


@dataclass(frozen=True)
class StudyRow:
    """One study."""

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
    rival: str | None
    rival_skill: float | None
    comparison: BaselineComparison | None
    """Its best trial against its best baseline; none without predictions."""
    lead_share: tuple[float, float, float] | None
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
class Common:
    """A shape that several studies trained."""

    shape: Shape
    skills: tuple[float | None, ...]
    """Mean skill in each study."""
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Do two studies rank shapes alike?"""

    first: str
    second: str
    shapes: Agreement
    """Over shapes that both trained."""
    cells: Agreement
    """Over cells of width and depth bucket that both trained, by mean skill."""
    difference: Estimate | None
    """Loss per row that the second's best trial saves against the first's; only of equal labels on equal rows."""


@dataclass(frozen=True)
class Comparison:
    """Several studies side by side."""

    studies: tuple[Evidence, ...]
    rows: tuple[StudyRow, ...]
    common: tuple[Common, ...]
    """Best mean skill over all first."""
    transfers: tuple[Transfer, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]


def read(folders: Sequence[Path]) -> Comparison:
    """Compare studies.

    Raises:
        FintxError: fewer than two studies, one without a successful trial, or tasks whose skills mean different things.
    """
    if len(folders) < 2:
        raise FintxError("compare: wanted two studies or more, such as: just compare 2M_h1 2M_h3 2M_h5")
    found = tuple(evidence.read(folder) for folder in folders)
    for each in found:
        if each.best is None:
            raise FintxError(f"{each.folder}: has no successful trial yet ({len(each.records)} finished)")
    kinds = {(each.skill_key, each.spec.task.predicts) for each in found}
    if len(kinds) > 1:
        words = ", ".join(f"{each.name}: {each.skill_loss} of a {each.spec.task.kind} task" for each in found)
        raise FintxError(f"compare: the studies' skills are of different losses ({words}); compare those of one kind")
    return Comparison(
        studies=found,
        rows=tuple(_row(each) for each in found),
        common=_common(found),
        transfers=tuple(_transfer(a, b) for a in found for b in found),
        pairs=tuple(_pair(a, b) for i, a in enumerate(found) for b in found[i + 1 :]),
        notes=(*_label_notes(found), *(f"{each.name}: {note}" for each in found for note in each.notes)),
    )


def _row(found: Evidence) -> StudyRow:
    best = found.best
    assert best is not None
    rival = found.rival
    rows = found.rows
    return StudyRow(
        name=found.name,
        label=found.spec.task.rule.describe(),
        label_hash=best.folds[0].label_hash,
        budget=found.spec.budget.parameters,
        n_finished=len(found.records),
        n_trials=found.spec.study.n_trials,
        n_rows=None if rows is None else len(rows.labels),
        base_rate=best.best.get("base_rate"),
        best=answer.skill_interval(found, best.trial_number),
        best_skill=found.skill(best.best),
        rival=rival,
        rival_skill=None if rival is None else found.skill(found.baselines[rival]["metrics"]),
        comparison=found.comparison,
        lead_share=_lead_share(found),
        shape=best.config.shape,
        param_count=best.param_count,
    )


def _lead_share(found: Evidence) -> tuple[float, float, float] | None:
    comparison, prior = found.comparison, found.baseline_series.get("prior")
    if comparison is None or prior is None:
        return None
    scale, lead = float(prior.mean()), comparison.difference
    return lead.mean / scale, lead.low / scale, lead.high / scale


def _label_notes(found: Sequence[Evidence]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for each in found:
        groups.setdefault(each.records[0].folds[0].label_hash, []).append(each.name)
    if len(groups) == 1:
        return ["All studies have the same labels: losses may be compared as well as skills."]
    same = [" = ".join(names) for names in groups.values() if len(names) > 1]
    words = f" Equal labels: {'; '.join(same)}." if same else ""
    return [f"The studies' labels differ: their losses can't be compared, their skills can with care.{words}"]


# --- shapes -----------------------------------------------------------------------------------------------------------


def _by_shape(found: Evidence) -> dict[Shape, list[float]]:
    held: dict[Shape, list[float]] = {}
    for record in found.ranked:
        skill = found.skill(record.best)
        if skill is not None:
            held.setdefault(record.config.shape, []).append(skill)
    return held


def _by_cell(found: Evidence) -> dict[tuple[int, int], list[float]]:
    held: dict[tuple[int, int], list[float]] = {}
    for shape, skills in _by_shape(found).items():
        held.setdefault((shape.d_model, depth_bucket(shape.n_layers)), []).extend(skills)
    return held


def _common(found: Sequence[Evidence]) -> tuple[Common, ...]:
    held = [_by_shape(each) for each in found]
    shapes = {shape for each in held for shape in each}
    several = [shape for shape in shapes if sum(shape in each for each in held) > 1]
    rows = [
        Common(
            shape,
            tuple(float(np.mean(each[shape])) if shape in each else None for each in held),
            tuple(len(each.get(shape, ())) for each in held),
        )
        for shape in several
    ]
    key = lambda row: (-float(np.mean([s for s in row.skills if s is not None])), str(row.shape))  # noqa: E731
    return tuple(sorted(rows, key=key))


def _transfer(winner_of: Evidence, trained_in: Evidence) -> Transfer:
    assert winner_of.best is not None and trained_in.best is not None
    shape = winner_of.best.config.shape
    skills = _by_shape(trained_in).get(shape, [])
    own = trained_in.skill(trained_in.best.best)
    best = max(skills, default=None)
    return Transfer(
        winner_of=winner_of.name,
        trained_in=trained_in.name,
        shape=shape,
        skill=best,
        n=len(skills),
        behind=None if best is None or own is None else own - best,
        fill="" if best is not None else _fill(shape, trained_in),
    )


def _fill(shape: Shape, trained_in: Evidence) -> str:
    """How a cell comes to be filled: a queue entry, unless the shape's size is not that study's."""
    spec, budget = trained_in.spec, trained_in.spec.budget
    for model in model_variants(spec):
        total = sizes.count(model, shape, len(spec.data.features)).total
        if not budget.low <= total <= budget.high:
            return f"{total:,} parameters lie outside the budget {budget.low:,} … {budget.high:,}"
    file = shlex.quote(f"sweeps/{trained_in.name}.toml")
    numbers = f"--d-model {shape.d_model} --n-layers {shape.n_layers} --n-heads {shape.n_heads} --d-ff {shape.d_ff}"
    return f"just queue add {file} {numbers}"


def _pair(first: Evidence, second: Evidence) -> Pair:
    return Pair(
        first.name,
        second.name,
        shapes=_agreement(_by_shape(first), _by_shape(second)),
        cells=_agreement(_by_cell(first), _by_cell(second)),
        difference=_difference(first, second),
    )


def _agreement(first: dict, second: dict) -> Agreement:
    shared = [key for key in first if key in second]
    means = [np.array([np.mean(held[key]) for key in shared], float) for held in (first, second)]
    return ranks.spearman(*means)


def _difference(first: Evidence, second: Evidence) -> Estimate | None:
    """Of the two best trials, on the same days."""
    a, b = _best_series(first), _best_series(second)
    if a is None or b is None or first.metric != second.metric or not _same_rows(first, second):
        return None
    saved = a - b
    block = significance.block_length(saved, horizon=first.spec.task.horizon)
    return significance.estimate(saved, significance.resample(len(saved), block))


def _best_series(found: Evidence) -> Floats | None:
    return None if found.best is None else found.series.get(found.best.trial_number)


def _same_rows(first: Evidence, second: Evidence) -> bool:
    return first.rows is not None and second.rows is not None and first.rows.key.equals(second.rows.key)
