"""How does a study run? Ask the sampler or the queue, fit, write the record, tell; until n_trials records stand.

A trial that the storage holds as running, but that has no record, is unfinished work: whatever ended it, the next run
of the same study takes it up again under its number. A record that the storage hasn't heard of is told. So the same
command may be stopped anywhere and given again.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

import fintx
from fintx.config import Shape, StudySpec, TrialConfig, config_hash
from fintx.data import sources, windows
from fintx.data.windows import Dataset
from fintx.evaluate import baselines, metrics
from fintx.study import environment, queue, records
from fintx.study.lock import hold
from fintx.study.records import FoldRecord, StudyFile, TrialRecord
from fintx.study.space import SearchSpace
from fintx.train import checkpoint, loop
from fintx.types import FintxError

_WORST = 1e9
"""Told for a diverged, collapsed or out-of-memory trial: the sampler only ranks, and must learn to stay away."""

_SAMPLER, _TRIAL = 0, 1  # streams of derive_seed


class StudyConflict(FintxError):
    """The output folder holds another study of this name."""


@dataclass(frozen=True)
class TrialStarted:
    """A trial is about to be fitted."""

    number: int
    shape: Shape
    source: str
    note: str


@dataclass(frozen=True)
class EpochDone:
    """One epoch of one fold is done."""

    number: int
    fold: int
    n_folds: int
    epoch: loop.Epoch


@dataclass(frozen=True)
class TrialFinished:
    """A record has been written."""

    record: TrialRecord
    records: tuple[TrialRecord, ...]


Event = TrialStarted | EpochDone | TrialFinished


@dataclass(frozen=True)
class Summary:
    """What a run of a study leaves."""

    folder: Path
    spec: StudySpec
    records: tuple[TrialRecord, ...]
    best: TrialRecord | None
    baselines: dict[str, Any]
    interrupted: bool


def run(
    spec: StudySpec,
    *,
    outputs: Path,
    data_root: Path,
    notify: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Run a study until it has n_trials records, or until asked to stop.

    Args:
        notify: called with every event, for the live view.
        should_stop: asked between epochs and trials; true ends the run cleanly, the trial at hand left unfinished.

    Raises:
        StudyConflict: the folder holds a study with another definition.
        FintxError: whatever in data, budget or queue can't be run; nothing is written then.
    """
    folder = outputs / spec.study.name
    known = records.read_study(folder)
    spec = _pin_data(spec, known)
    prepare = functools.cache(functools.partial(_prepare, spec, data_root))
    prepared = prepare(spec.model.context_length)
    spec = spec.model_copy(update={"data": prepared.data})
    if known is not None:
        check_same_study(folder, known.spec, spec)
    space = SearchSpace.build(spec, n_features=len(spec.data.features))
    queue.validate(spec, n_features=len(spec.data.features))
    with hold(folder):
        _begin(folder, spec, known)
        windows.store_processed(prepared, data_root)
        worker = _Worker(folder, outputs, spec, space, lambda length: prepare(length).folds, notify, should_stop)
        beaten = ensure_baselines(folder, prepared.folds, spec, data_root)
        interrupted = not worker.work()
        worker.write_tables()
    finished = tuple(records.read_all(folder))
    best = records.best_of(list(finished), minimize=metrics.MINIMIZE[spec.study.metric])
    return Summary(folder, spec, finished, best, beaten, interrupted)


def _prepare(spec: StudySpec, data_root: Path, context_length: int) -> windows.Prepared:
    return windows.build(spec.data, spec.task, spec.split, context_length=context_length, root=data_root)


def _pin_data(spec: StudySpec, known: StudyFile | None) -> StudySpec:
    """A study keeps the bars it began with, however many newer snapshots have come since."""
    if known is None or spec.data.versions:
        return spec
    symbols = {*spec.data.assets, *spec.data.context}
    versions = {symbol: version for symbol, version in known.spec.data.versions.items() if symbol in symbols}
    return spec.model_copy(update={"data": spec.data.model_copy(update={"versions": versions})})


