"""The sealed test part: opened for what a confirmation found, and for the baselines.

Every opening is logged before a label is cut, and counted: if you have seen the test part and go on searching, you have
no test part any more. The count stands beside every later result.
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
from fintx.config.schema import StudySpec
from fintx.data import datasets, sources
from fintx.data.datasets import Dataset, Part
from fintx.data.standardize import Standardizer
from fintx.errors import FintxError
from fintx.evaluate import baselines, metrics, significance
from fintx.evaluate.metrics import Metrics
from fintx.evaluate.significance import Estimate, Resamples
from fintx.study import records, study_file
from fintx.study.records import RecordModel
from fintx.tasks import Prediction
from fintx.train import checkpoint, trainer
from fintx.train.checkpoint import Restored
from fintx.types import Floats

TEST_FOLDER = "test"


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
    """Of this opening, from 1."""
    confirmed: bool
    """False: opened with --unconfirmed, for the luckiest of a search or a checkpoint of one's choice."""
    first_date: str
    last_date: str
    n_rows: int
    block: int
    loss: str
    """The metric that gains are in."""
    baseline: str
    """The one that was best on validation."""
    models: tuple[ModelScore, ...]
    baselines: tuple[ModelScore, ...]
    notes: tuple[str, ...]


def read_openings(study_folder: Path) -> tuple[TestOpening, ...]:
    """The results of the openings, oldest first; one that was cut short left a line in the log and nothing here."""
    paths = (study_folder / TEST_FOLDER).glob("opening_*.json")
    openings = (TestOpening.model_validate_json(path.read_bytes()) for path in paths)
    return tuple(sorted(openings, key=lambda opening: opening.number))


def open_test(path: Path, *, data_root: Path, unconfirmed: bool = False) -> TestOpening:
    """Open the sealed test part; the opening is logged in the study's folder before any label is cut.

    Args:
        path: a study's folder; with `unconfirmed` also a trial's, or a checkpoint's.
        unconfirmed: open it for the search's best trial, or for the checkpoint at the path, as the search left it.

    Raises:
        FintxError: no confirmation, an unfinished one, or one that confirmed nothing; no test part; a checkpoint that
            is missing or damaged; or the opening can't be logged.
    """
    models, folder = _unconfirmed(path) if unconfirmed else (_confirmed(path), path)
    study = study_file.read_study(folder)
    assert study is not None
    spec, first = study.spec, next(iter(models.values()))[0]
    split = checkpoint.describe(first).config.split
    if split.kind == "walk_forward" and split.test_start is None:
        raise FintxError(f"{path}: its walk-forward split has no test part (no split.test_start): nothing is sealed")
    best = predictions.best_baseline(predictions.read_rows(folder, spec))
    if best is None:
        raise FintxError(f"{path}: no baseline has a {spec.study.metric} on its validation rows to compare with")
    checkpoints = [str(own.resolve().relative_to(folder.resolve())) for paths in models.values() for own in paths]
    entry = {"confirmed": not unconfirmed, "models": list(models), "checkpoints": checkpoints}
    number = study_file.log_opening(folder, entry)

    restored = checkpoint.load(first)
    dataset, part = _test_rows(restored, data_root)
    members = {
        name: np.array([_outputs(own, dataset, part, data_root) for own in paths]) for name, paths in models.items()
    }
    ensembles = {name: metrics.ensemble(spec.task.predicts, own) for name, own in members.items()}
    baseline_outputs = _baselines(restored, dataset, part, spec, data_root)
    scorer = _Scorer.build(spec, dataset, part, restored.meta["prior"], baseline_outputs[best[0]], members)
    notes = [f"the sealed test part was opened; opening number {number} is logged in {folder / 'openings.jsonl'}"]
    if number > 1:
        notes.append(f"it had been opened {number - 1} times before: what was learned then may have shaped this model")
    if unconfirmed:
        notes.append("what was opened is not confirmed: its place in the search is partly luck")
    if split.kind == "walk_forward":
        notes.append("walk-forward: scored by the last fold's models")
    opening = TestOpening(
        study=spec.study.name,
        number=number,
        confirmed=not unconfirmed,
        first_date=str(scorer.dates.min()),
        last_date=str(scorer.dates.max()),
        n_rows=len(part.rows),
        block=scorer.resamples.block,
        loss=scorer.metric,
        baseline=best[0],
        models=tuple(score for name, own in members.items() for score in scorer.of_model(name, own, ensembles[name])),
        baselines=tuple(scorer.score(name, own, gain=name != best[0]) for name, own in baseline_outputs.items()),
        notes=tuple(notes),
    )
    _write(folder, opening, dataset, part, ensembles | baseline_outputs)
    return opening


