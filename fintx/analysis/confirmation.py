"""What came of training a study's best trials again? Compared row by row with the baselines and the whole search.

outputs/<study>/confirmation.json holds it: written at the end of every run of a confirmation, as far as that got
(comparison makes it).
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from fintx.analysis import predictions
from fintx.analysis.predictions import Rows
from fintx.config.schema import Shape, StudySpec
from fintx.data import features, indicators, sources
from fintx.errors import FintxError
from fintx.evaluate import metrics, selection, significance
from fintx.evaluate.selection import Judgement, Verdict
from fintx.evaluate.significance import LEVEL, REPS, Estimate, Resamples
from fintx.study import records, study_file
from fintx.study.records import Metrics, RecordModel, TrialRecord
from fintx.types import Floats

FILE = "confirmation.json"
GroupKind = Literal["fold", "year", "vix"]


class SubsetGain(RecordModel):
    """A candidate's gain over the best baseline on some of the rows."""

    kind: GroupKind
    name: str
    """The fold, counted from 1; the year; or calm, middling, nervous: the thirds of VIX."""
    n: int
    """Rows."""
    gain: Estimate


class Ensemble(RecordModel):
    """The candidate's reruns as one model, by their mean probability (or mean return)."""

    metrics: Metrics
    gain: Estimate
    """Over the best baseline."""


class Candidate(RecordModel):
    """One of the search's best, trained again."""

    trial: int
    shape: Shape
    param_count: int
    search_value: float
    """The study's metric as the search found it."""
    values: tuple[float | None, ...]
    """The same with each fresh seed; none: that rerun failed."""
    outcomes: tuple[str, ...]
    """Of the reruns."""
    verdict: Verdict | None
    """None: not judged, because a rerun failed or none is finished."""
    too_good: Estimate | None
    """By how much the search's mean loss per row lies below the fresh seeds'; none without its predictions."""
    metrics: Metrics
    """Mean over the seeds."""
    ensemble: Ensemble | None
    groups: tuple[SubsetGain, ...]

    @property
    def words(self) -> str:
        """The result in words."""
        if self.verdict is not None:
            return self.verdict.words
        failed = [outcome for outcome in self.outcomes if outcome not in records.SUCCESSES]
        return f"not confirmed: {len(failed)} of {len(self.outcomes)} seeds {failed[0]}" if failed else "not judged yet"

    @property
    def spread(self) -> float | None:
        """Standard deviation of the study's metric between the fresh seeds; none for fewer than two that succeeded."""
        return _spread([value for value in self.values if value is not None])

    def of_kind(self, kind: str) -> tuple[SubsetGain, ...]:
        """Its folds, its years, or its thirds of VIX."""
        return tuple(group for group in self.groups if group.kind == kind)

    def spread_of_gains(self, kind: str) -> float | None:
        """Standard deviation of its gain between those groups."""
        return _spread([group.gain.mean for group in self.of_kind(kind)])

    @property
    def mean_value(self) -> float | None:
        """The study's metric, mean over the fresh seeds that succeeded."""
        known = [value for value in self.values if value is not None]
        return float(np.mean(known)) if known else None


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
    """Wanted."""
    n_trials: int
    """Of the study, wanted."""
    n_finished: int
    """Of the search when this was written; fewer: the study was, or is, unfinished."""
    n_compared: int
    """Trials in the tests over the whole search: the successful ones whose predictions lie here."""
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

    @property
    def best(self) -> Candidate | None:
        """That with the least mean loss over fresh seeds."""
        return next((each for each in self.candidates if each.verdict is not None and each.verdict.best), None)

    @property
    def confirmed(self) -> tuple[Candidate, ...]:
        """Those that beat the best baseline with confidence, the best first."""
        found = [each for each in self.candidates if each.verdict is not None and each.verdict.confirmed]
        return tuple(sorted(found, key=lambda each: each.verdict.loss.mean))  # type: ignore[union-attr]

    @property
    def alike(self) -> tuple[Candidate, ...]:
        """Those that can't be told from the best, itself left out."""
        judged = [each for each in self.candidates if each.verdict is not None and not each.verdict.best]
        return tuple(each for each in judged if each.verdict is not None and each.verdict.indistinguishable)


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def write(study_folder: Path, found: Confirmation) -> None:
    """Write confirmation.json, whole or not at all.

    Raises:
        FintxError: it can't be written.
    """
    records.write_atomically(study_folder / FILE, found.model_dump_json(indent=1) + "\n")


