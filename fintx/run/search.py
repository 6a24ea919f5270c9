"""Search: which trial of a study comes next, and what becomes of each; nothing is trained or waited for here.

The storage may be away whenever it is used. Then the study says so once, goes on with what it has, and tries again;
results that the storage must get are kept in order until it has them.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fintx.analysis import predictions, status
from fintx.analysis.predictions import BaselineComparison
from fintx.config import validate
from fintx.config.schema import QueueEntry, Shape, StudySpec, TrialConfig
from fintx.errors import FintxError
from fintx.run.job import Job
from fintx.run.study_run import StudyRun
from fintx.study import queue, records, search_space, study_file
from fintx.study.events import RunContext, TrialFinished
from fintx.study.lifecycle import OpenStudy, StudyRequest, write_definition
from fintx.study.records import TrialRecord
from fintx.study.storage import StorageAway
from fintx.study.trial_table import Choice, Lease, Proposal, SameTrial, Withdrawal
from fintx.train import memory
from fintx.train.train_state import static_config

_RENEW_S = 15.0
_LOOK_S = 2.0
"""Between looks for edits of the file and for other machines' results."""
_IDLE_S = 1.0
"""After there was nothing to do, until the storage is asked again; the end of a trial of its own ends the wait."""
_BACKOFF_S = (0.2, 5.0)


@dataclass(frozen=True)
class StudySummary:
    """What a run of a study leaves."""

    folder: Path
    spec: StudySpec
    records: tuple[TrialRecord, ...]
    interrupted: bool
    best: TrialRecord | None = None
    baselines: dict[str, Any] = field(default_factory=dict)
    comparison: BaselineComparison | None = None
    """The best trial against the best baseline; none where its predictions lie on another machine."""
    given_up: tuple[str, ...] = ()
    """Trials whose attempts all crashed or hung, a line each: the next run tries them again."""
    waiting: tuple[str, ...] = ()
    """Queue entries that n_trials left no room for."""
    problem: FintxError | None = None
    """What stopped the study before its end."""

    @property
    def to_be_confirmed(self) -> bool:
        """Whether the search is at its end, its file asks for a confirmation, and this is the place for it."""
        done = self.problem is None and not self.interrupted and len(self.records) >= self.spec.study.n_trials
        return done and self.spec.confirm is not None and self.predictions_here

    @property
    def predictions_here(self) -> bool:
        """Whether the best trial's predictions lie in this folder; another machine may have trained it."""
        return self.best is not None and _predictions(self.folder, self.best).is_file()


