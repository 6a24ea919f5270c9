"""A confirmation in this process: a study's best trials, each trained again with new seeds.

To the runner it is like a search: it hands out jobs and hears how they end. Its memory is its folder alone:
a rerun with a record is done, one without is unfinished work that goes on from its last save. It needs no storage, and
runs on one machine at a time.
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
    """As far as it has come; none where it can't be told."""
    interrupted: bool
    left_aside: tuple[str, ...]
    """Reruns whose attempts all crashed or hung, a line each: the next run tries them again."""
    problem: FintxError | None


class ConfirmationRun:
    """A confirmation under way in this process; reruns are numbered seed by seed, so that any stop leaves pairs."""

    def __init__(
        self, folder: Path, run: StudyRun, trials: tuple[TrialRecord, ...], fresh: tuple[int, ...]
    ):  # fmt: skip
        """
        Args:
            trials: the best, in the search's order.
            fresh: seeds, the same for each of them.
        """
        self.folder, self.run, self.trials, self.seeds = folder, run, trials, fresh
        self.reruns = tuple((record, seed) for seed in fresh for record in trials)
        self.done = {key for key in range(len(self.reruns)) if (self._where(key) / "record.json").is_file()}
        self._attempts: dict[int, int] = {}
        run.label = self._words

    @property
    def spec(self) -> StudySpec:
        """The study's."""
        return self.run.spec

    @property
    def over(self) -> bool:
        """Nothing is left to do."""
        return not self.run.held and not self._open()

    @property
    def settled(self) -> bool:
        """Nothing runs."""
        return not self.run.held

    # --- what next ---

    def next_job(self, fits: Callable[[TrialConfig], int | None]) -> Job | None:
        """The next rerun to hand to a worker; none: nothing to do now.

        Args:
            fits: memory limit of a trial of that config if it were started now (0: the device's); none: no room yet.
        """
        self.tick()
        open_ = self._open()
        if not open_ or not self.run.goes_on:
            return None
        config = self._config(open_[0])
        limit = fits(config)
        if limit is None:
            return None
        return self._job(open_[0], limit or None, self.run.population_size(open_[0], config))

    def more_like(self, first: Job, *, beside: int) -> Job | None:
        """Another rerun that may train together with one just handed out; none: no more of them."""
        if beside >= first.population_size or not self.run.goes_on:
            return None
        wanted = static_config(first.config)
        alike = [
            key
            for key in self._open()
            if static_config(config := self._config(key)) == wanted and self.run.population_size(key, config) > 1
        ]
        return self._job(alike[0], first.memory_limit, first.population_size) if alike else None

    def _open(self) -> list[int]:
        limits = self.spec.execution
        keys = (key for key in range(len(self.reruns)) if key not in self.done and key not in self.run.held)
        return [key for key in keys if self.run.failures.attempts_left(key, limits)]

    def _config(self, key: int) -> TrialConfig:
        record, seed = self.reruns[key]
        return record.config.model_copy(update={"seed": seed})

    def _job(self, key: int, limit: int | None, population_size: int) -> Job:
        record, config = self.reruns[key][0], self._config(key)
        attempt = self._attempts[key] = max(self._attempts.get(key, 0), _attempts_of(self._where(key))) + 1
        job = Job(
            spec=self.spec.model_copy(update={"queue": ()}), config=config, number=record.trial_number,
            attempt=attempt, params=record.params, entry=record.entry, note=record.note, training=record.training,
            study_folder=self.folder.resolve(), data_root=self.run.context.data_root.resolve(), memory_limit=limit,
            rerun=key, population_size=population_size,
        )  # fmt: skip
        return self.run.begin(job)

    # --- what came of it ---

    def heard(self, key: int, kind: str, values: dict[str, Any], *, pid: int) -> None:
        """Take what a worker said of a held rerun, or how its job ended (`job.ENDS`)."""
        ending = self.run.hear(key, kind, values)
        if isinstance(ending, TrialRecord):
            self.done.add(key)
            total = len(self.reruns)
            self.run.context.notify(
                RerunFinished(self.run.name, key, self._words(key), ending, len(self.done), total)
            )  # fmt: skip

    def tick(self) -> None:
        """Look for a request to stop."""
        self.run.hear_stop()

    def result(self, *, interrupted: bool) -> ConfirmationSummary:
        """Compare what has been trained so far, and write confirmation.json."""
        found, run = None, self.run
        try:
            found = confirmation.build(
                self.folder, self.spec, self.trials, self.seeds, data_root=run.context.data_root
            )  # fmt: skip
            confirmation.write(self.folder, found)
        except FintxError as error:
            run.fail(error)
        stopped = (interrupted or run.stop_asked) and not self.over
        return ConfirmationSummary(self.folder, self.spec, found, stopped, run.left_aside(self.done), run.problem)

    # --- names ---

    def _where(self, key: int) -> Path:
        record, seed = self.reruns[key]
        return records.rerun_folder(self.folder, record.trial_number, seed)

    def _words(self, key: int) -> str:
        record, seed = self.reruns[key]
        return f"trial {record.trial_number} again, seed {self.seeds.index(seed) + 1} of {len(self.seeds)}"


