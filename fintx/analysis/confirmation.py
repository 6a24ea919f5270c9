"""Confirmation: a study's best trials, trained again, against the baselines and the whole search, row by row.

outputs/<study>/confirmation.json holds it, rewritten at the end of every run of a confirmation as far as that got.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from fintx.analysis import predictions
from fintx.analysis.predictions import Rows
from fintx.config.schema import Shape, StudySpec
from fintx.data import features, sources
from fintx.errors import FintxError
from fintx.evaluate import metrics, selection, significance
from fintx.evaluate.metrics import Metrics
from fintx.evaluate.selection import Verdict
from fintx.evaluate.significance import LEVEL, REPS, Estimate, Resamples
from fintx.study import records, study_file
from fintx.study.records import RecordModel, TrialRecord
from fintx.types import Floats

FILE = "confirmation.json"
GroupKind = Literal["fold", "year", "vix"]


class SubsetGain(RecordModel):
    """A candidate's gain over the best baseline on some of the rows."""

    kind: GroupKind
    name: str
    """The fold, counted from 1; the year; or calm, middling, nervous: the thirds of VIX."""
    n: int
    """Number of rows."""
    gain: Estimate


class Ensemble(RecordModel):
    """A candidate's reruns as one model: their mean probability, or mean return."""

    metrics: Metrics
    gain: Estimate
    """Over the best baseline."""


class Candidate(RecordModel):
    """One of the search's best trials, trained again."""

    trial: int
    shape: Shape
    param_count: int
    search_value: float
    """The study's metric as the search found it."""
    values: tuple[float | None, ...]
    """The same with each fresh seed; none: that rerun failed."""
    outcomes: tuple[str, ...]
    verdict: Verdict | None
    """None: not judged, because a rerun failed or none is finished."""
    too_good: Estimate | None
    """By how much the search's loss lies below the fresh seeds'; none without the search's predictions."""
    metrics: Metrics
    """Mean over the seeds."""
    ensemble: Ensemble | None
    groups: tuple[SubsetGain, ...]

    @property
    def words(self) -> str:
        """The verdict, or why there is none."""
        if self.verdict is not None:
            return self.verdict.words
        failed = [outcome for outcome in self.outcomes if outcome not in records.SUCCESSES]
        return f"not confirmed: {len(failed)} of {len(self.outcomes)} seeds {failed[0]}" if failed else "not judged yet"

    @property
    def spread(self) -> float | None:
        """Standard deviation of the study's metric between the fresh seeds; none for fewer than two that succeeded."""
        return _spread([value for value in self.values if value is not None])

    def of_kind(self, kind: str) -> tuple[SubsetGain, ...]:
        """Its gains by fold, by year, or by third of VIX."""
        return tuple(group for group in self.groups if group.kind == kind)

    def spread_of_gains(self, kind: str) -> float | None:
        """Standard deviation of those gains."""
        return _spread([group.gain.mean for group in self.of_kind(kind)])

    @property
    def mean_value(self) -> float | None:
        """The study's metric, mean over the fresh seeds that succeeded."""
        values = [value for value in self.values if value is not None]
        return float(np.mean(values)) if values else None


