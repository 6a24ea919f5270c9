"""Confirmation run: a study's best trials, each trained again with the same fresh seeds.

To the scheduler it is a source of jobs like a search. Its memory is its folder alone: a rerun with a record is done,
one without is unfinished work that goes on from its last save. It needs no storage, and runs on one machine at a time.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fintx.analysis import confirmation
from fintx.analysis.confirmation import Confirmation
from fintx.config.schema import ConfirmConfig, StudySpec, TrialConfig
from fintx.data import datasets
from fintx.errors import FintxError
from fintx.evaluate import metrics
from fintx.run.job import Job
from fintx.run.study_run import StudyRun
from fintx.study import lifecycle, locks, records, search_space, study_file
from fintx.study.events import ConfirmReady, RerunFinished, RunContext
from fintx.study.records import TrialRecord
from fintx.train.train_state import static_config


@dataclass(frozen=True)
class ConfirmationSummary:
    """What a run of a confirmation leaves."""

    folder: Path
    spec: StudySpec
    confirmation: Confirmation | None
    """As far as it has come; none where it can't be computed."""
    interrupted: bool
    given_up: tuple[str, ...]
    """Reruns whose attempts all crashed or hung, a line each: the next run tries them again."""
    problem: FintxError | None


@dataclass(eq=False)
class ConfirmationRun:
    """A confirmation under way in this process."""

    folder: Path
    """The study\'s folder."""
    run: StudyRun
    trials: tuple[TrialRecord, ...]
    """The best, in the search's order."""
    seeds: tuple[int, ...]
    """The same for each of them."""

    def __post_init__(self) -> None:
        # Seed by seed, so that trials can be compared on the same seeds whenever it stops.
        self.reruns = tuple((record, seed) for seed in self.seeds for record in self.trials)
        self.done = {key for key in range(len(self.reruns)) if (self._folder(key) / "record.json").is_file()}
        self._attempts: dict[int, int] = {}
        self.run.label = self._label

    @property
    def spec(self) -> StudySpec:
        """The study\'s settings."""
        return self.run.spec

    @property
    def over(self) -> bool:
        """Nothing is left to do."""
        return not self.run.running and not self._open_keys()

    @property
    def settled(self) -> bool:
        """Whether no worker trains a rerun of this confirmation."""
        return not self.run.running

    def next_jobs(self, fits: Callable[[TrialConfig], int | None]) -> Iterator[Job]:
        """The next reruns to train side by side on a worker; none: nothing to do now.

        Args:
            fits: memory limit of a trial of that config if it were started now (0: the device's); none: no room yet.
        """
        self.run.check_stop()
        keys = self._open_keys()
        if not keys or not self.run.active:
            return
        first = self._config(keys[0])
        limit = fits(first)
        if limit is None:
            return
        population_size = self.run.population_size(keys[0], first)
        alike = [
            key
            for key in keys[1:]
            if static_config(config := self._config(key)) == static_config(first)
            and self.run.population_size(key, config) > 1
        ]
        for key in [keys[0], *alike][:population_size]:
            record = self.reruns[key][0]
            attempt = self._attempts[key] = max(self._attempts.get(key, 0), _last_attempt(self._folder(key))) + 1
            job = Job(
                spec=self.spec.model_copy(update={"queue": ()}), config=self._config(key), number=record.trial_number,
                attempt=attempt, params=record.params, entry=record.entry, note=record.note, training=record.training,
                study_folder=self.folder.resolve(), data_root=self.run.context.data_root.resolve(),
                memory_limit=limit or None, rerun=key, population_size=population_size,
            )  # fmt: skip
            yield self.run.begin(job)

    def handle(self, key: int, kind: str, values: dict[str, Any], *, pid: int) -> None:
        """Take an event of a running rerun (`workers.WorkerEvent`)."""
        result = self.run.handle(key, kind, values)
        if isinstance(result, TrialRecord):
            self.done.add(key)
            n_done, n_reruns = len(self.done), len(self.reruns)
            self.run.context.notify(
                RerunFinished(self.run.name, key, self._label(key), result, n_done, n_reruns)
            )  # fmt: skip

    def tick(self) -> None:
        """Look for a request to stop."""
        self.run.check_stop()

    def result(self, *, interrupted: bool) -> ConfirmationSummary:
        """Compare what has been trained so far, and write confirmation.json."""
        run, comparison = self.run, None
        with run.guard():
            comparison = confirmation.build(
                self.folder, self.spec, self.trials, self.seeds, data_root=run.context.data_root
            )
            confirmation.write(self.folder, comparison)
        stopped = (interrupted or run.stop_asked) and not self.over
        return ConfirmationSummary(self.folder, self.spec, comparison, stopped, run.given_up(self.done), run.problem)

    def _open_keys(self) -> list[int]:
        limits = self.spec.execution
        keys = (key for key in range(len(self.reruns)) if key not in self.done and key not in self.run.running)
        return [key for key in keys if self.run.failures.attempts_left(key, limits)]

    def _config(self, key: int) -> TrialConfig:
        record, seed = self.reruns[key]
        return record.config.model_copy(update={"seed": seed})

    def _folder(self, key: int) -> Path:
        record, seed = self.reruns[key]
        return records.rerun_folder(self.folder, record.trial_number, seed)

    def _label(self, key: int) -> str:
        record, seed = self.reruns[key]
        return f"trial {record.trial_number} again, seed {self.seeds.index(seed) + 1} of {len(self.seeds)}"