# --- whose checkpoints ------------------------------------------------------------------------------------------------


def _confirmed(path: Path) -> dict[str, list[Path]]:
    """Confirmed trial → the checkpoints of its reruns."""
    otherwise = f"or add --unconfirmed to open it for {path} as the search left it, its luck included"
    if not (path / "study.json").is_file():
        raise FintxError(
            f"{path}: is no study's folder, and the test part is opened for what a study's confirmation found; give "
            f"the study's folder, {otherwise}"
        )
    result = confirmation.read(path)
    if result is None:
        raise FintxError(f"{path}: no trial is confirmed yet; run first: just confirm {path}; {otherwise}")
    if not result.complete:
        raise FintxError(
            f"{path}: its confirmation is unfinished ({result.n_trained} of {result.n_members} trainings); continue "
            f"it: just confirm {path}; {otherwise}"
        )
    if not result.confirmed:
        raise FintxError(
            f"{path}: no trial was confirmed against {result.baseline}, so there is nothing that the test part could "
            f"confirm; keep it sealed for a better study, {otherwise}"
        )
    models: dict[str, list[Path]] = {}
    for candidate in result.confirmed:
        for seed in result.seeds:
            folder = records.rerun_folder(path, candidate.trial, seed)
            if not (folds := evaluation.fold_checkpoints(folder)):
                raise FintxError(
                    f"{folder}: holds no checkpoint; delete that folder and confirm again to train it anew"
                )
            models.setdefault(f"trial {candidate.trial}", []).append(folds[-1])
    return models


def _unconfirmed(path: Path) -> tuple[dict[str, list[Path]], Path]:
    """The trial at a path → its last checkpoint; and the study's folder."""
    checkpoints = evaluation.find_checkpoints(path)
    if checkpoints.study is None:
        raise FintxError(
            f"{path}: lies in no study's folder, so the opening can't be logged; give the path inside outputs/<study>"
        )
    record = records.read(checkpoints.trial / "record.json")
    return {f"trial {record.trial_number}": [checkpoints.folders[-1]]}, checkpoints.study


# --- outputs on the test rows -----------------------------------------------------------------------------------------


def _test_rows(restored: Restored, root: Path) -> tuple[Dataset, Part]:
    return datasets.build_test(restored.config, root, scaling=Standardizer.from_json(restored.meta["scaling"]))


def _outputs(path: Path, expected: Dataset, part: Part, root: Path) -> Floats:
    """(S,) outputs of one checkpoint on the test rows."""
    restored = checkpoint.load(path)
    dataset, own = _test_rows(restored, root)
    same_days = np.array_equal(dataset.dates[own.rows], expected.dates[part.rows])
    if not same_days or not (own.labels == part.labels).all():
        raise FintxError(f"{path}: its test rows are not those of the other models (model.context_length differs)")
    return trainer.predict(restored.config, restored.params, dataset.features, own.rows)


