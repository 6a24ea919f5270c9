"""How does a study run? Ask the sampler or the queue, fit, write the record, tell; until n_trials records stand.

A trial that the storage holds as running, but that has no record, is unfinished work: whatever ended it, the next run
of the same study takes it up again under its number. A record that the storage hasn't heard of is told. So the same
command may be stopped anywhere and given again.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

import fintx
from fintx.config import Shape, StudySpec
from fintx.data import windows
from fintx.data.windows import Dataset
from fintx.evaluate import metrics
from fintx.study import environment, queue, records, trial
from fintx.study.lead import Lead, over_baselines
from fintx.study.lock import hold
from fintx.study.records import StudyFile, TrialRecord
from fintx.study.space import SearchSpace
from fintx.train import loop
from fintx.types import FintxError

_WORST = 1e9
"""Told for a diverged, collapsed or out-of-memory trial: the sampler only ranks, and must learn to stay away."""

_SAMPLER, _TRIAL = 0, 1  # streams of derive_seed


class StudyConflict(FintxError):
    """The output folder holds another study of this name."""


@dataclass(frozen=True)
class StudyReady:
    """Data, label and split stand; no trial has begun."""

    prepared: windows.Prepared
    n_shapes: int


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


Event = StudyReady | TrialStarted | EpochDone | TrialFinished


@dataclass(frozen=True)
class Summary:
    """What a run of a study leaves."""

    folder: Path
    spec: StudySpec
    records: tuple[TrialRecord, ...]
    best: TrialRecord | None
    baselines: dict[str, Any]
    lead: Lead | None
    """Of the best trial over the best baseline."""
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
        notify(StudyReady(prepared, len(space.shapes)))
        windows.store_processed(prepared, data_root)
        worker = _Worker(folder, outputs, spec, space, lambda length: prepare(length).folds, notify, should_stop)
        beaten = trial.ensure_baselines(folder, prepared.folds, spec, data_root)
        interrupted = not worker.work()
        worker.write_tables()
    finished = tuple(records.read_all(folder))
    best = records.best_of(list(finished), minimize=metrics.MINIMIZE[spec.study.metric])
    effective = sum(part.n_effective for part in prepared.parts if part.part.startswith("validation"))
    lead = over_baselines(folder, spec, best, beaten, n_effective=effective) if best else None
    return Summary(folder, spec, finished, best, beaten, lead, interrupted)


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
            record = self._run_trial(self._next_trial(study, finished))
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
        for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if frozen.number in finished:
                self._tell(study, finished[frozen.number])

    def _tell(self, study: optuna.Study, record: TrialRecord) -> None:
        worst = _WORST if self.minimize else -_WORST
        study.tell(record.trial_number, worst if record.value is None else record.value)

    def _next_trial(self, study: optuna.Study, finished: dict[int, TrialRecord]) -> FrozenTrial:
        """Unfinished work first, then the queue in order, then the sampler."""
        trials = study.get_trials(deepcopy=False)
        for frozen in trials:
            if frozen.state == TrialState.RUNNING and frozen.number not in finished:
                if frozen.params.keys() == self.space.distributions.keys():
                    return frozen
                study.tell(frozen.number, state=TrialState.FAIL)  # killed between asking and sampling: holds nothing
        trials = study.get_trials(deepcopy=False)
        if not any(frozen.state == TrialState.WAITING for frozen in trials):
            taken = {frozen.user_attrs.get("entry") for frozen in trials if frozen.state != TrialState.FAIL}
            self._enqueue_next(study, taken, finished)
        # A sampler made anew from (seed, trials so far) goes on where it stopped: a stopped study asks what an
        # uninterrupted one would have asked, instead of replaying its start-up samples.
        study.sampler = optuna.samplers.TPESampler(
            seed=derive_seed(self.spec.study.seed, _SAMPLER, len(trials)),
            n_startup_trials=self.spec.study.n_startup_trials,
        )
        asked = study.ask(self.space.distributions)
        return study.get_trials(deepcopy=False)[asked.number]

    def _enqueue_next(
        self, study: optuna.Study, known: set[str | None], finished: dict[int, TrialRecord]
    ) -> None:  # fmt: skip
        best = records.best_of(list(finished.values()), minimize=self.minimize)
        for entry in queue.entries(self.spec, self.space):
            identity = queue.identity(entry)
            if identity not in known:
                settled = queue.settle(entry, self.spec, self.space, best=best)
                attributes = {"entry": identity, "note": entry.note, "shape": settled.shape.model_dump()}
                study.enqueue_trial(settled.params, user_attrs=attributes)
                return

    def _run_trial(self, frozen: FrozenTrial) -> TrialRecord | None:
        seed = derive_seed(self.spec.study.seed, _TRIAL, frozen.number)
        pinned = frozen.user_attrs.get("shape")
        shape = self.space.decode(frozen.params) if pinned is None else Shape(**pinned)
        config = self.space.trial_config(self.spec, frozen.params, shape, seed=seed)
        asked = trial.Asked(
            number=frozen.number,
            params=dict(frozen.params),
            entry=frozen.user_attrs.get("entry"),
            note=frozen.user_attrs.get("note", ""),
        )
        self.notify(TrialStarted(asked.number, config.shape, asked.source, asked.note))
        folds = self.folds(config.model.context_length)

        def on_epoch(fold: int, epoch: loop.Epoch) -> None:
            self.notify(EpochDone(asked.number, fold, len(folds), epoch))

        return trial.run(
            self.spec, asked, config, folds, study_folder=self.folder, on_epoch=on_epoch, should_stop=self.should_stop
        )

    def _keep_best_checkpoints(self, finished: list[TrialRecord]) -> None:
        for record in records.ranked(finished, minimize=self.minimize)[self.spec.study.keep_checkpoints :]:
            where = records.trial_folder(self.folder, record.trial_number) / "checkpoint"
            shutil.rmtree(where, ignore_errors=True)


def derive_seed(seed: int, stream: int, number: int) -> int:
    """The number-th seed of one of a study's streams: 31 bits, spread by NumPy's SeedSequence."""
    return int(np.random.SeedSequence([seed, stream, number]).generate_state(1)[0] >> 1)