def read(study_folder: Path) -> Confirmation | None:
    """The confirmation of the study in a folder; none: there has been none.

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
    """Compare what lies in the folder.

    Args:
        trials: the candidates, in the search's order.
        seeds: wanted for each; compared are those that every candidate has been trained with.

    Raises:
        FintxError: the baselines' or a rerun's predictions are missing or damaged.
    """
    rows = predictions.read_rows(study_folder, spec)
    reruns = {
        (record.trial_number, seed): records.read(path)
        for record in trials
        for seed in seeds
        if (path := records.rerun_folder(study_folder, record.trial_number, seed) / "record.json").is_file()
    }
    paired = [seed for seed in seeds if all((record.trial_number, seed) in reruns for record in trials)]
    again = {record.trial_number: [reruns[record.trial_number, seed] for seed in paired] for record in trials}
    outputs = {
        number: _rerun_outputs(study_folder, number, paired, rows)
        for number, held in again.items()
        if held and all(rerun.value is not None for rerun in held)
    }
    finished = records.read_all(study_folder)
    searched, missing = _searched(study_folder, finished, rows)
    best = predictions.best_baseline(rows)
    if best is None:
        raise FintxError(f"{study_folder}: no baseline has a {rows.metric} on its validation rows to compare with")
    name = best[0]
    baseline = rows.losses(rows.baselines[name])
    found = _judge(outputs, rows, rows.series(baseline), searched)
    whole = predictions.series_of(searched, rows)
    judged = dict(zip(outputs, found.verdicts, strict=True)) if found else {}
    groups = _groups(rows, spec, data_root)
    return Confirmation(
        study=spec.study.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        complete=len(reruns) == len(trials) * len(seeds),
        n_members=len(trials) * len(seeds),
        n_trained=len(reruns),
        seeds=tuple(paired),
        n_seeds=len(seeds),
        n_trials=spec.study.n_trials,
        n_finished=len(finished),
        n_compared=len(searched),
        metric=spec.study.metric,
        loss=rows.metric,
        level=LEVEL,
        reps=REPS,
        block=found.resamples.block if found else None,
        n_rows=len(rows.labels),
        n_days=len(whole),
        baseline=name,
        baseline_loss=float(baseline.mean()),
        superior_p_value=found.superior_p_value if found else None,
        overfitting=selection.overfitting_probability(whole) if _can_split(whole) else None,
        luck=selection.luck_of_the_best(whole, found.resamples) if found and whole.shape[1] > 1 else None,
        candidates=tuple(
            _candidate(
                record, again[record.trial_number], judged.get(record.trial_number),
                _Compared(rows, name, found, outputs.get(record.trial_number), searched.get(record.trial_number)),
                groups,
            )
            for record in trials
        ),
        notes=_notes(study_folder, spec, finished, missing),
    )  # fmt: skip


def _rerun_outputs(study_folder: Path, number: int, seeds: Sequence[int], rows: Rows) -> Floats:
    """(N, S)."""
    folders = [records.rerun_folder(study_folder, number, seed) for seed in seeds]
    return np.array([predictions.read_outputs(folder, rows) for folder in folders])


def _searched(
    study_folder: Path, finished: Sequence[TrialRecord], rows: Rows
) -> tuple[dict[int, Floats], list[str]]:  # fmt: skip
    """The search's successful trials: number → losses; and why the rest can't be compared."""
    found, missing = {}, []
    for record in finished:
        if record.value is None:
            continue
        try:
            found[record.trial_number] = predictions.trial_losses(study_folder, record.trial_number, rows)
        except FintxError as error:  # told in the notes
            missing.append(str(error))
    return found, missing


def _judge(
    outputs: dict[int, Floats], rows: Rows, baseline: Floats, searched: dict[int, Floats]
) -> Judgement | None:  # fmt: skip
    if not outputs:
        return None
    fresh = np.array([[rows.series(rows.losses(each)) for each in held] for held in outputs.values()])
    others = {number: each for number, each in searched.items() if number not in outputs}
    return selection.judge(fresh, baseline, predictions.series_of(others, rows), horizon=rows.horizon)


def _can_split(whole: Floats) -> bool:
    return whole.shape[1] > 1 and len(whole) >= selection.N_BLOCKS


class _Compared:
    """What a candidate is compared with."""

    def __init__(self, rows: Rows, baseline: str, found: Judgement | None, fresh: Floats | None, search: Floats | None):
        self.rows, self.baseline, self.fresh = rows, rows.baselines[baseline], fresh
        self.resamples: Resamples | None = found.resamples if found else None
        self.losses = None if fresh is None else np.array([rows.losses(each) for each in fresh])  # (N, S)
        self.search = search

    def too_good(self) -> Estimate | None:
        """By how much the search's losses lie below the reruns', with the error of their seeds."""
        if self.search is None:
            return None
        assert self.losses is not None and self.resamples is not None
        above = self.losses - self.search
        return significance.estimate(self.rows.series(above.mean(axis=0)), self.resamples, seeds=above.mean(axis=1))

    def gain_among(self, chosen: np.ndarray) -> Estimate | None:
        """The reruns' gain over the baseline on some rows; none where a ranking of them is undefined."""
        assert self.fresh is not None and self.resamples is not None
        over = self.rows.losses_among(chosen, self.baseline)
        saved = np.array([over - self.rows.losses_among(chosen, outputs) for outputs in self.fresh])
        defined = np.isfinite(saved[0])
        if not defined.any():
            return None
        series = self.rows.series(np.nan_to_num(saved.mean(axis=0)), chosen=defined)
        return significance.estimate(series, self.resamples, seeds=saved[:, defined].mean(axis=1))