class Confirmation(RecordModel):
    """confirmation.json."""

    study: str
    created: str
    complete: bool
    """Every rerun is trained."""
    n_members: int
    n_trained: int
    seeds: tuple[int, ...]
    """Those with which every candidate has been trained: what is compared."""
    n_seeds: int
    """Number of seeds that were asked for."""
    n_trials: int
    """Asked for, of the search."""
    n_finished: int
    """Of the search, when this was written."""
    n_compared: int
    """Trials in the tests over the whole search: the successful ones with predictions in the folder."""
    metric: str
    loss: str
    """The metric that gains are in: the study's; log_loss in older ones of a ranking."""
    level: float
    reps: int
    block: int | None
    """Days, mean length of the bootstrap's blocks."""
    n_rows: int
    n_days: int
    baseline: str
    """The best one in the study's metric."""
    baseline_loss: float
    """1 − the metric for a ranking, as every loss here."""
    superior_p_value: float | None
    """Hansen's SPA: of "no trial of the search beats the best baseline"."""
    overfitting: float | None
    """Probability of backtest overfitting over the search's own trials; none for fewer than two of them."""
    luck: float | None
    """How much better than their average the best of so many equal trials looks on these rows by chance."""
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]

    def _judged(self) -> list[tuple[Candidate, Verdict]]:
        return [(candidate, candidate.verdict) for candidate in self.candidates if candidate.verdict is not None]

    @property
    def best(self) -> Candidate | None:
        """That with the least mean loss over fresh seeds."""
        return next((candidate for candidate, verdict in self._judged() if verdict.best), None)

    @property
    def confirmed(self) -> tuple[Candidate, ...]:
        """Those that beat the best baseline with confidence, the best first."""
        ranked = sorted(self._judged(), key=lambda pair: pair[1].loss.mean)
        return tuple(candidate for candidate, verdict in ranked if verdict.confirmed)

    @property
    def alike(self) -> tuple[Candidate, ...]:
        """Those that can't be told from the best, itself left out."""
        judged = self._judged()
        return tuple(candidate for candidate, verdict in judged if verdict.indistinguishable and not verdict.best)


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def write(study_folder: Path, confirmation: Confirmation) -> None:
    """Write confirmation.json, whole or not at all.

    Raises:
        FintxError: it can't be written.
    """
    records.write_atomically(study_folder / FILE, confirmation.model_dump_json(indent=1) + "\n")


def read(study_folder: Path) -> Confirmation | None:
    """The confirmation of the study in a folder; none if there has been none.

    Raises:
        DamagedRecord: the file is there but is not fintx's.
    """
    path = study_folder / FILE
    if not path.is_file():
        return None
    try:
        return Confirmation.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise records.DamagedRecord(
            f"{path}: is no confirmation of this fintx ({type(error).__name__}); delete it and run: just confirm "
            f"{study_folder}"
        ) from None


def build(
    study_folder: Path, spec: StudySpec, trials: Sequence[TrialRecord], seeds: Sequence[int], *, data_root: Path
) -> Confirmation:
    """Compare the reruns in a study's folder.

    Args:
        trials: the candidates, in the search's order.
        seeds: asked for; compared are those that every candidate has been trained with.

    Raises:
        FintxError: the baselines' or a rerun's predictions are missing or damaged.
    """
    rows = predictions.read_rows(study_folder, spec)
    best = predictions.best_baseline(rows)
    if best is None:
        raise FintxError(f"{study_folder}: no baseline has a {rows.metric} on its validation rows to compare with")
    reruns = _read_reruns(study_folder, trials, seeds, rows)
    outputs = reruns.outputs
    finished = records.read_all(study_folder)
    search_losses, missing = _search_losses(study_folder, finished, rows)
    baseline_losses, search_days = rows.losses(rows.baselines[best[0]]), _by_day(rows, search_losses)
    judgement, verdicts, against = None, {}, None
    if outputs:
        fresh_days = np.array([[rows.by_day(rows.losses(of_seed)) for of_seed in own] for own in outputs.values()])
        others = {number: losses for number, losses in search_losses.items() if number not in outputs}
        judgement = selection.judge(
            fresh_days, rows.by_day(baseline_losses), _by_day(rows, others), horizon=rows.horizon
        )  # fmt: skip
        verdicts = dict(zip(outputs, judgement.verdicts, strict=True))
        against = _Against(rows, rows.baselines[best[0]], judgement.resamples, _subsets(rows, spec, data_root))
    several, can_split = search_days.shape[1] > 1, len(search_days) >= selection.N_BLOCKS
    return Confirmation(
        study=spec.study.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        complete=reruns.n_trained == len(trials) * len(seeds),
        n_members=len(trials) * len(seeds),
        n_trained=reruns.n_trained,
        seeds=reruns.seeds,
        n_seeds=len(seeds),
        n_trials=spec.study.n_trials,
        n_finished=len(finished),
        n_compared=len(search_losses),
        metric=spec.study.metric,
        loss=rows.metric,
        level=LEVEL,
        reps=REPS,
        block=judgement.resamples.block if judgement else None,
        n_rows=len(rows.labels),
        n_days=len(search_days),
        baseline=best[0],
        baseline_loss=float(baseline_losses.mean()),
        superior_p_value=judgement.superior_p_value if judgement else None,
        overfitting=selection.overfitting_probability(search_days) if several and can_split else None,
        luck=selection.luck_of_the_best(search_days, judgement.resamples) if judgement and several else None,
        candidates=tuple(
            _candidate(record, reruns.records[n], verdicts.get(n), outputs.get(n), search_losses.get(n), against)
            for n, record in ((record.trial_number, record) for record in trials)
        ),
        notes=_notes(study_folder, spec, finished, missing),
    )


