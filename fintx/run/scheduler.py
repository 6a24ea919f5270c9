"""Scheduler: keeps workers busy with what the studies of a run want next, until all is done or a stop is asked for.

The coordinator decides and never trains: workers are processes of their own (`workers`, `worker`). All that it knows
can be read again from records and storage, so it may be stopped, killed or started twice anywhere. The same command
continues: a trial without a record is unfinished work and is taken up under its number; a record that the storage
doesn't know is reported to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fintx.analysis import predictions
from fintx.config.schema import StudySpec, TrialConfig
from fintx.errors import FintxError, as_fintx_error
from fintx.run import confirm
from fintx.run.confirm import ConfirmationSummary
from fintx.run.job import ENDS, Job, Jobs
from fintx.run.search import Search, StudySummary
from fintx.run.study_run import StudyRun
from fintx.run.workers import Pool, Worker, gpu_bytes, workers_that_fit
from fintx.study import records
from fintx.study.events import RunContext, StudyReady
from fintx.study.lifecycle import StudyRequest, check_queue, open_study
from fintx.study.locks import Stopped
from fintx.train import memory

_POLL_S = 0.2


@dataclass(frozen=True)
class StudyFailure:
    """A study that could not begin."""

    spec: StudySpec
    problem: FintxError


Result = StudySummary | ConfirmationSummary | StudyFailure


class TrialSource(Protocol):
    """Where jobs come from: a study's search, or a confirmation of its best trials."""

    run: StudyRun

    @property
    def over(self) -> bool:
        """Nothing is left to do, here or elsewhere."""

    @property
    def settled(self) -> bool:
        """Nothing runs here, and all that happened is recorded."""

    def next_jobs(self, fits: Callable[[TrialConfig], int | None]) -> Iterator[Job]:
        """The next jobs to train side by side on a worker; none: nothing to do now."""

    def handle(self, key: int, kind: str, values: dict[str, Any], *, pid: int) -> None:
        """Take an event of a running job (`workers.WorkerEvent`)."""

    def tick(self) -> None:
        """Do what is to be done now and then."""

    def result(self, *, interrupted: bool) -> StudySummary | ConfirmationSummary:
        """What this run leaves."""


def run_study(spec: StudySpec, context: RunContext) -> StudySummary:
    """Run one study, with one worker, until it has n_trials records, or until asked to stop.

    Raises:
        StudyConflict: the folder holds a study with another definition.
        FintxError: data, budget or queue can't be run, or the study was stopped.
    """
    (result,) = run_studies([StudyRequest(spec)], context, workers=1)
    if result.problem is not None:
        raise result.problem
    assert isinstance(result, StudySummary)
    return result


def run_studies(
    requests: Sequence[StudyRequest],
    context: RunContext,
    *,
    workers: int | None = None,
    added: Callable[[], Sequence[StudyRequest]] = tuple,
) -> list[Result]:
    """Run studies: one after the other with one worker, else as many side by side as there are workers.

    A study that fails stops none of the others.

    Args:
        context: what the workers run on is found out here.
        workers: processes that train, each on its share of the GPUs or of the cores; none: one, and on several GPUs
            one for as few of them as the largest trial needs.
        added: asked several times a second for studies to run after these.

    Raises:
        FintxError: more workers than GPUs.
    """
    names = [request.spec.study.name for request in requests]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise FintxError(f"study.name {', '.join(repeated)}: stands in more than one of the files; each needs its own")
    for request in requests:
        if request.queue_only:  # hand-picked trials are judged as a whole: no study begins while another's can't
            check_queue(request, context)
    gpus = gpu_bytes()
    if workers is None:
        workers = 1 if context.hosts else workers_that_fit([request.spec for request in requests], gpus)
        if workers > 1:
            context.notice(", ".join(names), f"{workers} workers, for {len(gpus)} GPUs")
    if workers > len(gpus) > 0:
        raise FintxError(f"--workers {workers}: this machine has {len(gpus)} GPUs, and a worker needs one of its own")
    context = dataclasses.replace(context, on_gpu=len(gpus) > 0, n_workers=workers)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(contextlib.closing(Pool(workers, gpus=len(gpus), hosts=context.hosts)))
        return _Scheduler(list(requests), context, pool, stack, added).run()