def _candidate(
    record: TrialRecord, held: Sequence[TrialRecord], judged: Verdict | None, compared: _Compared,
    groups: Sequence[tuple[GroupKind, str, np.ndarray]],
) -> Candidate:  # fmt: skip
    assert record.value is not None
    too_good, ensemble = None, None
    parts: tuple[SubsetGain, ...] = ()
    if judged is not None and compared.fresh is not None:
        too_good = compared.too_good()
        ensemble = _ensemble(record, compared)
        parts = tuple(
            SubsetGain(kind=kind, name=name, n=int(chosen.sum()), gain=gain)
            for kind, name, chosen in groups
            if (gain := compared.gain_among(chosen)) is not None
        )
    return Candidate(
        trial=record.trial_number,
        shape=record.config.shape,
        param_count=record.param_count,
        search_value=record.value,
        values=tuple(rerun.value for rerun in held),
        outcomes=tuple(rerun.outcome for rerun in held),
        verdict=judged,
        too_good=too_good,
        metrics=records.mean_over_seeds([rerun.best for rerun in held if rerun.value is not None]),
        ensemble=ensemble,
        groups=parts,
    )


def _ensemble(record: TrialRecord, compared: _Compared) -> Ensemble:
    rows = compared.rows
    assert compared.fresh is not None and compared.resamples is not None
    outputs = metrics.ensemble(rows.predicts, compared.fresh)
    saved = rows.series(rows.losses(compared.baseline) - rows.losses(outputs))
    scored = [
        metrics.evaluate(rows.predicts, outputs[rows.fold == fold], rows.labels[rows.fold == fold], prior=prior)
        for fold, prior in enumerate(_priors(record))
    ]
    return Ensemble(
        metrics=records.mean_metrics(scored), gain=significance.estimate(saved, compared.resamples)
    )  # fmt: skip


def _priors(record: TrialRecord) -> list[float]:
    return [float(fold.best["prior"]) for fold in record.folds if fold.best["prior"] is not None]


def _groups(
    rows: Rows, spec: StudySpec, data_root: Path
) -> list[tuple[GroupKind, str, np.ndarray]]:  # fmt: skip
    """(kind, name, which rows) of every fold where there are several, every year, and every third of VIX."""
    found: list[tuple[GroupKind, str, np.ndarray]] = []
    folds = np.unique(rows.fold)
    if len(folds) > 1:
        found += [("fold", str(int(fold) + 1), rows.fold == fold) for fold in folds]
    years = rows.dates.astype("datetime64[Y]")
    found += [("year", str(year), years == year) for year in np.unique(years)]
    if features.VIX in spec.data.context:
        vix = sources.load(features.VIX, root=data_root, version=spec.data.versions.get(features.VIX))
        days, place = np.unique(rows.dates, return_inverse=True)
        third = significance.tercile_indices(indicators.as_of(days, vix.dates, vix.close))[place]
        found += [("vix", name, third == i) for i, name in enumerate(("calm", "middling", "nervous"))]
    return [group for group in found if group[2].any()]


def _notes(
    study_folder: Path, spec: StudySpec, finished: Sequence[TrialRecord], missing: Sequence[str]
) -> tuple[str, ...]:  # fmt: skip
    found = [opened] if (opened := study_file.openings_note(study_folder)) else []
    if len(finished) < spec.study.n_trials:
        found.append(f"the study is unfinished: its best of {len(finished)} trials so far, of {spec.study.n_trials}")
    if failed := sum(record.value is None for record in finished):
        found.append(f"{failed} trials of the search failed; they can't have won, and are in no test")
    if missing:
        found.append(f"{len(missing)} trials are in no test over the whole search: {missing[0]}")
    return tuple(found)