@dataclass(frozen=True)
class _Reruns:
    """The reruns in a study's folder, by trial number."""

    n_trained: int
    seeds: tuple[int, ...]
    """Those that every candidate has been trained with."""
    records: dict[int, list[TrialRecord]]
    """One per seed."""
    outputs: dict[int, Floats]
    """(seeds, S) validation outputs, of candidates whose reruns all succeeded."""


def _read_reruns(
    study_folder: Path, trials: Sequence[TrialRecord], seeds: Sequence[int], rows: Rows
) -> _Reruns:  # fmt: skip
    folders = {
        (record.trial_number, seed): records.rerun_folder(study_folder, record.trial_number, seed)
        for record in trials
        for seed in seeds
    }
    trained = {
        key: records.read(folder / "record.json")
        for key, folder in folders.items()
        if (folder / "record.json").is_file()
    }
    shared = tuple(seed for seed in seeds if all((record.trial_number, seed) in trained for record in trials))
    by_trial = {record.trial_number: [trained[record.trial_number, seed] for seed in shared] for record in trials}
    outputs = {
        number: np.array([predictions.read_outputs(folders[number, seed], rows) for seed in shared])
        for number, reruns in by_trial.items()
        if reruns and all(rerun.value is not None for rerun in reruns)
    }
    return _Reruns(len(trained), shared, by_trial, outputs)


def _search_losses(
    study_folder: Path, finished: Sequence[TrialRecord], rows: Rows
) -> tuple[dict[int, Floats], list[str]]:  # fmt: skip
    """The search's successful trials, number → (S,) losses; and why the others can't be compared."""
    losses, missing = {}, []
    for record in finished:
        if record.value is not None:
            try:
                losses[record.trial_number] = predictions.trial_losses(study_folder, record.trial_number, rows)
            except FintxError as error:
                missing.append(str(error))
    return losses, missing


def _by_day(rows: Rows, losses: dict[int, Floats]) -> Floats:
    """(D, M) losses by day, a column per model; (D, 0) of none."""
    columns = [rows.by_day(of_model) for of_model in losses.values()]
    return np.column_stack(columns) if columns else np.zeros((len(np.unique(rows.dates)), 0))