@dataclass(eq=False)
class Search:
    """A search under way in this process."""

    study: OpenStudy
    request: StudyRequest
    context: RunContext
    run: StudyRun = field(init=False)
    finished: dict[int, TrialRecord] = field(init=False)
    leases: dict[int, Lease] = field(default_factory=dict)
    """Of the trials that workers train for this process."""
    over: bool = False
    """Nothing is left to do, here or elsewhere."""

    def __post_init__(self) -> None:
        self.run = StudyRun(
            self.study.spec, self.context, self.study.stop_requests, len(self.study.prepared.folds)
        )  # fmt: skip
        self.finished = {record.trial_number: record for record in records.read_all(self.study.folder)}
        self._pids: dict[int, int] = {}
        self._progressed: set[int] = set()
        """Trials whose lease is to be renewed."""
        self._pending: list[Callable[[], object]] = []
        """Results that the storage has yet to get."""
        self._away_since: float | None = None
        self._away_tries = 0
        self._retry_at = self._look_at = self._renew_at = self._idle_until = 0.0
        self._last_seen: dict[int, tuple[tuple[Any, ...], float]] = {}
        """Of each lease: what tells that it was renewed, and since when."""
        self._noticed: set[str] = set()
        self._edit: StudySpec | None = None

    @property
    def spec(self) -> StudySpec:
        """As its file has it now."""
        return self.run.spec

    @property
    def total(self) -> int:
        """Trials with a record at the end of this run, as far as its file asks for them now."""
        if not self.request.queue_only:
            return self.spec.study.n_trials
        done = {record.entry for record in self.finished.values()}
        return len(self.finished) + sum(queue.entry_id(entry) not in done for entry in self._entries())

    @property
    def settled(self) -> bool:
        """Nothing runs here, and the storage knows all that happened."""
        return not self.run.running and not self._pending

    @property
    def best(self) -> TrialRecord | None:
        """The best finished trial so far."""
        return records.best_of(list(self.finished.values()), minimize=self.study.minimize)

    # --- the next jobs ---

    def next_jobs(self, fits: Callable[[TrialConfig], int | None]) -> Iterator[Job]:
        """The next trials to train side by side on a worker, each acquired; none: nothing to do now.

        Args:
            fits: memory limit of a trial of that config if it were started now (0: the device's); none: no room yet.
        """
        self.run.check_stop()
        if self.over or not self.run.active or self._pending or time.monotonic() < self._idle_until:
            return
        limit: int | None = None

        def suits(choice: Lease | Proposal, config: TrialConfig) -> bool:
            nonlocal limit
            limit = fits(config)
            return limit is not None

        lease = self._acquire(suits, ahead=True)
        if lease is None:
            self._idle_until = time.monotonic() + _IDLE_S
            return
        self.over = False
        population_size = self.run.population_size(lease.number, self._config(lease, lease.number))
        first = self._begin(lease, limit or None, population_size)
        yield first
        remaining = self.spec.study.n_trials - len(self.finished)
        share = -(-remaining // self.context.n_workers)  # the rest is for other workers
        for _ in range(1, min(population_size // self.spec.study.replicates, share)):
            if not self.run.active or self._pending or (other := self._acquire_alike(first)) is None:
                return
            yield self._begin(other, first.memory_limit, population_size)

    def _acquire_alike(self, first: Job) -> Lease | None:
        """Take the next trial if it can train beside one that was taken."""
        setting = self.spec.execution.population

        def suits(choice: Lease | Proposal, config: TrialConfig) -> bool:
            if static_config(config) != static_config(first.config):
                return False
            if isinstance(choice, Lease):
                return self.run.population_size(choice.number, config) > 1
            if setting != "auto" or not choice.entry or choice.training == "":
                return True
            # A queued trial's values must depend on no result that may still come in.
            entry = next(entry for entry in self._entries() if queue.entry_id(entry) == choice.entry)
            return entry.training == "defaults"

        return self._acquire(suits, ahead=setting != "auto")

    def _acquire(self, suits: Callable[[Lease | Proposal, TrialConfig], bool], *, ahead: bool) -> Lease | None:
        """Take the next trial, if it suits.

        Args:
            ahead: ask the sampler for more than its random start too.
        """

        def choose(leases: tuple[Lease, ...]) -> Choice:
            n_trials = len(self._trials())
            choice = self._choose(leases, propose=ahead or n_trials < self.spec.study.n_startup_trials)
            if choice is None or isinstance(choice, SameTrial | Withdrawal):
                return choice
            number = choice.number if isinstance(choice, Lease) else n_trials
            return choice if suits(choice, self._config(choice, number)) else None

        try:
            lease: Lease | None = self._reach(lambda: self.study.trial_table.acquire(choose))
            return lease
        except search_space.SpaceExhausted as error:
            if not self.run.running:  # else what runs comes to its end first
                self.run.fail(error)
            return None

    def _begin(self, lease: Lease, limit: int | None, population_size: int) -> Job:
        self.leases[lease.number], self.run.last_step[lease.number] = lease, lease.step
        config, population = self._config(lease, lease.number), self.spec.execution.population
        on_cores = not self.context.hosts and memory.on_cores(config, population, on_gpu=self.context.on_gpu)
        job = Job(
            spec=self.spec.model_copy(update={"queue": ()}), config=config, number=lease.number, attempt=lease.attempt,
            params=lease.params, entry=lease.entry, note=lease.note, training=lease.training,
            study_folder=self.study.folder.resolve(), data_root=self.context.data_root.resolve(), memory_limit=limit,
            population_size=population_size, on_cores=on_cores,
        )  # fmt: skip
        return self.run.begin(job)

    def _choose(self, leases: tuple[Lease, ...], *, propose: bool) -> Choice:
        """Own unfinished trials, then the queue, then the sampler, then what other machines have left behind.

        Args:
            propose: ask the sampler too.
        """
        n_trials, queue_only = self.spec.study.n_trials, self.request.queue_only
        unfinished = {lease.number: lease for lease in leases if not lease.finished}
        free = [lease for lease in unfinished.values() if self._is_free(lease)]
        cancelled = {queue.entry_id(entry) for entry in self.spec.queue if entry.cancelled}
        for lease in free:
            if lease.entry in cancelled:
                return Withdrawal(lease.number)
        n_begun, n_finished = len({lease.number for lease in leases}), len({x.number for x in leases if x.finished})
        if queue_only or n_finished + len(unfinished) - len(free) < n_trials:
            to_resume = [
                lease
                for lease in free
                if self._is_ours(lease) and self.run.failures.attempts_left(lease.number, self.spec.execution)
            ]
            for lease in to_resume:
                if lease.owner == self.study.trial_table.owner:
                    return lease
            if queue_only or n_begun < n_trials:
                new = self._new(leases, propose=propose)
                if new is not None:
                    return new
            if to_resume:
                return to_resume[0]
        awaited = [lease for lease in unfinished.values() if lease not in free and self._is_ours(lease)]
        for lease in awaited:
            if lease.number not in self.run.running:
                self._notice_once(f"waiting for trial {lease.number}, which runs on {lease.host}")
        self.over = not awaited
        return None

    def _is_ours(self, lease: Lease) -> bool:
        """Whether this run is about it: any trial of the study, or the queue's alone."""
        return not self.request.queue_only or lease.entry in {queue.entry_id(entry) for entry in self._entries()}

    def _is_free(self, lease: Lease) -> bool:
        """Nobody works on it: it was given back, its coordinator is gone, or its lease hasn't been renewed.

        The last is judged by this machine's clock alone.
        """
        if lease.number in self.run.running:
            return False
        if lease.state != "running" or lease.owner == self.study.trial_table.owner:
            return True
        now, mark = time.monotonic(), (lease.token, lease.beat, lease.state)
        previous, since = self._last_seen.get(lease.number, (None, now))
        if previous != mark:
            self._last_seen[lease.number] = (mark, now)
            return False
        return now - since > self.spec.execution.hang_s + 2 * self._renew_s

    def _new(self, leases: tuple[Lease, ...], *, propose: bool) -> Proposal | SameTrial | None:
        """The queue's next entry, or else the sampler's proposal."""
        space = self.study.space
        trained = {search_space.trial_identity(self._config(lease, 0)): lease.number for lease in leases}
        taken = {lease.entry for lease in leases}
        entry = next((entry for entry in self._entries() if queue.entry_id(entry) not in taken), None)
        if entry is None:
            if self.request.queue_only or not propose:
                return None
            params = self._propose({}, None, trained)
            return Proposal(params, space.distributions, space.decode(params), entry=None, note="", training="")
        identity, settled = queue.entry_id(entry), queue.settle(entry, space, best=self.best)
        params = settled.params
        if settled.training == "sampler":
            params = self._propose(params, settled.shape, trained)
        proposal = Proposal(params, space.distributions, settled.shape, identity, entry.note, settled.training)
        same = trained.get(search_space.trial_identity(self._config(proposal, 0)))
        if same is None:
            return proposal
        self._notice_once(f"queue entry {identity} asks for what trial {same} is already: not trained again")
        return SameTrial(identity, same)

    def _propose(self, fixed: dict[str, Any], shape: Shape | None, trained: dict[str, int]) -> dict[str, Any]:
        trials = self._trials()
        return search_space.propose(
            self.spec, self.study.space, trials, number=len(trials), fixed=fixed, shape=shape, trained=trained
        )

    def _entries(self) -> tuple[QueueEntry, ...]:
        return queue.entries(self.spec, self.study.space)

    def _trials(self) -> list[Any]:
        return self.study.trial_table.storage.study.get_trials(deepcopy=False)

    def _config(self, trial: Lease | Proposal, number: int) -> TrialConfig:
        seed = search_space.derive_seed(self.spec.study.seed, search_space.TRIAL, number)
        return self.study.space.trial_config(trial.params, trial.shape, seed=seed)

    # --- what became of them ---

    def handle(self, number: int, kind: str, values: dict[str, Any], *, pid: int) -> None:
        """Take an event of a running trial (`workers.WorkerEvent`)."""
        self._pids[number], self._idle_until = pid, 0.0
        if kind in ("loaded", "progress", "epoch"):
            self._progressed.add(number)
        result = self.run.handle(number, kind, values)
        if result is None:
            return
        lease, table, step = self.leases.pop(number), self.study.trial_table, self.run.last_step[number]
        if isinstance(result, TrialRecord):
            self._finish(lease, result)
        elif result.state != "superseded":  # then whoever took it has released the lease
            self._send(functools.partial(table.release, lease, result.state, result.detail, step=step))

    def _finish(self, lease: Lease, record: TrialRecord) -> None:
        self.finished[lease.number] = record
        self._send(functools.partial(self._report_to_storage, lease, record))
        if lease.number in self.finished:
            self._notify_finished(record)
            ranked = records.ranked(list(self.finished.values()), minimize=self.study.minimize)
            for other in ranked[self.spec.study.keep_checkpoints :]:
                folder = records.trial_folder(self.study.folder, other.trial_number)
                shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            self._write_tables()

    def _report_to_storage(self, lease: Lease, record: TrialRecord) -> None:
        if self.study.trial_table.tell(lease, record, minimize=self.study.minimize):
            return
        folder = records.trial_folder(self.study.folder, lease.number)
        (folder / "record.json").rename(folder / f"record.superseded-{lease.attempt}.json")
        self.finished.pop(lease.number, None)
        self._notice(f"trial {lease.number} had been given to another machine; the result that came late doesn't count")

    def _notify_finished(self, record: TrialRecord) -> None:
        self.context.notify(TrialFinished(self.run.name, record, tuple(self.finished.values()), self.total))

    def result(self, *, interrupted: bool) -> StudySummary:
        """What this run leaves, with what other machines finished since the last look."""
        with self.run.guard():
            self._read_other_machines()
            self._write_tables()
        folder, best, comparison = self.study.folder, self.best, None
        if best is not None and _predictions(folder, best).is_file():
            with self.run.guard():
                comparison = predictions.compare_trial(folder, self.spec, best)
        taken = {lease.entry for lease in self._reach(self.study.trial_table.leases) or ()}
        return StudySummary(
            folder=folder,
            spec=self.spec,
            records=tuple(self.finished[number] for number in sorted(self.finished)),
            interrupted=(interrupted or self.run.stop_asked) and not self.over,
            best=best,
            baselines=self.study.baselines,
            comparison=comparison,
            given_up=self.run.given_up(self.finished),
            waiting=tuple(identity for identity in map(queue.entry_id, self._entries()) if identity not in taken),
            problem=self.run.problem,
        )

    def _write_tables(self) -> None:
        folder, study = self.study.folder, self.spec.study
        status.write_json(
            folder, records.read_all(folder), n_trials=study.n_trials, metric=study.metric,
            minimize=self.study.minimize,
        )  # fmt: skip
        for damage in status.write_csv(self.context.study_root):
            self._notice_once(f"left out of experiment_results.csv: {damage}")

    # --- now and then ---

    def tick(self) -> None:
        """Renew leases, send what is pending, and look for requests, edits and other machines' results."""
        self._send()
        self.run.check_stop()
        now = time.monotonic()
        if self._progressed and now >= self._renew_at:
            self._renew_at = now + self._renew_s
            for number in sorted(self._progressed & self.run.running.keys()):
                self._renew(number)
            self._progressed.clear()
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            self._reread_file()
            self._read_other_machines()

    @property
    def _renew_s(self) -> float:
        return min(_RENEW_S, self.spec.execution.hang_s / 4)

    def _renew(self, number: int) -> None:
        lease, step, pid = self.leases[number], self.run.last_step[number], self._pids[number]
        superseded = object()
        renewed = self._reach(lambda: self.study.trial_table.renew(lease, step=step, pid=pid) or superseded)
        if renewed is superseded:
            self.run.superseded.add(number)
        elif renewed is not None:
            self.leases[number] = renewed

    def _read_other_machines(self) -> None:
        """Take trials that other machines finished, through the storage or from the shared folder."""
        folder = self.study.folder
        for text in self._reach(lambda: self.study.trial_table.foreign_records(self.finished)) or ():
            record = TrialRecord.model_validate_json(text)
            if not (records.trial_folder(folder, record.trial_number) / "record.json").is_file():
                records.append(folder, record)
        paths = (folder / "trials").glob("[0-9]*/record.json")
        new = [path for path in paths if int(path.parent.name) not in {*self.finished, *self.run.running}]
        for record in map(records.read, new):
            self.finished[record.trial_number] = record
            self._notify_finished(record)

    def _reread_file(self) -> None:
        """Take what may change while the study runs; all else waits for the next start."""
        where, counted = self.request.where, not self.request.queue_only
        try:
            fresh = self._edit = self.request.reload() or self._edit
            if fresh is None or (leases := self._reach(self.study.trial_table.leases)) is None:
                return
            self._edit = None
            spec, n_features = _edited(self.spec, fresh), len(self.spec.data.features)
            if misfit := next(validate.cross_checks(spec, counted=False), None):
                raise FintxError(f"{where(misfit[0])}: {misfit[1]}")
            queue.check(spec, n_features=n_features, where=where)
            queue.check_against_trials(spec, self.study.space, leases, counted=counted, where=where)
        except FintxError as error:
            self._notice(f"the edited sweep file is not taken: {error}")
            return
        if waiting := study_file.differences(_edited(self.study.requested, fresh), fresh):
            self._notice(f"edits of {', '.join(waiting)} hold from the next start")
        if spec != self.spec:
            self.run.spec, self.over, self._idle_until = spec, False, 0.0
            write_definition(self.study.folder, spec, queue_only=self.request.queue_only)
            self._notice(f"the file was edited: {len(spec.queue)} queue entries, {spec.study.n_trials} trials in all")

    # --- the storage, which may be away ---

    def _reach(self, ask: Callable[[], Any]) -> Any:
        """The storage's answer, or none while it is away."""
        now = time.monotonic()
        if now < self._retry_at:
            return None
        try:
            answer = ask()
        except StorageAway as error:
            if self._away_since is None:
                self._away_since = now
                meanwhile = f"{len(self.run.running)} trials go on" if self.run.running else "nothing is lost"
                self._notice(f"{error}; waiting for it, {meanwhile}")
            self._away_tries += 1
            self._retry_at = time.monotonic() + min(_BACKOFF_S[0] * 2**self._away_tries, _BACKOFF_S[1])
            return None
        if self._away_since is not None:
            self._notice(f"the storage is back after {now - self._away_since:.0f} s")
            self._away_since, self._away_tries = None, 0
        return answer

    def _send(self, *results: Callable[[], object]) -> None:
        """Give the storage these results and those that it has yet to get, as far as it can be reached."""
        self._pending += results
        while self._pending:
            if self._reach(lambda: (self._pending[0](),)) is None:
                return
            del self._pending[0]

    def _notice(self, text: str) -> None:
        self.context.notice(self.run.name, text)

    def _notice_once(self, text: str) -> None:
        if text not in self._noticed:
            self._noticed.add(text)
            self._notice(text)


def _edited(spec: StudySpec, fresh: StudySpec) -> StudySpec:
    """The spec with what of its edited file may be taken while it runs."""
    study = {name: getattr(fresh.study, name) for name in study_file.FREE_TO_CHANGE if name != "name"}
    execution = fresh.execution.model_copy(update={"storage": spec.execution.storage})
    changes = {"study": spec.study.model_copy(update=study), "execution": execution, "confirm": fresh.confirm}
    return spec.model_copy(update={**changes, "queue": fresh.queue})


def _predictions(folder: Path, record: TrialRecord) -> Path:
    return records.trial_folder(folder, record.trial_number) / "predictions.parquet"
