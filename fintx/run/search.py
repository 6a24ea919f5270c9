"""A study's search in this process: which trial it wants next, and what becomes of each. No waiting, no training.

Whatever touches the storage may find the database away. Then the study says so once, goes on with what it holds, and
tries again: what is to be told is kept in order until it is told.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fintx.analysis import status
from fintx.config import validate
from fintx.config.schema import StudySpec, TrialConfig
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
"""How often the file's queue and other machines' results are looked for."""
_IDLE_S = 1.0
"""After there was nothing to do, until it is asked again; the end of a trial of its own ends the wait."""
_BACKOFF_S = (0.2, 5.0)


@dataclass(eq=False)
class Search:
    """A search under way in this process."""

    opened: OpenStudy
    order: StudyRequest
    context: RunContext
    run: StudyRun = field(init=False)
    finished: dict[int, TrialRecord] = field(init=False)
    leases: dict[int, Lease] = field(default_factory=dict)
    """Of the trials that workers train for this process."""
    over: bool = False
    """Nothing is left to do, here or elsewhere."""

    def __post_init__(self) -> None:
        opened = self.opened
        self.run = StudyRun(opened.spec, self.context, opened.stop_requests, len(opened.prepared.folds))
        self.finished = {record.trial_number: record for record in records.read_all(opened.folder)}
        self._pids: dict[int, int] = {}
        self._progressed: set[int] = set()
        self._todo: list[Callable[[], object]] = []
        self._away_since: float | None = None
        self._away_tries = 0
        self._retry_at = self._look_at = self._renew_at = self._idle_until = 0.0
        self._seen: dict[int, tuple[tuple[Any, ...], float]] = {}
        self._said: set[str] = set()
        self._edit: StudySpec | None = None

    @property
    def spec(self) -> StudySpec:
        """As its file says it now."""
        return self.run.spec

    @property
    def total(self) -> int:
        """Trials with a record at the end of this run, as far as its file asks for them now."""
        if not self.order.queue_only:
            return self.spec.study.n_trials
        done = {record.entry for record in self.finished.values()}
        return len(self.finished) + sum(queue.entry_id(entry) not in done for entry in self._entries())

    @property
    def settled(self) -> bool:
        """Nothing runs here, and all that happened has been told."""
        return not self.run.held and not self._todo

    # --- what next ---

    def next_job(self, fits: Callable[[TrialConfig], int | None]) -> Job | None:
        """The next trial to hand to a worker, acquired; none: nothing to do now.

        Args:
            fits: memory limit of a trial of that config if it were started now (0: the device's); none: no room yet.
        """
        self.run.hear_stop()
        if self.over or not self.run.goes_on or self._todo or time.monotonic() < self._idle_until:
            return None
        limits: list[int] = []

        def suits(_: Lease | Proposal, config: TrialConfig) -> bool:
            limit = fits(config)
            limits[:] = [] if limit is None else [limit]
            return limit is not None

        try:
            acquired = self._acquire(suits)
        except search_space.SpaceExhausted as error:
            if not self.run.held:  # else what runs comes to its end first
                self.run.fail(error)
                return None
            acquired = None
        if acquired is None:
            self._idle_until = time.monotonic() + _IDLE_S
            return None
        (lease, config), self.over = acquired, False
        return self._job(lease, config, limits[0] or None, self.run.population_size(lease.number, config))

    def more_like(self, first: Job, *, beside: int) -> Job | None:
        """Another trial that may train together with one just handed out, acquired; none: no more of them.

        Args:
            beside: trials that are to train together so far, the first included.
        """
        setting, k = self.spec.execution.population, self.spec.study.replicates
        remaining = self.spec.study.n_trials - len(self.finished)
        fair = -(-remaining // self.context.n_workers)  # the rest is for other workers
        if (beside + 1) * k > first.population_size or beside >= fair or not self.run.goes_on or self._todo:
            return None

        def suits(choice: Lease | Proposal, config: TrialConfig) -> bool:
            if static_config(config) != static_config(first.config):
                return False
            if isinstance(choice, Lease):
                return self.run.population_size(choice.number, config) > 1
            if setting != "auto" or not choice.entry or choice.training == "":
                return True
            # A queued trial's values are to depend on no result that may still come in.
            entry = next(entry for entry in self._entries() if queue.entry_id(entry) == choice.entry)
            return entry.training == "defaults"

        try:
            acquired = self._acquire(suits, ahead=setting != "auto")
        except search_space.SpaceExhausted:
            return None
        return None if acquired is None else self._job(*acquired, first.memory_limit, first.population_size)

    def _acquire(
        self, suits: Callable[[Lease | Proposal, TrialConfig], bool], *, ahead: bool = True
    ) -> tuple[Lease, TrialConfig] | None:
        """Take the next trial, if it suits.

        Args:
            ahead: ask the sampler for more than its random start too.

        Raises:
            SpaceExhausted: the sampler knows no config that was not trained.
        """
        configs: list[TrialConfig] = []

        def choose(leases: tuple[Lease, ...]) -> Choice:
            configs.clear()
            random = len(self._trials()) < self.spec.study.n_startup_trials
            choice = self._choose(leases, propose=ahead or random)
            if choice is None or isinstance(choice, SameTrial | Withdrawal):
                return choice
            number = choice.number if isinstance(choice, Lease) else len(self._trials())
            config = self._config(choice, number)
            if not suits(choice, config):
                return None
            configs.append(config)
            return choice

        lease = self._reach(lambda: self.opened.trial_table.acquire(choose))
        return None if lease is None else (lease, configs[0])

    def _job(self, lease: Lease, config: TrialConfig, limit: int | None, population_size: int) -> Job:
        population, on_gpu = self.spec.execution.population, self.context.on_gpu
        self.leases[lease.number] = lease
        job = Job(
            spec=self.spec.model_copy(update={"queue": ()}), config=config, number=lease.number, attempt=lease.attempt,
            params=lease.params, entry=lease.entry, note=lease.note, training=lease.training,
            study_folder=self.opened.folder.resolve(), data_root=self.context.data_root.resolve(), memory_limit=limit,
            population_size=population_size,
            on_cores=not self.context.hosts and memory.on_cores(config, population, on_gpu=on_gpu),
        )  # fmt: skip
        return self.run.begin(job, step=lease.step)

    def _choose(self, leases: tuple[Lease, ...], *, propose: bool = True) -> Choice:
        """Own unfinished trials, then the queue, then the sampler, then what other machines have left behind.

        Args:
            propose: ask the sampler too.
        """
        open_leases = list({lease.number: lease for lease in leases if not lease.finished}.values())
        cancelled = {queue.entry_id(entry) for entry in self.spec.queue if entry.cancelled}
        for lease in open_leases:
            if lease.entry in cancelled and lease.number not in self.run.held and self._is_loose(lease):
                return Withdrawal(lease.number)
        at_work = [lease for lease in open_leases if lease.number in self.run.held or not self._is_loose(lease)]
        total, finished = len({lease.number for lease in leases}), len({c.number for c in leases if c.finished})
        if self.order.queue_only or finished + len(at_work) < self.spec.study.n_trials:
            limits, failures = self.spec.execution, self.run.failures
            loose = [
                lease
                for lease in open_leases
                if lease not in at_work and self._is_ours(lease) and failures.attempts_left(lease.number, limits)
            ]
            mine = [lease for lease in loose if lease.owner == self.opened.trial_table.owner]
            if mine:
                return mine[0]
            if (self.order.queue_only or total < self.spec.study.n_trials) and (
                new := self._new(leases, propose)
            ) is not None:
                return new
            if loose:
                return loose[0]
        awaited = [lease for lease in at_work if self._is_ours(lease)]
        for lease in awaited:
            if lease.number not in self.run.held:
                self._say_once(f"waiting for trial {lease.number}, which runs on {lease.host}")
        self.over = not awaited
        return None

    def _is_ours(self, lease: Lease) -> bool:
        """Whether this run is about it: any trial of the study, or the queue's alone."""
        return not self.order.queue_only or lease.entry in {queue.entry_id(entry) for entry in self._entries()}

    def _is_loose(self, lease: Lease) -> bool:
        """Nobody works on it: it was given back, its coordinator is gone, or its lease hasn't been renewed."""
        return lease.state != "running" or lease.owner == self.opened.trial_table.owner or self._is_stale(lease)

    def _is_stale(self, lease: Lease) -> bool:
        """Judged by this machine's clock alone: the lease hasn't changed for too long."""
        now, mark = time.monotonic(), (lease.token, lease.beat, lease.state)
        before, since = self._seen.get(lease.number, (None, now))
        if before != mark:
            self._seen[lease.number] = (mark, now)
            return False
        return now - since > self.spec.execution.hang_s + 2 * self._renew_s

    def _new(self, leases: tuple[Lease, ...], propose: bool) -> Proposal | SameTrial | None:
        trained = {search_space.trial_identity(self._config(lease, 0)): lease.number for lease in leases}
        taken = {lease.entry for lease in leases}
        for entry in self._entries():
            identity = queue.entry_id(entry)
            if identity not in taken:
                return self._queued(entry, identity, trained)
        if self.order.queue_only or not propose:
            return None
        params = self._proposed({}, None, trained)
        return self._proposal(params, self.opened.space.decode(params))

    def _entries(self) -> tuple[Any, ...]:
        return queue.entries(self.spec, self.opened.space)

    def _queued(self, entry: Any, identity: str, trained: dict[str, int]) -> Proposal | SameTrial:
        settled = queue.settle(entry, self.opened.space, best=self.best)
        params = settled.params
        if settled.training == "sampler":
            params = self._proposed(params, settled.shape, trained)
        proposal = self._proposal(params, settled.shape, entry=identity, note=entry.note, training=settled.training)
        same = trained.get(search_space.trial_identity(self._config(proposal, 0)))
        if same is None:
            return proposal
        self._say_once(f"queue entry {identity} asks for what trial {same} is already: not trained again")
        return SameTrial(identity, same)

    def _proposed(self, fixed: dict[str, Any], shape: Any, trained: dict[str, int]) -> dict[str, Any]:
        trials = self._trials()
        return search_space.propose(
            self.spec, self.opened.space, trials, number=len(trials), fixed=fixed, shape=shape, trained=trained
        )

    def _trials(self) -> list[Any]:
        return self.opened.trial_table.storage.study.get_trials(deepcopy=False)

    def _proposal(self, params: dict[str, Any], shape: Any, **entry: str) -> Proposal:
        known = {"entry": None, "note": "", "training": "", **entry}
        return Proposal(params, self.opened.space.distributions, shape, **known)  # type: ignore[arg-type]

    def _config(self, trial_: Lease | Proposal, number: int) -> TrialConfig:
        seed = search_space.derive_seed(self.spec.study.seed, search_space.TRIAL, number)
        return self.opened.space.trial_config(trial_.params, trial_.shape, seed=seed)

    # --- what came of it ---

    def heard(self, number: int, kind: str, values: dict[str, Any], *, pid: int) -> None:
        """Take what a worker said of a held trial, or how its job ended (`job.ENDS`)."""
        self._pids[number], self._idle_until = pid, 0.0
        if kind in ("loaded", "progress", "epoch"):  # a sign of life
            self._progressed.add(number)
        ending = self.run.hear(number, kind, values)
        if ending is None:
            return
        lease = self.leases.pop(number)
        if isinstance(ending, TrialRecord):
            self._finish(lease, ending)
        elif ending.state != "superseded":  # then whoever took it has released the lease
            state, detail, step = ending.state, ending.detail, self.run.step(number)
            self._todo.append(lambda: self.opened.trial_table.release(lease, state, detail, step=step))
            self._catch_up()

    def _finish(self, lease: Lease, record: TrialRecord) -> None:
        self.finished[lease.number] = record
        self._todo.append(lambda: self._tell(lease, record))
        self._catch_up()
        if lease.number in self.finished:
            self._tell_finished(record)
            ranked = records.ranked(list(self.finished.values()), minimize=self.opened.minimize)
            for other in ranked[self.spec.study.keep_checkpoints :]:
                folder = records.trial_folder(self.opened.folder, other.trial_number)
                shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            self.write_tables()

    def _tell(self, lease: Lease, record: TrialRecord) -> None:
        if self.opened.trial_table.tell(lease, record, minimize=self.opened.minimize):
            return
        where = records.trial_folder(self.opened.folder, lease.number)
        (where / "record.json").rename(where / f"record.superseded-{lease.attempt}.json")
        self.finished.pop(lease.number, None)
        self._notice(f"trial {lease.number} had been given to another machine; the result that came late is set aside")

    def _tell_finished(self, record: TrialRecord) -> None:
        self.context.notify(TrialFinished(self.run.name, record, tuple(self.finished.values()), self.total))

    def _notice(self, words: str) -> None:
        self.context.notice(self.run.name, words)

    # --- now and then ---

    def tick(self) -> None:
        """Renew leases, tell what is untold, and look for requests, edits and other machines' results."""
        self._catch_up()
        self.run.hear_stop()
        now = time.monotonic()
        if self._progressed and now >= self._renew_at:
            self._renew_at = now + self._renew_s
            for number in sorted(self._progressed & self.run.held.keys()):
                self._renew(number)
            self._progressed.clear()
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            self._reread_file()
            self.learn()

    @property
    def _renew_s(self) -> float:
        return min(_RENEW_S, self.spec.execution.hang_s / 4)

    def _renew(self, number: int) -> None:
        lease = self.leases[number]
        step, pid = self.run.step(number), self._pids[number]
        gone = object()
        renewed = self._reach(lambda: self.opened.trial_table.renew(lease, step=step, pid=pid) or gone)
        if renewed is gone:
            self.run.superseded.add(number)
        elif renewed is not None:
            self.leases[number] = renewed

    def learn(self) -> None:
        """Trials that other machines finished: through the storage, or from the shared folder."""
        for text in self._reach(lambda: self.opened.trial_table.foreign_records(self.finished)) or ():
            record = TrialRecord.model_validate_json(text)
            path = records.trial_folder(self.opened.folder, record.trial_number) / "record.json"
            if not path.is_file():
                records.append(self.opened.folder, record)
        paths = (self.opened.folder / "trials").glob("[0-9]*/record.json")
        new = [path for path in paths if int(path.parent.name) not in {*self.finished, *self.run.held}]
        for record in map(records.read, new):
            self.finished[record.trial_number] = record
            self._tell_finished(record)

    def _reread_file(self) -> None:
        """What may change freely is taken while the study runs, all else waits for the next start."""
        try:
            fresh = self._edit = self.order.reload() or self._edit
            if fresh is None or (leases := self._reach(self.opened.trial_table.leases)) is None:
                return
            self._edit = None
            spec, n_features = _edited(self.spec, fresh), len(self.spec.data.features)
            if misfit := next(validate.cross_checks(spec, counted=False), None):
                raise FintxError(f"{self.order.where(misfit[0])}: {misfit[1]}")
            queue.validate(spec, n_features=n_features, where=self.order.where)
            queue.check_against_trials(
                spec, self.opened.space, leases, counted=not self.order.queue_only, where=self.order.where
            )
        except FintxError as error:
            self._notice(f"the edited sweep file is not taken: {error}")
            return
        if waiting := study_file.differences(_edited(self.opened.requested, fresh), fresh):
            self._notice(f"edits of {', '.join(waiting)} hold from the next start")
        if spec != self.spec:
            self.run.spec, self.over, self._idle_until = spec, False, 0.0
            write_definition(self.opened.folder, spec, queue_only=self.order.queue_only)
            words = f"the file was edited: {len(spec.queue)} queue entries, {spec.study.n_trials} trials in all"
            self._notice(words)

    # --- the storage, which may be away ---

    def _reach(self, work: Callable[[], Any]) -> Any:
        """What the work gives, or none while the storage is away."""
        now = time.monotonic()
        if now < self._retry_at:
            return None
        try:
            result = work()
        except StorageAway as error:
            if self._away_since is None:
                self._away_since = now
                busy = f"{len(self.run.held)} trials go on" if self.run.held else "nothing is lost"
                self._notice(f"{error}; waiting for it, {busy}")
            self._away_tries += 1
            self._retry_at = time.monotonic() + min(_BACKOFF_S[0] * 2**self._away_tries, _BACKOFF_S[1])
            return None
        if self._away_since is not None:
            self._notice(f"the storage is back after {now - self._away_since:.0f} s")
            self._away_since, self._away_tries = None, 0
        return result

    def _catch_up(self) -> None:
        while self._todo:
            if self._reach(lambda: (self._todo[0](),)) is None:
                return
            del self._todo[0]

    def _say_once(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            self._notice(words)

    # --- what is derived ---

    @property
    def best(self) -> TrialRecord | None:
        """The best finished trial so far."""
        return records.best_of(list(self.finished.values()), minimize=self.opened.minimize)

    @property
    def waiting(self) -> tuple[str, ...]:
        """Queue entries that n_trials leaves no room for."""
        leases = self._reach(self.opened.trial_table.leases) or ()
        taken = {lease.entry for lease in leases}
        return tuple(i for i in map(queue.entry_id, self._entries()) if i not in taken)

    def write_tables(self) -> None:
        """Rewrite the derived tables from the records on disk."""
        folder, study = self.opened.folder, self.spec.study
        status.write_json(
            folder, records.read_all(folder), n_trials=study.n_trials, metric=study.metric,
            minimize=self.opened.minimize,
        )  # fmt: skip
        for damage in status.write_csv(self.context.study_root):
            self._say_once(f"left out of experiment_results.csv: {damage}")


def _edited(spec: StudySpec, fresh: StudySpec) -> StudySpec:
    """The spec with what of its edited file may be taken while it runs."""
    study = {name: getattr(fresh.study, name) for name in study_file.FREE_TO_CHANGE if name != "name"}
    execution = fresh.execution.model_copy(update={"storage": spec.execution.storage})
    changes = {"study": spec.study.model_copy(update=study), "execution": execution, "confirm": fresh.confirm}
    return spec.model_copy(update={**changes, "queue": fresh.queue})