@dataclass(frozen=True, eq=False)
class _Against:
    """What candidates are compared with."""

    rows: Rows
    baseline: Floats
    """(S,) outputs."""
    resamples: Resamples
    subsets: dict[tuple[GroupKind, str], np.ndarray]
    """(kind, name) → (S,) bool."""

    def too_good(self, fresh: Floats, search_losses: Floats) -> Estimate:
        """By how much the search's losses lie below those of (N, S) fresh outputs."""
        above = np.array([self.rows.losses(of_seed) for of_seed in fresh]) - search_losses
        return significance.estimate(self.rows.by_day(above.mean(axis=0)), self.resamples, seeds=above.mean(axis=1))

    def gain_among(self, chosen: np.ndarray, fresh: Floats) -> Estimate | None:
        """The gain of (N, S) fresh outputs over the baseline on some rows; none where a ranking is undefined."""
        over = self.rows.losses_among(chosen, self.baseline)
        gains = np.array([over - self.rows.losses_among(chosen, of_seed) for of_seed in fresh])
        defined = np.isfinite(gains[0])
        if not defined.any():
            return None
        series = self.rows.by_day(np.nan_to_num(gains.mean(axis=0)), chosen=defined)
        return significance.estimate(series, self.resamples, seeds=gains[:, defined].mean(axis=1))

    def ensemble(self, fresh: Floats, record: TrialRecord) -> Ensemble:
        """Of (N, S) fresh outputs; the record says each fold's training prior."""
        rows, outputs = self.rows, metrics.ensemble(self.rows.predicts, fresh)
        priors = [float(fold.best["prior"]) for fold in record.folds if fold.best["prior"] is not None]
        scored = [
            metrics.evaluate(rows.predicts, outputs[rows.fold == fold], rows.labels[rows.fold == fold], prior=prior)
            for fold, prior in enumerate(priors)
        ]
        gains = rows.by_day(rows.losses(self.baseline) - rows.losses(outputs))
        return Ensemble(metrics=records.mean_metrics(scored), gain=significance.estimate(gains, self.resamples))


def _candidate(
    record: TrialRecord, reruns: Sequence[TrialRecord], verdict: Verdict | None, fresh: Floats | None,
    search_losses: Floats | None, against: _Against | None,
) -> Candidate:  # fmt: skip
    assert record.value is not None
    too_good, ensemble, groups = None, None, []
    if against is not None and fresh is not None:
        too_good = None if search_losses is None else against.too_good(fresh, search_losses)
        ensemble = against.ensemble(fresh, record)
        for (kind, name), chosen in against.subsets.items():
            if (gain := against.gain_among(chosen, fresh)) is not None:
                groups.append(SubsetGain(kind=kind, name=name, n=int(chosen.sum()), gain=gain))
    return Candidate(
        trial=record.trial_number,
        shape=record.config.shape,
        param_count=record.param_count,
        search_value=record.value,
        values=tuple(rerun.value for rerun in reruns),
        outcomes=tuple(rerun.outcome for rerun in reruns),
        verdict=verdict,
        too_good=too_good,
        metrics=records.mean_over_seeds([rerun.best for rerun in reruns if rerun.value is not None]),
        ensemble=ensemble,
        groups=tuple(groups),
    )


def _subsets(rows: Rows, spec: StudySpec, data_root: Path) -> dict[tuple[GroupKind, str], np.ndarray]:
    """Every fold where there are several, every year, and every third of VIX: (kind, name) → (S,) bool."""
    subsets: dict[tuple[GroupKind, str], np.ndarray] = {}
    folds = np.unique(rows.fold)
    if len(folds) > 1:
        subsets |= {("fold", str(int(fold) + 1)): rows.fold == fold for fold in folds}
    years = rows.dates.astype("datetime64[Y]")
    subsets |= {("year", str(year)): years == year for year in np.unique(years)}
    if features.VIX in spec.data.context:
        vix = sources.load(features.VIX, root=data_root, version=spec.data.versions.get(features.VIX))
        days, place = np.unique(rows.dates, return_inverse=True)
        third = significance.tercile_indices(features.as_of(days, vix.dates, vix.close))[place]
        subsets |= {("vix", name): third == i for i, name in enumerate(("calm", "middling", "nervous"))}
    return {key: chosen for key, chosen in subsets.items() if chosen.any()}


def _notes(
    study_folder: Path, spec: StudySpec, finished: Sequence[TrialRecord], missing: Sequence[str]
) -> tuple[str, ...]:  # fmt: skip
    notes = [opened] if (opened := study_file.openings_note(study_folder)) else []
    if len(finished) < spec.study.n_trials:
        notes.append(f"the study is unfinished: its best of {len(finished)} trials so far, of {spec.study.n_trials}")
    if failed := sum(record.value is None for record in finished):
        notes.append(f"{failed} trials of the search failed; they can't have won, and are in no test")
    if missing:
        notes.append(f"{len(missing)} trials are in no test over the whole search: {missing[0]}")
    return tuple(notes)