@contextlib.contextmanager
def open_confirmation(folder: Path, wanted: ConfirmConfig, context: RunContext) -> Iterator[ConfirmationRun]:
    """Hold a study's folder and choose its best trials so far.

    Raises:
        stopping.Stopped: a stop was asked for, of the run or of the study, before it stood.
        StudyBusy: another process of this host runs the study.
        FintxError: no trial to confirm, or data that are missing or not those of the study.
    """
    known = study_file.read_study(folder)
    if known is None:
        raise FintxError(f"{folder}: holds no study (no study.json)")
    with locks.hold(folder), locks.hold(folder / "confirm", alone=True):
        stop_requests = locks.StopRequests(folder)
        check_stop = functools.partial(stop_requests.check, context.should_stop)
        finished = records.read_all(folder)
        best = records.ranked(finished, minimize=metrics.MINIMIZE[known.spec.study.metric])[: wanted.top_k]
        if not best:
            raise FintxError(
                f"{folder}: has no successful trial yet ({len(finished)} finished), so there is nothing to confirm; "
                "run the study first"
            )
        spec, prepared = lifecycle.resolve_data(known.spec, folder=folder, data_root=context.data_root)
        _check_data(folder, best[0], prepared)
        study_file.ensure_baselines(
            folder, prepared.folds, spec, context.data_root, notify=lambda line: None, check_stop=check_stop
        )  # fmt: skip
        check_stop()
        fresh = fresh_seeds(spec.study.seed, wanted.n_seeds, used={record.config.seed for record in finished})
        run = StudyRun(spec, context, stop_requests, len(prepared.folds))
        course = ConfirmationRun(folder, run, tuple(best), fresh)
        numbers = tuple(record.trial_number for record in best)
        context.notify(
            ConfirmReady(run.name, spec, prepared, numbers, len(fresh), len(finished), len(course.done))
        )  # fmt: skip
        yield course


def fresh_seeds(seed: int, n: int, *, used: set[int]) -> tuple[int, ...]:
    """The first n seeds of the study's stream for confirmations, without those that the search has used.

    More seeds begin with the fewer: a confirmation that is widened keeps what it has.
    """
    found: list[int] = []
    number = 0
    while len(found) < n:
        fresh = search_space.derive_seed(seed, search_space.CONFIRM, number)
        if fresh not in used and fresh not in found:
            found.append(fresh)
        number += 1
    return tuple(found)


def _check_data(folder: Path, best: TrialRecord, prepared: datasets.PreparedData) -> None:
    for index, (fold, dataset) in enumerate(zip(best.folds, prepared.folds, strict=True)):
        for name in ("data_hash", "label_hash"):
            if getattr(fold, name) != getattr(dataset, name):
                raise FintxError(
                    f"{folder}: its trials were trained on other {name.removesuffix('_hash')} (fold {index}: {name} "
                    f"{getattr(fold, name)[:12]}, here {getattr(dataset, name)[:12]}); use the same --data-dir"
                )


def _attempts_of(folder: Path) -> int:
    """How many attempts have trained there."""
    path = folder / "attempts.jsonl"
    if not path.is_file():
        return 0
    return max(map(int, re.findall(r'"attempt": (\d+)', path.read_text())), default=0)
