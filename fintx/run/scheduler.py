"""The runner: workers are kept busy with what the studies want next, until all is done or a stop is asked for.

The coordinator decides and never trains: workers are processes of their own (pool, worker). What it knows it can read
again from records and storage, so it may be stopped, killed or started twice anywhere; the same command continues:
a trial without a record is unfinished work and is taken up under its number, a record that the storage hasn't heard of
is told.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fintx.analysis import predictions
from fintx.analysis.predictions import BaselineComparison
from fintx.config.schema import StudySpec, TrialConfig
from fintx.errors import FintxError, as_fintx_error
from fintx.run import confirm
from fintx.run import workers as machine
from fintx.run.confirm import ConfirmationSummary
from fintx.run.job import ENDS, Job, Jobs
from fintx.run.search import Search
from fintx.run.study_run import StudyRun
from fintx.run.workers import Pool, Worker
from fintx.study import records
from fintx.study.events import RunContext, StudyReady
from fintx.study.lifecycle import StudyRequest, check_queue, open_study
from fintx.study.locks import Stopped
from fintx.study.records import TrialRecord
from fintx.train import memory

_POLL_S = 0.2


@dataclass(frozen=True)
class StudySummary:
    """What a run of a study leaves."""

    folder: Path
    spec: StudySpec
    records: tuple[TrialRecord, ...]
    best: TrialRecord | None
    baselines: dict[str, Any]
    comparison: BaselineComparison | None
    """The best trial against the best baseline; none where its predictions lie on another machine."""
    interrupted: bool
    left_aside: tuple[str, ...]
    """Trials whose attempts all crashed or hung, a line each: the next run tries them again."""
    waiting: tuple[str, ...]
    """Queue entries that n_trials left no room for."""
    problem: FintxError | None
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


@dataclass(frozen=True)
class StudyFailure:
    """A study that could not even begin."""

    spec: StudySpec
    problem: FintxError


class TrialSource(Protocol):
    """What the runner keeps busy: a search (course), or a confirmation of its best (confirm)."""

    run: StudyRun

    @property
    def over(self) -> bool:
        """Nothing is left to do, here or elsewhere."""

    @property
    def settled(self) -> bool:
        """Nothing runs here, and all that happened has been told."""

    def next_job(self, fits: Callable[[TrialConfig], int | None]) -> Job | None:
        """The next job to hand to a worker; none: nothing to do now."""

    def more_like(self, first: Job, *, beside: int) -> Job | None:
        """Another one that may train together with one just handed out; none: no more of them."""

    def heard(self, key: int, kind: str, values: dict[str, Any], *, pid: int) -> None:
        """Take what a worker said of a held job, or how it ended."""

    def tick(self) -> None:
        """What is to be done now and then."""


def run_study(spec: StudySpec, context: RunContext, *, workers: int = 1) -> StudySummary:
    """Run one study until it has n_trials records, or until asked to stop.

    Raises:
        StudyConflict: the folder holds a study with another definition.
        FintxError: whatever in data, budget or queue can't be run, or stopped the study.
    """
    (result,) = run_studies([StudyRequest(spec)], context, workers=workers)
    if result.problem is not None:
        raise result.problem
    assert isinstance(result, StudySummary)
    return result


def run_studies(
    orders: Sequence[StudyRequest],
    context: RunContext,
    *,
    workers: int | None = None,
    also: Callable[[], Sequence[StudyRequest]] = tuple,
) -> list[StudySummary | ConfirmationSummary | StudyFailure]:
    """Run studies: one after the other with one worker, else as many side by side as there are workers.

    A study that fails stops none of the others.

    Args:
        context: what the workers run on is found out here.
        workers: processes that train, each on its share of the GPUs or of the cores; none: one, and on several GPUs
            one for as few of them as the largest trial needs.
        also: asked several times a second for studies to run after these, by whatever file has come to name them.

    Raises:
        FintxError: more workers than GPUs.
    """
    names = [order.spec.study.name for order in orders]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise FintxError(f"study.name {', '.join(repeated)}: stands in more than one of the files; each needs its own")
    for order in orders:
        if order.queue_only:  # hand-picked trials are judged as a whole: no study begins while another's can't
            check_queue(order, context)
    gpus = machine.gpu_bytes()
    if workers is None:
        workers = 1 if context.hosts else machine.workers_that_fit([order.spec for order in orders], gpus)
        if workers > 1:
            context.notice(", ".join(names), f"{workers} workers, for {len(gpus)} GPUs")
    if workers > len(gpus) > 0:
        raise FintxError(f"--workers {workers}: this machine has {len(gpus)} GPUs, and a worker needs one of its own")
    context = dataclasses.replace(context, on_gpu=len(gpus) > 0, n_workers=workers)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(contextlib.closing(Pool(workers, gpus=len(gpus), hosts=context.hosts)))
        return _Run(list(orders), context, pool, stack, also).to_the_end()


@dataclass(eq=False)
class _Handed:
    """A job that a worker has."""

    worker: Worker
    course: TrialSource
    key: int
    need: int
    """Memory that it may take."""
    begun: bool = False


@dataclass(eq=False)
class _Run:
    orders: list[StudyRequest]
    context: RunContext
    pool: Pool
    stack: contextlib.ExitStack
    also: Callable[[], Sequence[StudyRequest]]

    def __post_init__(self) -> None:
        self.waiting = list(self.orders)
        self.courses: dict[str, TrialSource] = {}
        self.results: dict[int, StudyFailure] = {}
        self.handed: dict[str, _Handed] = {}
        """By ticket."""
        self.recalled: set[Worker] = set()
        self.stopping = False

    def to_the_end(self) -> list[StudySummary | ConfirmationSummary | StudyFailure]:
        while True:
            if self.context.should_stop() and not self.stopping:
                self.stopping = True
                self.pool.stop()
            with contextlib.suppress(FintxError):  # each study of the file tells what is wrong with it
                more = self.also()
                self.orders += more
                self.waiting += more
            self._give_work()
            if not self.handed and not any(self._open(course) for course in self.courses.values()):
                if self.stopping or not self.waiting:
                    break
            self._listen()
            for course in self.courses.values():
                with _blamed_on(course):
                    course.tick()
            self._end_those_who_must()
        return [self._result(order) for order in self.orders]

    def _open(self, course: TrialSource) -> bool:
        if self.stopping or not course.run.goes_on:
            return False
        return not (course.over and course.settled)

    # --- giving ---

    def _give_work(self) -> None:
        for worker in self.pool.workers:
            if self.stopping:
                return
            if worker.free:
                self._give(worker)
            elif worker.takes_one_more and all(handed.begun for handed in self._of(worker)):
                self._offer(worker, [c for c in self._asking() if self.context.pipelines(c.run.spec.execution)])

    def _give(self, worker: Worker) -> None:
        while not self._offer(worker, self._asking()):
            if len(self._asking()) >= len(self.pool.workers) or not self._begin_next():
                return

    def _offer(self, worker: Worker, courses: list[TrialSource]) -> bool:
        """Hand the worker what one of the studies wants next; false: none wants anything now."""
        running = [handed.course for handed in self.handed.values()]
        for course in sorted(courses, key=running.count):
            jobs: list[Job] = []
            with _blamed_on(course):
                if (first := course.next_job(lambda config: self._limit(config, worker))) is not None:
                    jobs.append(first)
                    while (other := course.more_like(first, beside=len(jobs))) is not None:
                        jobs.append(other)
            if jobs:
                for job in jobs:
                    need = memory.upper_guess(job.config) * min(job.population_size, len(job.replicates))
                    self.handed[job.ticket] = _Handed(worker, course, job.key, need)
                self.recalled.discard(worker)
                self.pool.send(worker, Jobs.dump_json(tuple(jobs)).decode(), [job.ticket for job in jobs])
                return True
        return False

    def _of(self, worker: Worker) -> list[_Handed]:
        return [handed for handed in self.handed.values() if handed.worker is worker]

    def _asking(self) -> list[TrialSource]:
        return [course for course in self.courses.values() if course.run.goes_on and not course.over]

    def _begin_next(self) -> bool:
        """Begin the study whose turn it is; false: none is to be begun any more."""
        if not self.waiting:
            return False
        order = self.waiting.pop(0)
        name = order.spec.study.name
        try:
            self.courses[name] = self._confirmation(order) if order.confirm else self._search(order)
        except Stopped:  # this study by `fintx stop`, or all of them by a signal
            if self.context.should_stop():
                self.stopping = True
                self.pool.stop()
        except Exception as error:
            self.results[id(order)] = StudyFailure(order.spec, as_fintx_error(error, of=name))
        return not self.stopping

    def _confirmation(self, order: StudyRequest) -> TrialSource:
        assert order.confirm is not None
        folder = self.context.study_root / order.spec.study.name
        return self.stack.enter_context(confirm.open_confirmation(folder, order.confirm, self.context))

    def _search(self, order: StudyRequest) -> TrialSource:
        opened = self.stack.enter_context(open_study(order, self.context))
        course = Search(opened, order, self.context)
        n_shapes, finished = len(opened.space.shapes), len(course.finished)
        rival = predictions.best_baseline(predictions.read_rows(opened.folder, opened.spec))
        self.context.notify(
            StudyReady(course.run.name, opened.spec, opened.prepared, n_shapes, finished, course.total, rival)
        )  # fmt: skip
        return course

    def _limit(self, config: TrialConfig, worker: Worker) -> int | None:
        """Memory that a trial may take on a worker if it starts now, 0: all that its device has; none: not now.

        On GPUs each worker has its own. On the CPU all share the machine: a trial gets the share of one worker; one
        that needs more gets everything, when nothing else runs.
        """
        budgets = [course.run.spec.execution.memory for course in self.courses.values()]
        given = min((budget for budget in budgets if budget is not None), default=0)
        n = len(self.pool.workers)
        if n == 1 or self.context.on_gpu:
            return given // n
        total = given or memory.available()
        needs = [handed.need for handed in self.handed.values() if handed.worker is not worker]
        if any(need > total // n for need in needs):
            return None
        if memory.upper_guess(config) <= total // n:
            return total // n
        return None if needs else total

    # --- hearing ---

    def _listen(self) -> None:
        patience = {handed.worker: handed.course.run.spec.execution.hang_s for handed in self.handed.values()}
        for event in self.pool.poll(wait_s=_POLL_S, hang_s=patience):
            handed = self.handed.get(event.ticket)
            if handed is None:
                continue
            if event.kind in ENDS:
                del self.handed[event.ticket]
            handed.begun = handed.begun or event.kind == "progress"
            self._hear(handed, event.kind, event.values)
            if event.kind == "progress":  # a sign of life of all that its worker has
                for other in self._of(event.worker):
                    if other is not handed:
                        self._hear(other, "loaded", {})

    def _hear(self, handed: _Handed, kind: str, values: dict[str, Any]) -> None:
        if handed.key in handed.course.run.held:
            with _blamed_on(handed.course):
                handed.course.heard(handed.key, kind, values, pid=handed.worker.pid)

    def _end_those_who_must(self) -> None:
        for worker in self.pool.workers:
            mine = {ticket: handed for ticket, handed in self.handed.items() if handed.worker is worker}
            lost = {ticket for ticket, handed in mine.items() if handed.key in handed.course.run.superseded}
            if lost:
                self._end(worker, mine, lost)
            if any(handed.course.run.problem is not None for handed in mine.values()):
                self.pool.stop_one(worker)
            elif worker not in self.recalled and any(handed.course.run.stop_asked for handed in mine.values()):
                self.recalled.add(worker)
                self.pool.recall(worker)

    def _end(self, worker: Worker, mine: dict[str, _Handed], lost: set[str]) -> None:
        """Superseded trials leave their worker; with nobody else to train there, it is ended: it may be frozen."""
        if worker.assigned[0] <= lost:
            self.pool.kill(worker)
            ends = {ticket: "superseded" if ticket in lost else "returned" for ticket in mine}
        else:
            ends = dict.fromkeys(lost, "superseded")
            for ticket in lost:
                self.pool.leave(worker, ticket)
        for ticket, kind in ends.items():
            handed = self.handed.pop(ticket)
            handed.course.run.superseded.discard(handed.key)
            self._hear(handed, kind, {"text": "its worker had to be ended"})

    # --- the end ---

    def _result(self, order: StudyRequest) -> StudySummary | ConfirmationSummary | StudyFailure:
        try:
            return self._what_it_leaves(order)
        except Exception as error:
            return StudyFailure(order.spec, as_fintx_error(error, of=order.spec.study.name))

    def _what_it_leaves(self, order: StudyRequest) -> StudySummary | ConfirmationSummary | StudyFailure:
        if id(order) in self.results:
            return self.results[id(order)]
        course = self.courses.get(order.spec.study.name)
        if isinstance(course, confirm.ConfirmationRun):
            return course.result(interrupted=self.stopping)
        if course is None and order.confirm is not None:  # stopped before its turn
            return ConfirmationSummary(
                self.context.study_root / order.spec.study.name, order.spec, None, True, (), None
            )
        if course is None:  # stopped before its turn
            folder = self.context.study_root / order.spec.study.name
            kept = tuple(records.read_all(folder)) if folder.is_dir() else ()
            return StudySummary(folder, order.spec, kept, None, {}, None, True, (), (), None)
        assert isinstance(course, Search)
        return _summary(course, interrupted=self.stopping)


@contextlib.contextmanager
def _blamed_on(course: TrialSource) -> Iterator[None]:
    """A study that can't go on (a full disk, a bug) ends, and none of the others."""
    try:
        yield
    except Exception as error:
        course.run.fail(as_fintx_error(error, of=course.run.name))


def _summary(course: Search, *, interrupted: bool) -> StudySummary:
    with _blamed_on(course):
        course.learn()  # what other machines finished since the last look
        course.write_tables()
    opened, best = course.opened, course.best
    comparison = None
    if best is not None and _predictions(opened.folder, best).is_file():
        with _blamed_on(course):
            comparison = predictions.compare_trial(opened.folder, course.spec, best)
    return StudySummary(
        folder=opened.folder,
        spec=course.spec,
        records=tuple(course.finished[number] for number in sorted(course.finished)),
        best=best,
        baselines=opened.baselines,
        comparison=comparison,
        interrupted=(interrupted or course.run.stop_asked) and not course.over,
        left_aside=course.run.left_aside(course.finished),
        waiting=course.waiting,
        problem=course.run.problem,
    )


def _predictions(folder: Path, record: TrialRecord) -> Path:
    return records.trial_folder(folder, record.trial_number) / "predictions.parquet"
