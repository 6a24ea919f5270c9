"""How do a study's best trials, trained again, compare? With the baselines, each other and the whole search.

All of it follows from the records and predictions in the study's folder.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fintx.config.schema import StudySpec
from fintx.data import features, indicators, sources
from fintx.evaluate import metrics, significance, verdict
from fintx.evaluate.significance import LEVEL, REPS, Estimate, Resamples
from fintx.evaluate.verdict import Judgement, Verdict
from fintx.study import lead, predictions, records
from fintx.study.confirmation import Candidate, Confirmation, Ensemble, Group, GroupKind
from fintx.study.predictions import Rows
from fintx.study.records import TrialRecord
from fintx.types import FintxError, Floats


def build(
    study_folder: Path, spec: StudySpec, trials: Sequence[TrialRecord], seeds: Sequence[int], *, data_root: Path
) -> Confirmation:
    """Compare what lies in the folder.

    Args:
        trials: the candidates, in the search's order.
        seeds: wanted for each; compared are those that every candidate has been trained with.

    Raises:
        FintxError: the baselines' or a member's predictions are missing or damaged.
    """
    rows = predictions.read_rows(study_folder, spec)
    members = {
        (record.trial_number, seed): records.read(path)
        for record in trials
        for seed in seeds
        if (path := records.member_folder(study_folder, record.trial_number, seed) / "record.json").is_file()
    }
    paired = [seed for seed in seeds if all((record.trial_number, seed) in members for record in trials)]
    again = {record.trial_number: [members[record.trial_number, seed] for seed in paired] for record in trials}
    outputs = {
        number: _member_outputs(study_folder, number, paired, rows)
        for number, held in again.items()
        if held and all(member.value is not None for member in held)
    }
    finished = records.read_all(study_folder)
    searched, missing = _searched(study_folder, finished, rows)
    best = lead.best_baseline(rows)
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
        complete=len(members) == len(trials) * len(seeds),
        n_members=len(trials) * len(seeds),
        n_trained=len(members),
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
        overfitting=significance.overfitting(whole).probability if _can_split(whole) else None,
        luck=significance.luck_of_the_best(whole, found.resamples) if found and whole.shape[1] > 1 else None,
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


def _member_outputs(study_folder: Path, number: int, seeds: Sequence[int], rows: Rows) -> Floats:
    """(N, S)."""
    folders = [records.member_folder(study_folder, number, seed) for seed in seeds]
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
    return verdict.judge(fresh, baseline, predictions.series_of(others, rows), horizon=rows.horizon)


def _can_split(whole: Floats) -> bool:
    return whole.shape[1] > 1 and len(whole) >= significance.N_BLOCKS


class _Compared:
    """What a candidate is compared with."""

    def __init__(self, rows: Rows, baseline: str, found: Judgement | None, fresh: Floats | None, search: Floats | None):
        self.rows, self.baseline, self.fresh = rows, rows.baselines[baseline], fresh
        self.resamples: Resamples | None = found.resamples if found else None
        self.losses = None if fresh is None else np.array([rows.losses(each) for each in fresh])  # (N, S)
        self.search = search

    def too_good(self) -> Estimate | None:
        """By how much the search's losses lie below the members', with the error of their seeds."""
        if self.search is None:
            return None
        assert self.losses is not None and self.resamples is not None
        above = self.losses - self.search
        return significance.estimate(self.rows.series(above.mean(axis=0)), self.resamples, seeds=above.mean(axis=1))

    def gain_among(self, chosen: np.ndarray) -> Estimate | None:
        """The members' gain over the baseline on some rows; none where a ranking of them is undefined."""
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
    parts: tuple[Group, ...] = ()
    if judged is not None and compared.fresh is not None:
        too_good = compared.too_good()
        ensemble = _ensemble(record, compared)
        parts = tuple(
            Group(kind=kind, name=name, n=int(chosen.sum()), gain=gain)
            for kind, name, chosen in groups
            if (gain := compared.gain_among(chosen)) is not None
        )
    return Candidate(
        trial=record.trial_number,
        shape=record.config.shape,
        param_count=record.param_count,
        search_value=record.value,
        values=tuple(member.value for member in held),
        outcomes=tuple(member.outcome for member in held),
        verdict=judged,
        too_good=too_good,
        metrics=records.mean_over_seeds([member.best for member in held if member.value is not None]),
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
        third = significance.terciles(indicators.as_of(days, vix.dates, vix.close))[place]
        found += [("vix", name, third == i) for i, name in enumerate(("calm", "middling", "nervous"))]
    return [group for group in found if group[2].any()]


def _notes(
    study_folder: Path, spec: StudySpec, finished: Sequence[TrialRecord], missing: Sequence[str]
) -> tuple[str, ...]:  # fmt: skip
    found = [opened] if (opened := records.openings_words(study_folder)) else []
    if len(finished) < spec.study.n_trials:
        found.append(f"the study is unfinished: its best of {len(finished)} trials so far, of {spec.study.n_trials}")
    if failed := sum(record.value is None for record in finished):
        found.append(f"{failed} trials of the search failed; they can't have won, and are in no test")
    if missing:
        found.append(f"{len(missing)} trials are in no test over the whole search: {missing[0]}")
    return tuple(found)
