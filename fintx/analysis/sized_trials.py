"""Sized trials: those of studies that differ in size alone, on the validation rows that all of them share.

Losses are taken relative to the best baseline's on the same days, so that a calm or wild regime, which moves both,
cancels: 1 is as good as the baseline, .98 saves two percent of its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fintx.analysis import predictions
from fintx.analysis.predictions import Rows
from fintx.analysis.study_results import StudyResults
from fintx.config.schema import StudySpec
from fintx.errors import FintxError
from fintx.evaluate import significance
from fintx.evaluate.significance import Resamples
from fintx.model import param_count
from fintx.study.records import TrialRecord
from fintx.types import Floats, Ints

LEAST_SIZES, LEAST_TRIALS, LEAST_PER_SIZE = 3, 8, 2
LEAST_SPAN = 2.0
"""Largest over smallest size: within less, nothing could be seen."""

Over = Literal["parameters", "data"]


class NotComparable(FintxError):
    """Studies that differ in more than size, or too few of them: no line is fitted through those."""


@dataclass(frozen=True, eq=False)
class SizedTrials:
    """Trials of several studies, by size."""

    over: Over
    studies: tuple[StudyResults, ...]
    """From the smallest size to the largest."""
    names: tuple[str, ...]
    cells: tuple[int | str, ...]
    """The sizes that were set out for, smallest first: budgets, or names of studies of different data."""
    cell: Ints
    """(T,) index of each trial's cell."""
    study: Ints
    """(T,) index of each trial's study."""
    number: Ints
    """(T,) trial numbers: the order in which a study's trials were asked for."""
    size: Floats
    """(T,) counted parameters, or training rows."""
    flops: Floats
    """(T,) floating-point operations of its training."""
    loss: Floats
    """(T,) relative to the best baseline's."""
    days: Floats
    """(T, D) losses by day."""
    baseline: str
    baseline_days: Floats
    """(D,)."""
    prior_loss: float
    baseline_loss: float
    n_rows: int
    resamples: Resamples
    notes: tuple[str, ...]


def gather(studies: Sequence[StudyResults], *, over: Over = "parameters") -> SizedTrials:
    """Put the successful trials of several studies on one axis.

    Raises:
        NotComparable: a line per reason why they may not be.
    """
    ordered = sorted(studies, key=lambda results: float(np.median([_size(r, over) for r in results.records])))
    if problems := [*_differences(ordered, over), *_missing(ordered)]:
        raise NotComparable("\n".join(problems))
    chosen = _shared_rows(ordered, over)
    shared = [results.rows.take(places) for results, places in zip(ordered, chosen, strict=True) if results.rows]
    rows = shared[-1]
    best = predictions.best_baseline(rows)
    if best is None:
        raise NotComparable(f"no fit: no baseline has a {rows.metric} on the {len(rows.labels):,} shared rows")
    baseline = best[0]
    baseline_days, prior_days = (_days(rows, rows.baselines[name]) for name in (baseline, "prior"))
    members = [
        (index, record, _days(shared[index], results.seed_outputs[record.trial_number][:, chosen[index]]))
        for index, results in enumerate(ordered)
        for record in results.records
        if record.trial_number in results.seed_outputs
    ]
    study = np.array([index for index, _, _ in members], int)
    named = [results.spec.budget.parameters if over == "parameters" else results.name for results in ordered]
    cells = list(dict.fromkeys(named))
    cell = np.array([cells.index(named[index]) for index in study], int)
    axis = np.array([_size(record, over) for _, record, _ in members], float)
    if problems := _too_few(cells, cell, axis, over):
        raise NotComparable("\n".join(problems))
    days = np.stack([series for _, _, series in members])
    block = significance.block_length((baseline_days - days).T, horizon=ordered[0].spec.task.horizon)
    return SizedTrials(
        over=over,
        studies=tuple(ordered),
        names=tuple(results.name for results in ordered),
        cells=tuple(cells),
        cell=cell,
        study=study,
        number=np.array([record.trial_number for _, record, _ in members], int),
        size=axis,
        flops=np.array([training_flops(record) for _, record, _ in members]),
        loss=days.mean(axis=1) / baseline_days.mean(),
        days=days,
        baseline=baseline,
        baseline_days=baseline_days,
        prior_loss=float(prior_days.mean()),
        baseline_loss=float(baseline_days.mean()),
        n_rows=len(chosen[-1]),
        resamples=significance.resample(days.shape[1], block),
        notes=(*_notes(ordered), *(f"{results.name}: {note}" for results in ordered for note in results.notes)),
    )


def training_flops(record: TrialRecord) -> float:
    """Forward and backward passes over every training window that the trial saw."""
    per_sample = param_count.flops(record.config.model, record.config.shape, len(record.config.data.features))
    seen = sum(fold.steps for fold in record.folds) * record.config.train.batch_size
    return seen * (per_sample.forward + per_sample.backward)


def _size(record: TrialRecord, over: Over) -> float:
    return record.param_count if over == "parameters" else float(np.mean([fold.n_train for fold in record.folds]))


def _days(rows: Rows, outputs: Floats) -> Floats:
    """(D,) losses by day on the shared rows, of a model's outputs or those of a trial's seeds."""
    return rows.by_day(rows.losses(outputs))


