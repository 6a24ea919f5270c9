"""Which trials of several studies may be set against their size? Only those that differ in nothing else; on equal rows.

Losses are taken relative to the best baseline's on the same days, so that a calm or wild regime, which moves both,
cancels: 1 is as good as the baseline, .98 saves two percent of its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fintx.config.schema import StudySpec
from fintx.evaluate import significance
from fintx.evaluate.significance import Resamples
from fintx.model import sizes
from fintx.report.evidence import LOSS_WORDS, Evidence
from fintx.report.words import count, listed
from fintx.study import lead
from fintx.study.predictions import Rows
from fintx.study.records import TrialRecord
from fintx.types import FintxError, Floats, Ints

Over = Literal["parameters", "data"]
LEAST_SIZES, LEAST_TRIALS, LEAST_PER_SIZE = 3, 8, 2
LEAST_SPAN = 2.0
"""Largest over smallest size: within less, nothing could be seen."""


class NotComparable(FintxError):
    """Studies that differ in more than size, or too few of them: no line is fitted through those."""


@dataclass(frozen=True, eq=False)
class Field:
    """Trials of several studies, by size."""

    over: Over
    studies: tuple[Evidence, ...]
    """From the smallest size to the largest."""
    names: tuple[str, ...]
    cells: tuple[str, ...]
    """The sizes that were set out for, smallest first: budgets, or studies of different data."""
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

    @property
    def loss_words(self) -> str:
        """What the loss is called."""
        return LOSS_WORDS[self.studies[0].metric]

    @property
    def size_words(self) -> str:
        """What is on the axis."""
        return "parameters" if self.over == "parameters" else "training rows"

    def resampled(self) -> Floats:
        """(T, R) relative losses on the resampled days."""
        weights = self.resamples.weights.T
        return (self.days @ weights) / (self.baseline_days @ weights)


def gather(found: Sequence[Evidence], *, over: Over = "parameters") -> Field:
    """Put the successful trials of several studies on one axis.

    Raises:
        NotComparable: a line per reason why they may not be.
    """
    ordered = sorted(found, key=_typical_size(over))
    if problems := [*_differences(ordered, over), *_missing(ordered)]:
        raise NotComparable("\n".join(problems))
    chosen = _shared_rows(ordered, over)
    shared = [evidence.rows.take(places) for evidence, places in zip(ordered, chosen, strict=True) if evidence.rows]
    rows = shared[-1]
    best = lead.best_baseline(rows)
    if best is None:
        raise NotComparable(f"no fit: no baseline has a {rows.metric} on the {len(rows.labels):,} shared rows")
    baseline = best[0]
    baseline_days, prior_days = (_days(rows, rows.baselines[n]) for n in (baseline, "prior"))
    members = [
        (index, record, _days(shared[index], evidence.seeds[record.trial_number][:, chosen[index]]))
        for index, evidence in enumerate(ordered)
        for record in sorted(evidence.ranked, key=lambda r: r.trial_number)
        if record.trial_number in evidence.seeds
    ]
    study = np.array([index for index, _, _ in members], int)
    named = [count(e.spec.budget.parameters) if over == "parameters" else e.name for e in ordered]
    cells = list(dict.fromkeys(named))
    cell = np.array([cells.index(named[index]) for index in study], int)
    axis = np.array([_size(record, over) for _, record, _ in members], float)
    if problems := _too_few(cells, cell, axis, over):
        raise NotComparable("\n".join(problems))
    days = np.stack([series for _, _, series in members])
    gains = (baseline_days - days).T
    block = significance.block_length(gains, horizon=ordered[0].spec.task.horizon)
    return Field(
        over=over,
        studies=tuple(ordered),
        names=tuple(evidence.name for evidence in ordered),
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
        notes=(*_notes(ordered), *(f"{each.name}: {note}" for each in ordered for note in each.notes)),
    )


def training_flops(record: TrialRecord) -> float:
    """Forward and backward passes over every training window that the trial saw."""
    per_sample = sizes.flops(record.config.model, record.config.shape, len(record.config.data.features))
    seen = sum(fold.steps for fold in record.folds) * record.config.train.batch_size
    return seen * (per_sample.forward + per_sample.backward)


def _size(record: TrialRecord, over: Over) -> float:
    return record.param_count if over == "parameters" else float(np.mean([fold.n_train for fold in record.folds]))


def _typical_size(over: Over) -> Callable[[Evidence], float]:
    return lambda evidence: float(np.median([_size(record, over) for record in evidence.records]))


def _days(rows: Rows, outputs: Floats) -> Floats:
    """(D,) losses by day on the shared rows, of a model's outputs or those of a trial's seeds."""
    return rows.series(rows.losses(outputs))


# --- what must be equal -----------------------------------------------------------------------------------------------


def _differences(found: Sequence[Evidence], over: Over) -> list[str]:
    """A line per respect in which studies differ that should not."""
    checks: list[tuple[str, Callable[[Evidence], str]]] = [
        ("labels", lambda e: e.spec.task.rule.describe()),
        ("metrics", lambda e: e.spec.study.metric),
        ("splits", lambda e: _split_words(e.spec)),
        ("budget tolerances", lambda e: f"± {100 * e.spec.budget.tolerance:g} %"),
    ]
    if over == "parameters":
        checks += [
            ("data", lambda e: _data_words(e)),
            ("label hashes", lambda e: _hash(e, "label_hash")),
        ]
    else:
        checks += [
            ("budgets", lambda e: count(e.spec.budget.parameters)),
            ("inputs", lambda e: f"{len(e.spec.data.features)} features, {e.spec.data.scaling}"),
        ]
    return [line for what, words in checks if (line := _difference(what, found, words))]


def _difference(what: str, found: Sequence[Evidence], words: Callable[[Evidence], str]) -> str:
    held: dict[str, list[str]] = {}
    for evidence in found:
        held.setdefault(words(evidence), []).append(evidence.name)
    if len(held) < 2:
        return ""
    parts = "; ".join(f"{listed(names)}: {text}" for text, names in held.items())
    return f"no fit: the studies differ in their {what} ({parts}); give studies that differ in size alone"


def _split_words(spec: StudySpec) -> str:
    return ", ".join(f"{key} {value}" for key, value in spec.split.model_dump(mode="json", exclude_none=True).items())


def _data_words(evidence: Evidence) -> str:
    data = evidence.spec.data
    return f"{', '.join(data.assets)} with {len(data.features)} features, data hash {_hash(evidence, 'data_hash')}"


def _hash(evidence: Evidence, name: str) -> str:
    return getattr(evidence.records[0].folds[0], name)[:12] if evidence.records[0].folds else "none"


def _missing(found: Sequence[Evidence]) -> list[str]:
    lines = []
    for evidence in found:
        if not evidence.seeds:
            why = "; ".join(evidence.notes) or "it has no successful trial"
            lines.append(f"no fit: {evidence.name}: {why}")
    return lines


def _too_few(cells: Sequence[str], cell: Ints, axis: Floats, over: Over) -> list[str]:
    words = "parameter budgets" if over == "parameters" else "amounts of training data"
    counts = np.bincount(cell, minlength=len(cells))
    lines = []
    if len(cells) < LEAST_SIZES:
        lines.append(f"no fit: {len(cells)} different {words}, wanted at least {LEAST_SIZES}; run more studies")
    elif axis.max() < LEAST_SPAN * axis.min():
        lines.append(
            f"no fit: sizes {count(axis.min())} … {count(axis.max())} span less than a factor of {LEAST_SPAN:g}; "
            "nothing could be seen in that; run studies further apart"
        )
    if few := [f"{name} has {n}" for name, n in zip(cells, counts, strict=True) if n < LEAST_PER_SIZE]:
        lines.append(
            f"no fit: too few successful trials to know their spread: {', '.join(few)}, "
            f"wanted at least {LEAST_PER_SIZE} each; raise study.n_trials"
        )
    if counts.sum() < LEAST_TRIALS:
        lines.append(
            f"no fit: {counts.sum()} successful trials in all, wanted at least {LEAST_TRIALS}; raise study.n_trials"
        )
    return lines


def _shared_rows(found: Sequence[Evidence], over: Over) -> list[Ints]:
    """Per study the places of the rows that all have, in one order.

    Raises:
        NotComparable: rows, or labels on the same rows, that differ.
    """
    keys = []
    for evidence in found:
        assert evidence.rows is not None
        assets = np.asarray(evidence.rows.key["asset"].to_pylist())
        keys.append(np.char.add(np.char.add(evidence.rows.dates.astype(str), " "), assets))
    shared = keys[0]
    for key in keys[1:]:
        shared = np.intersect1d(shared, key)
    if over == "parameters" and any(len(shared) != len(key) for key in keys):
        names = ", ".join(f"{e.name} {len(key):,}" for e, key in zip(found, keys, strict=True))
        raise NotComparable(f"no fit: the studies' validation rows differ ({names}; {len(shared):,} shared)")
    if not len(shared):
        raise NotComparable("no fit: the studies share no validation row; give panels that share assets and days")
    chosen = []
    for key in keys:
        order = np.argsort(key, kind="stable")
        chosen.append(order[np.searchsorted(key, np.sort(shared), sorter=order)])
    first = found[0].rows.labels[chosen[0]]  # type: ignore[union-attr]
    for evidence, places in zip(found[1:], chosen[1:], strict=True):
        if not np.array_equal(evidence.rows.labels[places], first):  # type: ignore[union-attr]
            raise NotComparable(f"no fit: {found[0].name} and {evidence.name} have other labels on the same rows")
    return chosen


def _notes(found: Sequence[Evidence]) -> list[str]:
    """What may differ, but should be known: how the models were trained."""
    notes = []
    for what, words in (
        ("training settings", lambda e: e.spec.train.model_dump_json() + e.spec.optim.model_dump_json()),
        ("search spaces", lambda e: str({path: s.model_dump() for path, s in e.spec.space.items()})),
        ("model settings", lambda e: e.spec.model.model_dump_json()),
    ):
        if len({words(evidence) for evidence in found}) > 1:
            notes.append(f"The studies' {what} differ: what looks like size may be that.")
    unfinished = [e.name for e in found if len(e.records) < e.spec.study.n_trials]
    if unfinished:
        notes.append(f"Not finished yet: {listed(unfinished)}.")
    return notes