@dataclass(eq=False)
class _SentJob:
    """A job that a worker has."""

    worker: Worker
    source: TrialSource
    key: int
    need: int
    """Bytes that it may take."""
    trains: bool = False


@dataclass(eq=False)
class _Scheduler:
    requests: list[StudyRequest]
    context: RunContext
    pool: Pool
    stack: contextlib.ExitStack
    added: Callable[[], Sequence[StudyRequest]]

    def __post_init__(self) -> None:
        self.waiting = list(self.requests)
        self.sources: dict[str, TrialSource] = {}
        """By the study's name."""
        self.failures: dict[int, StudyFailure] = {}
        """By the request's id."""
        self.sent: dict[str, _SentJob] = {}
        """By ticket."""
        self.recalled: set[Worker] = set()
        self.stopping = False

    def run(self) -> list[Result]:
        while True:
            if self.context.should_stop():
                self._stop()
            with contextlib.suppress(FintxError):  # each study of the file reports what is wrong with it
                added = self.added()
                self.requests += added
                self.waiting += added
            self._send_jobs()
            if not self.sent and not any(self._is_open(source) for source in self.sources.values()):
                if self.stopping or not self.waiting:
                    break
            self._read_events()
            for source in self.sources.values():
                with source.run.guard():
                    source.tick()
            self._end_jobs()
        return [self._result(request) for request in self.requests]

    def _is_open(self, source: TrialSource) -> bool:
        return not self.stopping and source.run.active and not (source.over and source.settled)

    def _stop(self) -> None:
        self.stopping = True
        for worker in self.pool.workers:
            self.pool.stop(worker)

    # --- jobs out ---

    def _send_jobs(self) -> None:
        for worker in self.pool.workers:
            if self.stopping:
                return
            if worker.free:
                while not self._offer(worker, self._asking()):
                    if len(self._asking()) >= len(self.pool.workers) or not self._begin_next():
                        break
            elif worker.takes_one_more and all(job.trains for job in self.sent.values() if job.worker is worker):
                pipelined = [x for x in self._asking() if self.context.pipelines(x.run.spec.execution)]
                self._offer(worker, pipelined)

    def _asking(self) -> list[TrialSource]:
        return [source for source in self.sources.values() if source.run.active and not source.over]

    def _offer(self, worker: Worker, sources: list[TrialSource]) -> bool:
        """Send the worker the next jobs of one of the sources; false: none has any now."""
        running = [job.source for job in self.sent.values()]
        for source in sorted(sources, key=running.count):
            jobs: list[Job] = []
            with source.run.guard():
                for job in source.next_jobs(lambda config: self._limit(config, worker)):
                    jobs.append(job)  # noqa: PERF402 - those before an error are kept
            if jobs:
                for job in jobs:
                    need = memory.upper_guess(job.config) * min(job.population_size, len(job.replicates))
                    self.sent[job.ticket] = _SentJob(worker, source, job.key, need)
                self.recalled.discard(worker)
                self.pool.send(worker, Jobs.dump_json(tuple(jobs)).decode(), [job.ticket for job in jobs])
                return True
        return False

    def _begin_next(self) -> bool:
        """Open the study whose turn it is; false: none is to be opened any more."""
        if not self.waiting:
            return False
        request = self.waiting.pop(0)
        name = request.spec.study.name
        try:
            self.sources[name] = self._open(request)
        except Stopped:  # this study by `fintx stop`, or all of them by a signal
            if self.context.should_stop():
                self._stop()
        except Exception as error:
            self.failures[id(request)] = StudyFailure(request.spec, as_fintx_error(error, of=name))
        return not self.stopping

    def _open(self, request: StudyRequest) -> TrialSource:
        name = request.spec.study.name
        if request.confirm is not None:
            folder = self.context.study_root / name
            return self.stack.enter_context(confirm.open_confirmation(folder, request.confirm, self.context))
        study = self.stack.enter_context(open_study(request, self.context))
        search = Search(study, request, self.context)
        n_shapes, n_finished = len(study.space.shapes), len(search.finished)
        to_beat = predictions.best_baseline(predictions.read_rows(study.folder, study.spec))
        self.context.notify(
            StudyReady(name, study.spec, study.prepared, n_shapes, n_finished, search.total, to_beat)
        )  # fmt: skip
        return search

    def _limit(self, config: TrialConfig, worker: Worker) -> int | None:
        """Memory that a trial may take on a worker if it starts now, 0: all that its device has; none: not now.

        On GPUs each worker has its own. On the CPU all share the machine: a trial gets the share of one worker; one
        that needs more gets everything, when nothing else runs.
        """
        budgets = [source.run.spec.execution.memory for source in self.sources.values()]
        budget = min((budget for budget in budgets if budget is not None), default=0)
        n = len(self.pool.workers)
        if n == 1 or self.context.on_gpu:
            return budget // n
        total = budget or memory.available()
        needs = [job.need for job in self.sent.values() if job.worker is not worker]
        if any(need > total // n for need in needs):
            return None
        if memory.upper_guess(config) <= total // n:
            return total // n
        return None if needs else total

    # --- events in ---

    def _read_events(self) -> None:
        hang_s = {job.worker: job.source.run.spec.execution.hang_s for job in self.sent.values()}
        for event in self.pool.poll(wait_s=_POLL_S, hang_s=hang_s):
            job = self.sent.get(event.ticket)
            if job is None:
                continue
            if event.kind in ENDS:
                del self.sent[event.ticket]
            job.trains = job.trains or event.kind == "progress"
            self._handle(job, event.kind, event.values)
            if event.kind == "progress":  # the others of its worker are alive too
                for other in self.sent.values():
                    if other.worker is event.worker and other is not job:
                        self._handle(other, "loaded", {})

    def _handle(self, job: _SentJob, kind: str, values: dict[str, Any]) -> None:
        if job.key in job.source.run.running:
            with job.source.run.guard():
                job.source.handle(job.key, kind, values, pid=job.worker.pid)

    def _end_jobs(self) -> None:
        """End superseded jobs and the workers of a failed study; recall the waiting jobs of a stopped one."""
        for worker in self.pool.workers:
            jobs = {ticket: job for ticket, job in self.sent.items() if job.worker is worker}
            superseded = {ticket for ticket, job in jobs.items() if job.key in job.source.run.superseded}
            if superseded and worker.assigned[0] <= superseded:  # nobody else trains there, and it may be frozen
                self.pool.kill(worker)
                self._end(dict.fromkeys(jobs, "returned") | dict.fromkeys(superseded, "superseded"))
            else:
                for ticket in superseded:
                    self.pool.leave(worker, ticket)
                self._end(dict.fromkeys(superseded, "superseded"))
            if any(job.source.run.problem is not None for job in jobs.values()):
                self.pool.stop(worker)
            elif worker not in self.recalled and any(job.source.run.stop_asked for job in jobs.values()):
                self.recalled.add(worker)
                self.pool.recall(worker)

    def _end(self, kinds: dict[str, str]) -> None:
        for ticket, kind in kinds.items():
            job = self.sent.pop(ticket)
            job.source.run.superseded.discard(job.key)
            self._handle(job, kind, {"text": "its worker had to be ended"})

    # --- results ---

    def _result(self, request: StudyRequest) -> Result:
        name = request.spec.study.name
        if id(request) in self.failures:
            return self.failures[id(request)]
        try:
            if name in self.sources:
                return self.sources[name].result(interrupted=self.stopping)
            folder = self.context.study_root / name  # stopped before its turn
            if request.confirm is not None:
                return ConfirmationSummary(folder, request.spec, None, True, (), None)
            finished = tuple(records.read_all(folder)) if folder.is_dir() else ()
            return StudySummary(folder, request.spec, finished, interrupted=True)
        except Exception as error:
            return StudyFailure(request.spec, as_fintx_error(error, of=name))