@contextlib.contextmanager
def open_confirmation(folder: Path, confirm: ConfirmConfig, context: RunContext) -> Iterator[ConfirmationRun]:
    """Hold a study's folder and choose its best trials so far.

    Raises:
        locks.Stopped: a stop was asked for, of the run or of the study, before it was open.
        StudyBusy: another process of this host runs the study.
        FintxError: no trial to confirm, or data that are missing or not those of the study.
    """
    study = study_file.read_study(folder)
    if study is None:
        raise FintxError(f"{folder}: holds no study (no study.json)")
    with locks.hold(folder), locks.hold(folder / "confirm", alone=True):
        stop_requests = locks.StopRequests(folder)
        check_stop = functools.partial(stop_requests.check, context.should_stop)
        finished = records.read_all(folder)
        best = records.ranked(finished, minimize=metrics.MINIMIZE[study.spec.study.metric])[: confirm.top_k]
        if not best:
            raise FintxError(
                f"{folder}: has no successful trial yet ({len(finished)} finished), so there is nothing to confirm; "
                "run the study first"
            )
        spec, prepared = lifecycle.resolve_data(study.spec, folder=folder, data_root=context.data_root)
        _check_data(folder, best[0], prepared)
        study_file.ensure_baselines(
            folder, prepared.folds, spec, context.data_root, notify=lambda line: None, check_stop=check_stop
        )  # fmt: skip
        check_stop()
        seeds = fresh_seeds(spec.study.seed, confirm.n_seeds, used={record.config.seed for record in finished})
        run = StudyRun(spec, context, stop_requests, len(prepared.folds))
        source = ConfirmationRun(folder, run, tuple(best), seeds)
        numbers = tuple(record.trial_number for record in best)
        context.notify(
            ConfirmReady(run.name, spec, prepared, numbers, len(seeds), len(finished), len(source.done))
        )  # fmt: skip
        yield source


def fresh_seeds(seed: int, n: int, *, used: set[int]) -> tuple[int, ...]:
    """The first n seeds of the study's stream for confirmations, without those that the search has used.

    A larger n adds seeds behind the same first ones: a confirmation that is widened keeps what it has.
    """
    seeds: list[int] = []
    number = 0
    while len(seeds) < n:
        fresh = search_space.derive_seed(seed, search_space.CONFIRM, number)
        if fresh not in used and fresh not in seeds:
            seeds.append(fresh)
        number += 1
    return tuple(seeds)


def _check_data(folder: Path, best: TrialRecord, prepared: datasets.PreparedData) -> None:
    for index, (fold, dataset) in enumerate(zip(best.folds, prepared.folds, strict=True)):
        for name in ("data_hash", "label_hash"):
            if getattr(fold, name) != getattr(dataset, name):
                raise FintxError(
                    f"{folder}: its trials were trained on other {name.removesuffix('_hash')} (fold {index}: {name} "
                    f"{getattr(fold, name)[:12]}, here {getattr(dataset, name)[:12]}); use the same --data-dir"
                )


def _last_attempt(folder: Path) -> int:
    """Number of the last attempt that has trained there; 0: none."""
    path = folder / "attempts.jsonl"
    numbers = re.findall(r'"attempt": (\d+)', path.read_text()) if path.is_file() else []
    return max(map(int, numbers), default=0)