def _baselines(restored: Restored, dataset: Dataset, part: Part, spec: StudySpec, root: Path) -> dict[str, Floats]:
    """Fitted on the last fold's training rows, as they were for validation; name → outputs on the test rows."""
    data, last = restored.config.data, datasets.build(restored.config, root).folds[-1]
    rows = np.empty(len(last.train.rows), np.int32)  # the same assets' same days in the test part's longer dataset
    for i in range(len(last.assets)):
        asset_rows, inside = np.flatnonzero(dataset.asset_ids == i), last.asset_ids[last.train.rows] == i
        rows[inside] = asset_rows[np.searchsorted(dataset.dates[asset_rows], last.dates[last.train.rows[inside]])]
    assert (dataset.dates[rows] == last.dates[last.train.rows]).all()
    fitted = baselines.for_dataset(
        dataclasses.replace(dataset, train=Part(rows, last.train.labels), validation=part),
        spec.task,
        sources.load_pinned(data, data.assets, root),
        sources.load_pinned(data, data.context, root),
    )
    return {baseline.name: baseline.outputs for baseline in fitted}


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Scorer:
    """Scores outputs on the test rows, against the baseline that was best on validation."""

    predicts: Prediction
    metric: str
    labels: Floats
    dates: np.ndarray
    asset_ids: np.ndarray
    assets: tuple[str, ...]
    prior: float
    baseline_losses: Floats
    resamples: Resamples

    @staticmethod
    def build(
        spec: StudySpec, dataset: Dataset, part: Part, prior: float, baseline: Floats, members: Mapping[str, Floats]
    ) -> _Scorer:
        """Days are resampled in blocks as long as the first members' gains ask for."""
        predicts, metric, dates = spec.task.predicts, spec.study.metric, dataset.dates[part.rows]
        losses, *others = (
            significance.row_losses(predicts, metric, outputs, part.labels)
            for outputs in (baseline, *(own[0] for own in members.values()))
        )
        series = significance.by_day(np.column_stack([losses - own for own in others]), dates)
        block = significance.block_length(series, horizon=spec.task.horizon)
        return _Scorer(
            predicts, metric, part.labels, dates, dataset.asset_ids[part.rows], dataset.assets, prior, losses,
            significance.resample(len(series), block),
        )  # fmt: skip

    def of_model(self, name: str, members: Floats, ensemble: Floats) -> tuple[ModelScore, ...]:
        """One checkpoint; or the mean over the members, and their ensemble."""
        if len(members) == 1:
            return (self.score(name, members[0]),)
        scores = [self.score(name, outputs) for outputs in members]
        gains = np.array([self._gains(outputs) for outputs in members])
        mean = ModelScore(
            name=f"{name}, mean of {len(members)} seeds",
            metrics=records.mean_over_seeds([score.metrics for score in scores]),
            gain=self._estimate(gains.mean(axis=0), seeds=gains.mean(axis=1)),
            per_asset={
                asset: records.mean_over_seeds([score.per_asset[asset] for score in scores])
                for asset in scores[0].per_asset
            },
        )
        return mean, self.score(f"{name}, ensemble of {len(members)}", ensemble)

    def score(self, name: str, outputs: Floats, *, gain: bool = True) -> ModelScore:
        """All metrics, and the gain over the baseline."""
        return ModelScore(
            name=name,
            metrics=metrics.evaluate(self.predicts, outputs, self.labels, prior=self.prior),
            gain=self._estimate(self._gains(outputs)) if gain else None,
            per_asset=metrics.per_asset(
                self.predicts, outputs, self.labels, self.asset_ids, self.assets, prior=self.prior
            ),
        )

    def _gains(self, outputs: Floats) -> Floats:
        return self.baseline_losses - significance.row_losses(self.predicts, self.metric, outputs, self.labels)

    def _estimate(self, gains: Floats, *, seeds: Floats | None = None) -> Estimate | None:
        if np.isnan(gains).any():  # a ranking of one class
            return None
        return significance.estimate(significance.by_day(gains, self.dates), self.resamples, seeds=seeds)


def _write(study: Path, opening: TestOpening, dataset: Dataset, part: Part, outputs: Mapping[str, Floats]) -> None:
    names = np.asarray(dataset.assets)[dataset.asset_ids[part.rows]]
    table = pa.table(
        {
            "date": pa.array(np.tile(dataset.dates[part.rows].astype("datetime64[D]"), len(outputs))),
            "asset": pa.array(np.tile(names, len(outputs))),
            "label": pa.array(np.tile(part.labels.astype(np.float32), len(outputs))),
            "model": pa.array(np.repeat(list(outputs), len(part.rows))),
            "output": pa.array(np.concatenate([own.astype(np.float32) for own in outputs.values()])),
        }
    )
    name = f"opening_{opening.number}"
    records.write_predictions(study / TEST_FOLDER, table, name=f"{name}.parquet")
    text = json.dumps(opening.model_dump(mode="json"), indent=1) + "\n"
    records.write_atomically(study / TEST_FOLDER / f"{name}.json", text)