def check_same_study(folder: Path, old: StudySpec, new: StudySpec) -> None:
    """A study's definition never changes under its name.

    Raises:
        StudyConflict: with every field that differs.
    """
    before, after = records.definition(old), records.definition(new)
    differing = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if differing:
        changes = "; ".join(f"{key}: {before.get(key)!r} there, {after.get(key)!r} here" for key in differing)
        raise StudyConflict(
            f"{folder}: holds another study of this name ({changes}); undo the edit, or choose another study.name"
        )


def _begin(folder: Path, spec: StudySpec, known: StudyFile | None) -> None:
    strangers = sorted(path.name for path in folder.iterdir() if path.name != "lock")
    if known is None and strangers:
        raise StudyConflict(
            f"{folder}: holds files but no study.json ({', '.join(strangers[:5])}); "
            "choose another study.name or --outputs, or move them away"
        )
    if known is None:
        known = StudyFile(
            spec=spec,
            created=environment.now(),
            fintx_version=fintx.__version__,
            git_commit=environment.git_commit(),
        )
    records.write_study(folder, known.model_copy(update={"spec": spec}))


def ensure_baselines(folder: Path, folds: tuple[Dataset, ...], spec: StudySpec, data_root: Path) -> dict[str, Any]:
    """Fit what must be beaten on the very same rows, once per study; later runs read it back.

    Returns:
        name → {"words", "metrics" (mean over folds), "folds" (metrics of each)}.
    """
    path = folder / "baselines.json"
    if path.is_file():
        return json.loads(path.read_text())
    loaded = {
        symbol: sources.load(symbol, root=data_root, version=spec.data.versions.get(symbol))
        for symbol in (*spec.data.assets, *spec.data.context)
    }
    context = {symbol: loaded[symbol] for symbol in spec.data.context}
    bars = {symbol: loaded[symbol] for symbol in spec.data.assets}
    per_fold = [baselines.for_dataset(fold, spec.task, bars, context) for fold in folds]
    result = {
        first.name: {
            "words": first.words,
            "metrics": records.mean_metrics([fold[index].metrics for fold in per_fold]),
            "folds": [fold[index].metrics for fold in per_fold],
        }
        for index, first in enumerate(per_fold[0])
    }
    outputs = [
        _prediction_table(fold, index, baseline.outputs).append_column(
            "baseline", pa.array([baseline.name] * len(fold.validation.rows))
        )
        for index, fold in enumerate(folds)
        for baseline in per_fold[index]
    ]
    records.write_predictions(folder, pa.concat_tables(outputs), name="baselines.parquet")
    records.write_atomically(path, json.dumps(result, indent=1) + "\n")
    return result