def _differences(studies: Sequence[StudyResults], over: Over) -> list[str]:
    """A line per respect in which studies differ that should not."""
    checks: list[tuple[str, Callable[[StudyResults], str]]] = [
        ("labels", lambda r: r.spec.task.rule.describe()),
        ("metrics", lambda r: r.spec.study.metric),
        ("splits", lambda r: _split_words(r.spec)),
        ("budget tolerances", lambda r: f"± {100 * r.spec.budget.tolerance:g} %"),
    ]
    if over == "parameters":
        checks += [("data", _data_words), ("label hashes", lambda r: hash_of(r, "label_hash"))]
    else:
        checks += [
            ("budgets", lambda r: f"{r.spec.budget.parameters:,}"),
            ("inputs", lambda r: f"{len(r.spec.data.features)} features, {r.spec.data.scaling}"),
        ]
    lines = []
    for what, words in checks:
        names: dict[str, list[str]] = {}
        for results in studies:
            names.setdefault(words(results), []).append(results.name)
        if len(names) > 1:
            parts = "; ".join(f"{', '.join(those)}: {text}" for text, those in names.items())
            lines.append(
                f"no fit: the studies differ in their {what} ({parts}); give studies that differ in size alone"
            )
    return lines


def _split_words(spec: StudySpec) -> str:
    return ", ".join(f"{key} {value}" for key, value in spec.split.model_dump(mode="json", exclude_none=True).items())


def _data_words(results: StudyResults) -> str:
    data = results.spec.data
    return f"{', '.join(data.assets)} with {len(data.features)} features, data hash {hash_of(results, 'data_hash')}"


def hash_of(results: StudyResults, name: str) -> str:
    """The first digits of a label or data hash of its trials."""
    return getattr(results.records[0].folds[0], name)[:12] if results.records[0].folds else "none"


def _missing(studies: Sequence[StudyResults]) -> list[str]:
    lines = []
    for results in studies:
        if not results.seed_outputs:
            why = "; ".join(results.notes) or "it has no successful trial"
            lines.append(f"no fit: {results.name}: {why}")
    return lines


def _too_few(cells: Sequence[int | str], cell: Ints, axis: Floats, over: Over) -> list[str]:
    words = "parameter budgets" if over == "parameters" else "amounts of training data"
    counts = np.bincount(cell, minlength=len(cells))
    lines = []
    if len(cells) < LEAST_SIZES:
        lines.append(f"no fit: {len(cells)} different {words}, wanted at least {LEAST_SIZES}; run more studies")
    elif axis.max() < LEAST_SPAN * axis.min():
        lines.append(
            f"no fit: sizes {axis.min():,.0f} … {axis.max():,.0f} span less than a factor of {LEAST_SPAN:g}; "
            "nothing could be seen in that; run studies further apart"
        )
    if few := [
        f"{name if isinstance(name, str) else format(name, ',')} has {n}"
        for name, n in zip(cells, counts, strict=True)
        if n < LEAST_PER_SIZE
    ]:
        lines.append(
            f"no fit: too few successful trials to know their spread: {', '.join(few)}, "
            f"wanted at least {LEAST_PER_SIZE} each; raise study.n_trials"
        )
    if counts.sum() < LEAST_TRIALS:
        lines.append(
            f"no fit: {counts.sum()} successful trials in all, wanted at least {LEAST_TRIALS}; raise study.n_trials"
        )
    return lines


def _shared_rows(studies: Sequence[StudyResults], over: Over) -> list[Ints]:
    """Per study the places of the rows that all have, in one order.

    Raises:
        NotComparable: rows, or labels on the same rows, that differ.
    """
    keys = []
    for results in studies:
        assert results.rows is not None
        keys.append(np.char.add(np.char.add(results.rows.dates.astype(str), " "), results.rows.assets))
    shared = keys[0]
    for key in keys[1:]:
        shared = np.intersect1d(shared, key)
    if over == "parameters" and any(len(shared) != len(key) for key in keys):
        names = ", ".join(f"{e.name} {len(key):,}" for e, key in zip(studies, keys, strict=True))
        raise NotComparable(f"no fit: the studies' validation rows differ ({names}; {len(shared):,} shared)")
    if not len(shared):
        raise NotComparable("no fit: the studies share no validation row; give panels that share assets and days")
    chosen = []
    for key in keys:
        order = np.argsort(key, kind="stable")
        chosen.append(order[np.searchsorted(key, np.sort(shared), sorter=order)])
    first = studies[0].rows.labels[chosen[0]]  # type: ignore[union-attr]
    for results, places in zip(studies[1:], chosen[1:], strict=True):
        if not np.array_equal(results.rows.labels[places], first):  # type: ignore[union-attr]
            raise NotComparable(f"no fit: {studies[0].name} and {results.name} have other labels on the same rows")
    return chosen


def _notes(studies: Sequence[StudyResults]) -> list[str]:
    """What may differ, but should be known: how the models were trained."""
    notes = []
    for what, words in (
        ("training settings", lambda e: e.spec.train.model_dump_json() + e.spec.optim.model_dump_json()),
        ("search spaces", lambda e: str({path: s.model_dump() for path, s in e.spec.space.items()})),
        ("model settings", lambda e: e.spec.model.model_dump_json()),
    ):
        if len({words(results) for results in studies}) > 1:
            notes.append(f"The studies' {what} differ: what looks like size may be that.")
    unfinished = [e.name for e in studies if len(e.records) < e.spec.study.n_trials]
    if unfinished:
        notes.append(f"Not finished yet: {', '.join(unfinished)}.")
    return notes
