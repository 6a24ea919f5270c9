"""The sealed test part: opened for what a confirmation found, and for the baselines; every opening is logged before.

Every opening is counted. Who has seen the test part and goes on searching has no test part any more: the count stands
beside every later result.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fintx.analysis import confirmation, evaluation, predictions
from fintx.analysis.confirmation import Candidate, Confirmation
from fintx.config.schema import StudySpec, TrialConfig
from fintx.data import datasets, sources
from fintx.data.datasets import Dataset, Part
from fintx.data.standardize import Standardizer
from fintx.errors import FintxError
from fintx.evaluate import baselines, metrics, significance
from fintx.evaluate.significance import Estimate
from fintx.study import records, study_file
from fintx.study.records import Metrics, RecordModel
from fintx.train import checkpoint, trainer
from fintx.types import Floats

FOLDER = "test"


class ModelScore(RecordModel):
    """A model, or a baseline, on the test rows."""

    name: str
    metrics: Metrics
    gain: Estimate | None
    """Over the baseline that was best on validation, in the study's metric; none for that one itself, and where a
    ranking is undefined: all test labels are the same."""
    per_asset: dict[str, Metrics]


class TestOpening(RecordModel):
    """test/opening_<number>.json; the outputs lie beside it as Parquet, a row per sample and model."""

    study: str
    number: int
    """How many times the test part has been opened, this one included."""
    confirmed: bool
    """False: opened with --unconfirmed, for the luckiest of a search or a checkpoint of one's choice."""
    first_date: str
    last_date: str
    n_rows: int
    block: int
    loss: str
    """The metric that gains are in."""
    baseline: str
    """The one that was best on validation: the rival."""
    models: tuple[ModelScore, ...]
    baselines: tuple[ModelScore, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Model:
    """What speaks with one voice: the members of a confirmed trial, or one checkpoint."""

    name: str
    checkpoints: tuple[Path, ...]


def open_test(path: Path, *, data_root: Path, unconfirmed: bool = False) -> TestOpening:
    """Open the sealed test part; the opening is logged in the study's folder before any label is cut.

    Args:
        path: a study's folder; with `unconfirmed` also a trial's, or a checkpoint's.
        unconfirmed: open it for the search's best trial, or for the checkpoint at the path, as the search left it.

    Raises:
        FintxError: no confirmation, an unfinished one, or one that confirmed nothing; no test part; a checkpoint that
            is missing or damaged; or the opening can't be logged.
    """
    models, study = _unconfirmed(path) if unconfirmed else (_confirmed(path), path)
    known = study_file.read_study(study)
    assert known is not None
    config = [checkpoint.describe(each).config for model in models for each in model.checkpoints][0]
    if config.split.kind == "walk_forward" and config.split.test_start is None:
        raise FintxError(f"{path}: its walk-forward split has no test part (no split.test_start): nothing is sealed")
    best = predictions.best_baseline(predictions.read_rows(study, known.spec))
    if best is None:
        raise FintxError(f"{path}: no baseline has a {known.spec.study.metric} on its validation rows to compare with")
    rival = best[0]
    number = study_file.log_opening(
        study,
        {
            "confirmed": not unconfirmed,
            "models": [model.name for model in models],
            "checkpoints": [_relative(each, study) for model in models for each in model.checkpoints],
        },
    )
    return _opened(study, known.spec, models, config, rival, number=number, confirmed=not unconfirmed, root=data_root)


def read_openings(study_folder: Path) -> tuple[TestOpening, ...]:
    """What the openings said, oldest first; one that was cut short left a line in the log and nothing here."""
    paths = (study_folder / FOLDER).glob("opening_*.json")
    return tuple(sorted((TestOpening.model_validate_json(p.read_bytes()) for p in paths), key=lambda each: each.number))


# --- for whom ---------------------------------------------------------------------------------------------------------


def _confirmed(path: Path) -> tuple[_Model, ...]:
    otherwise = f"or add --unconfirmed to open it for {path} as the search left it, its luck included"
    if not (path / "study.json").is_file():
        raise FintxError(
            f"{path}: is no study's folder, and the test part is opened for what a study's confirmation found; give "
            f"the study's folder, {otherwise}"
        )
    found = confirmation.read(path)
    if found is None:
        raise FintxError(f"{path}: no trial is confirmed yet; run first: just confirm {path}; {otherwise}")
    if not found.complete:
        raise FintxError(
            f"{path}: its confirmation is unfinished ({found.n_trained} of {found.n_members} trainings); continue it: "
            f"just confirm {path}; {otherwise}"
        )
    if not found.confirmed:
        raise FintxError(
            f"{path}: no trial was confirmed against {found.baseline}, so there is nothing that the test part could "
            f"confirm; keep it sealed for a better study, {otherwise}"
        )
    return tuple(_members(path, found, each) for each in found.confirmed)


def _members(study: Path, found: Confirmation, candidate: Candidate) -> _Model:
    folders = [records.rerun_folder(study, candidate.trial, seed) for seed in found.seeds]
    checkpoints = tuple(_last_fold(folder) for folder in folders)
    return _Model(f"trial {candidate.trial}", checkpoints)


def _unconfirmed(path: Path) -> tuple[tuple[_Model, ...], Path]:
    found = evaluation.find_checkpoints(path)
    if found.study is None:
        raise FintxError(
            f"{path}: lies in no study's folder, so the opening can't be logged; give the path inside outputs/<study>"
        )
    record = records.read(found.trial / "record.json")
    return (_Model(f"trial {record.trial_number}", (found.folders[-1],)),), found.study


def _last_fold(folder: Path) -> Path:
    folds = sorted((folder / "checkpoint").glob("fold_*"), key=evaluation.fold_number)
    if not folds:
        raise FintxError(f"{folder}: holds no checkpoint; delete that folder and confirm again to train it anew")
    return folds[-1]


def _relative(path: Path, study: Path) -> str:
    return str(path.resolve().relative_to(study.resolve()))


# --- what they say ----------------------------------------------------------------------------------------------------


def _opened(
    study: Path, spec: StudySpec, models: tuple[_Model, ...], config: TrialConfig, rival: str, *, number: int,
    confirmed: bool, root: Path,
) -> TestOpening:  # fmt: skip
    restored = checkpoint.load(models[0].checkpoints[0])
    dataset, part = _rows(restored, root)
    said = {model.name: np.array([_say(each, dataset, part, root) for each in model.checkpoints]) for model in models}
    outputs = {name: metrics.ensemble(spec.task.predicts, members) for name, members in said.items()}
    beaten = _baselines(dataset, part, config, spec, root)
    scorer = _Scorer(spec, dataset, part, restored.meta["prior"], beaten[rival], rival, said)
    opening = TestOpening(
        study=spec.study.name,
        number=number,
        confirmed=confirmed,
        first_date=str(dataset.dates[part.rows].min()),
        last_date=str(dataset.dates[part.rows].max()),
        n_rows=len(part.rows),
        block=scorer.resamples.block,
        loss=scorer.loss,
        baseline=rival,
        models=tuple(each for name, ensemble in outputs.items() for each in scorer.of_model(name, ensemble)),
        baselines=tuple(scorer.score(name, each) for name, each in beaten.items()),
        notes=_notes(study, config, number, confirmed),
    )
    _keep(study, opening, dataset, part, {**outputs, **beaten})
    return opening


def _say(path: Path, wanted: Dataset, part: Part, root: Path) -> Floats:
    """(S,) outputs of one checkpoint on the test rows."""
    restored = checkpoint.load(path)
    dataset, own = _rows(restored, root)
    if not np.array_equal(dataset.dates[own.rows], wanted.dates[part.rows]) or not (own.labels == part.labels).all():
        raise FintxError(f"{path}: its test rows are not those of the other models (model.context_length differs)")
    return trainer.predict(restored.config, restored.params, dataset.features, own.rows)


def _rows(restored: checkpoint.Restored, root: Path) -> tuple[Dataset, Part]:
    return datasets.build_test(restored.config, root, scaling=Standardizer.from_json(restored.meta["scaling"]))


def _baselines(
    dataset: Dataset, part: Part, config: TrialConfig, spec: StudySpec, root: Path
) -> dict[str, Floats]:  # fmt: skip
    """Fitted on the last fold's training rows, as they were for validation; name → outputs on the test rows."""
    last = datasets.build(config, root).folds[-1]
    train = Part(_place(last, last.train.rows, dataset), last.train.labels)
    found = baselines.for_dataset(
        dataclasses.replace(dataset, train=train, validation=part),
        spec.task,
        sources.load_pinned(config.data, config.data.assets, root),
        sources.load_pinned(config.data, config.data.context, root),
    )
    return {each.name: each.outputs for each in found}


def _place(old: Dataset, rows: np.ndarray, new: Dataset) -> np.ndarray:
    """The same assets' same days in another dataset, which reaches further."""
    found = np.empty(len(rows), np.int32)
    for i in range(len(old.assets)):
        own = np.flatnonzero(new.asset_ids == i)
        mine = old.asset_ids[rows] == i
        found[mine] = own[np.searchsorted(new.dates[own], old.dates[rows[mine]])]
    assert (new.dates[found] == old.dates[rows]).all()
    return found


class _Scorer:
    """Scores outputs on the test rows, against the rival."""

    def __init__(
        self, spec: StudySpec, dataset: Dataset, part: Part, prior: float, rival: Floats, rival_name: str,
        members: Mapping[str, Floats],
    ):  # fmt: skip
        self.predicts, self.loss = spec.task.predicts, spec.study.metric
        self.dataset, self.part, self.prior, self.members = dataset, part, prior, members
        self.dates, self.rival_name = dataset.dates[part.rows], rival_name
        self.rival = self._losses(rival)
        gains = np.column_stack([self.rival - self._losses(each[0]) for each in members.values()])
        series = significance.by_day(gains, self.dates)
        block = significance.block_length(series, horizon=spec.task.horizon)
        self.resamples = significance.resample(len(series), block)

    def of_model(self, name: str, ensemble: Floats) -> tuple[ModelScore, ...]:
        """One checkpoint; or the mean over the members, and their ensemble."""
        members = self.members[name]
        if len(members) == 1:
            return (self.score(name, members[0]),)
        each = [self.score(name, member) for member in members]
        saved = np.array([self.rival - self._losses(member) for member in members])
        gain = self._gain(saved.mean(axis=0), seeds=saved.mean(axis=1))
        mean = ModelScore(
            name=f"{name}, mean of {len(members)} seeds",
            metrics=records.mean_over_seeds([member.metrics for member in each]),
            gain=gain,
            per_asset={
                asset: records.mean_over_seeds([member.per_asset[asset] for member in each])
                for asset in each[0].per_asset
            },
        )
        return mean, self.score(f"{name}, ensemble of {len(members)}", ensemble)

    def score(self, name: str, outputs: Floats) -> ModelScore:
        """By all metrics, and its gain over the rival."""
        labels, ids = self.part.labels, self.dataset.asset_ids[self.part.rows]
        return ModelScore(
            name=name,
            metrics=metrics.evaluate(self.predicts, outputs, labels, prior=self.prior),
            gain=None if name == self.rival_name else self._gain(self.rival - self._losses(outputs)),
            per_asset=metrics.per_asset(self.predicts, outputs, labels, ids, self.dataset.assets, prior=self.prior),
        )

    def _gain(self, saved: Floats, *, seeds: Floats | None = None) -> Estimate | None:
        if np.isnan(saved).any():  # a ranking of one class
            return None
        return significance.estimate(significance.by_day(saved, self.dates), self.resamples, seeds=seeds)

    def _losses(self, outputs: Floats) -> Floats:
        return significance.row_losses(self.predicts, self.loss, outputs, self.part.labels)


def _notes(study: Path, config: TrialConfig, number: int, confirmed: bool) -> tuple[str, ...]:
    found = [f"the sealed test part was opened; opening number {number} is logged in {study / 'openings.jsonl'}"]
    if number > 1:
        found.append(f"it had been opened {number - 1} times before: what was learned then may have shaped this model")
    if not confirmed:
        found.append("what was opened is not confirmed: its place in the search is partly luck")
    if config.split.kind == "walk_forward":
        found.append("walk-forward: scored by the last fold's models")
    return tuple(found)


def _keep(study: Path, opening: TestOpening, dataset: Dataset, part: Part, outputs: Mapping[str, Floats]) -> None:
    n = len(part.rows)
    table = pa.table(
        {
            "date": pa.array(np.tile(dataset.dates[part.rows].astype("datetime64[D]"), len(outputs))),
            "asset": pa.array(np.tile(np.asarray(dataset.assets)[dataset.asset_ids[part.rows]], len(outputs))),
            "label": pa.array(np.tile(part.labels.astype(np.float32), len(outputs))),
            "model": pa.array(np.repeat(list(outputs), n)),
            "output": pa.array(np.concatenate([each.astype(np.float32) for each in outputs.values()])),
        }
    )
    name = f"opening_{opening.number}"
    records.write_predictions(study / FOLDER, table, name=f"{name}.parquet")
    text = json.dumps(opening.model_dump(mode="json"), indent=1) + "\n"
    records.write_atomically(study / FOLDER / f"{name}.json", text)