@dataclass(frozen=True)
class _Worker:
    folder: Path
    outputs: Path
    spec: StudySpec
    space: SearchSpace
    folds: Callable[[int], tuple[Dataset, ...]]
    notify: Callable[[Event], None]
    should_stop: Callable[[], bool]

    @property
    def minimize(self) -> bool:
        return metrics.MINIMIZE[self.spec.study.metric]

    def work(self) -> bool:
        """Run trials until n_trials records stand. Returns False if asked to stop before."""
        study = self._open_storage()
        finished = {record.trial_number: record for record in records.read_all(self.folder)}
        self._tell_unheard(study, finished)
        while len(finished) < self.spec.study.n_trials:
            if self.should_stop():
                return False
            trial = self._next_trial(study, finished)
            record = self._run_trial(trial)
            if record is None:
                return False
            finished[record.trial_number] = record
            self._tell(study, record)
            self._keep_best_checkpoints(list(finished.values()))
            self.write_tables()
            self.notify(TrialFinished(record, tuple(finished.values())))
        return True

    def write_tables(self) -> None:
        """Rewrite the derived tables from the records on disk."""
        records.write_tables(
            self.folder,
            records.read_all(self.folder),
            n_trials=self.spec.study.n_trials,
            metric=self.spec.study.metric,
            minimize=self.minimize,
        )
        records.write_results_csv(self.outputs)

    # --- the sampler's side ---

    def _open_storage(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = str(self.folder / "journal.log")
        storage = JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
        return optuna.create_study(
            storage=storage,
            study_name=self.spec.study.name,
            direction="minimize" if self.minimize else "maximize",
            load_if_exists=True,
        )

    def _tell_unheard(self, study: optuna.Study, finished: dict[int, TrialRecord]) -> None:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in finished:
                self._tell(study, finished[trial.number])

    def _tell(self, study: optuna.Study, record: TrialRecord) -> None:
        worst = _WORST if self.minimize else -_WORST
        study.tell(record.trial_number, worst if record.value is None else record.value)

    def _next_trial(self, study: optuna.Study, finished: dict[int, TrialRecord]) -> FrozenTrial:
        """Unfinished work first, then the queue in order, then the sampler."""
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state == TrialState.RUNNING and trial.number not in finished:
                if trial.params.keys() == self.space.distributions.keys():
                    return trial
                study.tell(trial.number, state=TrialState.FAIL)  # killed between asking and sampling: holds nothing
        trials = study.get_trials(deepcopy=False)
        if not any(trial.state == TrialState.WAITING for trial in trials):
            taken = {trial.user_attrs.get("entry") for trial in trials if trial.state != TrialState.FAIL}
            self._enqueue_next(study, taken)
        # A sampler made anew from (seed, trials so far) goes on where it stopped: a stopped study asks what an
        # uninterrupted one would have asked, instead of replaying its start-up samples.
        study.sampler = optuna.samplers.TPESampler(
            seed=derive_seed(self.spec.study.seed, _SAMPLER, len(trials)),
            n_startup_trials=self.spec.study.n_startup_trials,
        )
        asked = study.ask(self.space.distributions)
        return study.get_trials(deepcopy=False)[asked.number]

    def _enqueue_next(self, study: optuna.Study, known: set[str | None]) -> None:
        for entry in self.spec.queue:
            identity = queue.identity(entry)
            if identity not in known:
                attributes = {"entry": identity, "note": entry.note}
                study.enqueue_trial(queue.params_for(entry, self.space), user_attrs=attributes)
                return

    # --- one trial ---

    def _run_trial(self, trial: FrozenTrial) -> TrialRecord | None:
        seed = derive_seed(self.spec.study.seed, _TRIAL, trial.number)
        config = self.space.trial_config(self.spec, trial.params, seed=seed)
        source = "queue" if "entry" in trial.user_attrs else "sampler"
        self.notify(TrialStarted(trial.number, config.shape, source, trial.user_attrs.get("note", "")))
        started = environment.now()
        folds = self.folds(config.model.context_length)
        fits = []
        for index, dataset in enumerate(folds):
            fit = loop.fit(
                config,
                dataset,
                metric=self.spec.study.metric,
                on_epoch=lambda epoch, index=index: self.notify(EpochDone(trial.number, index, len(folds), epoch)),
                should_stop=self.should_stop,
            )
            if fit.outcome == "interrupted":
                return None
            fits.append(fit)
            if fit.outcome not in records.SUCCESSES:
                break
        record = self._record(trial, config, fits, folds, started=started)
        where = records.trial_folder(self.folder, trial.number)
        shutil.rmtree(where, ignore_errors=True)
        records.write_predictions(where, _predictions(fits, folds))
        if record.value is not None:
            for index, (fit, dataset) in enumerate(zip(fits, folds, strict=True)):
                meta = checkpoint_meta(self.spec, record, dataset, fold=index)
                checkpoint.save(where / "checkpoint" / f"fold_{index}", fit.params, config=config, meta=meta)
        records.append(self.folder, record)
        return record

    def _record(
        self, trial: FrozenTrial, config: TrialConfig, fits: list[loop.FitResult], folds: tuple[Dataset, ...], started
    ) -> TrialRecord:
        kept = tuple(_fold_record(self.spec, fit, fold) for fit, fold in zip(fits, folds, strict=False))
        outcome = fits[-1].outcome
        value = records.mean_metrics([fold.best for fold in kept]).get(self.spec.study.metric)
        entry = trial.user_attrs.get("entry")
        return TrialRecord(
            study=self.spec.study.name,
            trial_number=trial.number,
            config=config,
            config_hash=config_hash(config),
            budget=self.spec.budget,
            source="queue" if entry else "sampler",
            entry=entry,
            note=trial.user_attrs.get("note", ""),
            params=dict(trial.params),
            **config.shape.model_dump(),
            param_count=fits[0].param_count,
            seeds={"study": self.spec.study.seed, "trial": config.seed},
            metric=self.spec.study.metric,
            value=value if outcome in records.SUCCESSES else None,
            outcome=outcome,
            detail=fits[-1].detail,
            folds=kept,
            libraries=environment.libraries(),
            device=environment.device(),
            git_commit=environment.git_commit(),
            started=started,
            finished=environment.now(),
            compile_s=sum(fit.compile_s for fit in fits),
            wall_s=sum(fit.wall_s for fit in fits),
        )

    def _keep_best_checkpoints(self, finished: list[TrialRecord]) -> None:
        sign = 1 if self.minimize else -1
        scored = sorted((r for r in finished if r.value is not None), key=lambda r: (sign * r.value, r.trial_number))
        for record in scored[self.spec.study.keep_checkpoints :]:
            where = records.trial_folder(self.folder, record.trial_number) / "checkpoint"
            shutil.rmtree(where, ignore_errors=True)


def derive_seed(seed: int, stream: int, number: int) -> int:
    """The number-th seed of one of a study's streams: 31 bits, spread by NumPy's SeedSequence."""
    return int(np.random.SeedSequence([seed, stream, number]).generate_state(1)[0] >> 1)


def checkpoint_meta(spec: StudySpec, record: TrialRecord, dataset: Dataset, *, fold: int) -> dict[str, Any]:
    """What a checkpoint holds beside weights and config, so that its path alone is enough to evaluate it."""
    return {
        "study": spec.study.name,
        "trial_number": record.trial_number,
        "fold": fold,
        "metric": record.metric,
        "best": record.folds[fold].best,
        "feature_names": list(dataset.feature_names),
        "param_count": record.param_count,
        "prior": train_prior(dataset),
        "scaling": dataset.scaling.to_json(),
        "data_hash": dataset.data_hash,
        "label_hash": dataset.label_hash,
        "split_hash": dataset.split_hash,
        "libraries": record.libraries,
    }


def train_prior(dataset: Dataset) -> float:
    """Mean training label: the base rate, or the mean log return."""
    return float(np.mean(dataset.train.labels, dtype=np.float64))


def _fold_record(spec: StudySpec, fit: loop.FitResult, dataset: Dataset) -> FoldRecord:
    part = dataset.validation
    per_asset: dict[str, dict[str, Any]] = {}
    if fit.outputs is not None and np.isfinite(fit.outputs).all():
        ids = dataset.asset_ids[part.rows]
        per_asset = metrics.per_asset(
            spec.task.kind, fit.outputs, part.labels, ids, dataset.assets, prior=train_prior(dataset)
        )
    return FoldRecord(
        outcome=fit.outcome,
        best=fit.best,
        last=fit.last,
        per_asset=per_asset,
        best_epoch=fit.best_epoch,
        best_step=fit.best_step,
        epochs=fit.epochs,
        steps=fit.steps,
        curve=tuple(fit.curve),
        data_hash=dataset.data_hash,
        label_hash=dataset.label_hash,
        split_hash=dataset.split_hash,
        n_train=len(dataset.train.rows),
        n_validation=len(part.rows),
        compile_s=fit.compile_s,
        wall_s=fit.wall_s,
    )


def _predictions(fits: list[loop.FitResult], folds: tuple[Dataset, ...]) -> pa.Table:
    """One row per validation sample of every fold that has outputs."""
    parts = [
        _prediction_table(dataset, index, fit.outputs)
        for index, (fit, dataset) in enumerate(zip(fits, folds, strict=False))
        if fit.outputs is not None
    ]
    return pa.concat_tables(parts) if parts else pa.table({name: [] for name in records.PREDICTION_COLUMNS})


def _prediction_table(dataset: Dataset, fold: int, outputs: np.ndarray) -> pa.Table:
    rows = dataset.validation.rows
    columns = (
        np.full(len(rows), fold, np.int32),
        dataset.dates[rows].astype("datetime64[D]"),
        np.asarray(dataset.assets)[dataset.asset_ids[rows]],
        dataset.validation.labels.astype(np.float32),
        np.asarray(outputs, np.float32),
    )
    return pa.table([pa.array(column) for column in columns], names=list(records.PREDICTION_COLUMNS))
