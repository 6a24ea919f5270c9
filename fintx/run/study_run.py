"""Study run: the jobs of a search or a confirmation that workers have, their events, and what failures lead to.

A search (`search`) and a confirmation (`confirm`) each have one; they differ in which jobs come next, and in where the
results are kept.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from fintx.config.schema import ExecutionConfig, StudySpec, TrialConfig
from fintx.errors import FintxError, as_fintx_error
from fintx.run.job import Job
from fintx.study import locks, records
from fintx.study.events import EpochDone, RunContext, TrialEnded, TrialStarted
from fintx.study.records import TrialRecord
from fintx.train import memory
from fintx.train.member_run import EpochReport


class FailurePolicy:
    """What failures lead to, in a search and in a confirmation alike.

    A failed attempt is made again, under the same number, until `max_attempts` have failed in this run; then the trial
    is given up until the next run. The last attempt trains alone: those beside it may be to blame. `max_failures` in a
    row of the same kind stop the study; a success, or another kind, begins a new count.
    """

    def __init__(self) -> None:
        self._n_failed: Counter[int] = Counter()
        self._reasons: dict[int, str] = {}
        self._streak: tuple[str, int] = ("", 0)

    def attempts_left(self, key: int, limits: ExecutionConfig) -> int:
        """How often it may still be tried in this run."""
        return max(0, limits.max_attempts - self._n_failed[key])

    def trains_alone(self, key: int, limits: ExecutionConfig) -> bool:
        """Whether the next attempt is the last, after failures."""
        return self._n_failed[key] > 0 and self.attempts_left(key, limits) <= 1

    def add_failed_attempt(self, key: int, reason: str) -> None:
        """One more attempt failed."""
        self._n_failed[key] += 1
        self._reasons[key] = reason

    def given_up(self, limits: ExecutionConfig) -> dict[int, str]:
        """Those with no attempt left, in order, and why the last one failed."""
        return {key: reason for key, reason in sorted(self._reasons.items()) if not self.attempts_left(key, limits)}

    def stops_study(self, kind: str, limits: ExecutionConfig) -> bool:
        """Count an ending of this kind ("": a success); whether the study is to stop now."""
        previous, count = self._streak
        self._streak = (kind, count + 1 if kind == previous else 1)
        return kind != "" and self._streak[1] >= limits.max_failures


@dataclass(frozen=True)
class Unfinished:
    """How an attempt ended without a record."""

    state: Literal["interrupted", "failed", "superseded"]
    detail: str


@dataclass(eq=False)
class StudyRun:
    """A study's search, or its confirmation, under way in this process."""

    spec: StudySpec
    """As its file has it now."""
    context: RunContext
    stop_requests: locks.StopRequests
    n_folds: int
    label: Callable[[int], str] = "trial {}".format
    """What the job of a key is called in messages."""
    running: dict[int, Job] = field(default_factory=dict)
    """Jobs that workers have, by key."""
    superseded: set[int] = field(default_factory=set)
    """Keys of running jobs that another machine has taken: their workers must give them up."""
    failures: FailurePolicy = field(default_factory=FailurePolicy)
    problem: FintxError | None = None
    """What stops the study before its end; the first is kept."""
    stop_asked: bool = False
    last_step: dict[int, int] = field(default_factory=dict)
    """By key, as far as it is known."""

    @property
    def name(self) -> str:
        """The study\'s name."""
        return self.spec.study.name

    @property
    def active(self) -> bool:
        """Whether another job may be sent."""
        return self.problem is None and not self.stop_asked

    def given_up(self, finished: Container[int]) -> tuple[str, ...]:
        """Jobs whose attempts in this run all crashed or hung, a line each, without those that others finished."""
        reasons = self.failures.given_up(self.spec.execution)
        return tuple(f"{self.label(key)} {reason}" for key, reason in reasons.items() if key not in finished)

    def population_size(self, key: int, config: TrialConfig) -> int:
        """Members that may train side by side with it, itself included."""
        if self.context.hosts or self.failures.trains_alone(key, self.spec.execution):
            return 1
        return memory.population_size(config, self.spec.execution.population, on_gpu=self.context.on_gpu)

    def begin(self, job: Job) -> Job:
        """Note that a worker gets a job."""
        self.running[job.key] = job
        of_search = job.rerun is None
        self.context.notify(
            TrialStarted(
                self.name, job.key, job.attempt, job.config.shape, job.source if of_search else "again",
                job.note if of_search else "", name="" if of_search else self.label(job.key),
            )
        )  # fmt: skip
        return job

    def handle(self, key: int, kind: str, values: dict[str, Any]) -> TrialRecord | Unfinished | None:
        """Take an event of a running job (`workers.WorkerEvent`).

        Returns:
            None while the job goes on; else what came of it, and it runs no more.
        """
        match kind:
            case "loaded":
                return None
            case "progress":
                self.last_step[key] = values["step"]
                return None
            case "epoch":
                epoch, n_replicates = EpochReport(**values["epoch"]), len(self.running[key].replicates)
                replicate = values["replicate"]
                self.context.notify(
                    EpochDone(self.name, key, values["fold"], self.n_folds, replicate, n_replicates, epoch)
                )
                return None
            case "warning":
                self.context.notice(self.name, f"{self.label(key)}: {values['text']}")
                return None
            case "done":
                record = records.read(self.running.pop(key).folder / "record.json")
                self._count("" if record.value is not None else record.outcome, record.detail)
                return record
            case "interrupted":
                return self._end(key, "interrupted", "stopped on request")
            case "returned":  # it had no part in its worker's end
                return self._end(key, "interrupted", values["text"])
            case "superseded":
                return self._end(key, "superseded", "taken over by another attempt")
            case "mistake":
                self.fail(FintxError(f"{self.label(key)}: {values['text']}"))
                return self._end(key, "interrupted", values["text"])
            case _:
                return self._fail_attempt(key, kind, values["text"], counts=not values["beside"])

    def fail(self, problem: FintxError) -> None:
        """Stop the study before its end."""
        self.problem = self.problem or problem

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """An error within (a full disk, a bug) stops this study and none of the others."""
        try:
            yield
        except Exception as error:
            self.fail(as_fintx_error(error, of=self.name))

    def check_stop(self) -> None:
        """Look for a request to stop."""
        if not self.stop_asked and self.stop_requests.pending():
            self.stop_asked = True
            self.context.notice(self.name, locks.STOP_HEARD)

    def _fail_attempt(self, key: int, kind: str, text: str, *, counts: bool) -> Unfinished:
        """
        Args:
            counts: false for all but one of those whose worker's end was a single failure.
        """
        job = self.running[key]
        log = job.folder / "run" / f"attempt-{job.attempt}.log"
        reason = f"{kind}: {text}" + (f" (log: {log})" if log.is_file() and log.stat().st_size else "")
        self.failures.add_failed_attempt(key, reason)
        n_left = self.failures.attempts_left(key, self.spec.execution)
        if counts:
            # Of one kind whatever path or number its text names: an exception's type, a signal, an exit code.
            what = "" if kind == "hung" else f" ({text.partition(':')[0].partition(' (')[0]})"
            self._count(f"{kind}{what}", reason)
        then = f"{n_left} attempts left" if n_left else "given up; the next run tries it again"
        return self._end(key, "failed", reason, text=f"attempt {job.attempt} {reason}; {then}")

    def _count(self, kind: str, detail: str) -> None:
        limits = self.spec.execution
        if self.failures.stops_study(kind, limits):
            self.fail(
                FintxError(
                    f"{self.name}: stopped after {limits.max_failures} failures in a row of the same kind, {kind}: "
                    f"{detail}; fix the cause (or raise execution.max_failures), and the same command continues"
                )
            )

    def _end(
        self, key: int, state: Literal["interrupted", "failed", "superseded"], detail: str, *, text: str = ""
    ) -> Unfinished:
        del self.running[key]
        where = f" at step {self.last_step[key]}" if key in self.last_step else ""
        self.context.notify(TrialEnded(self.name, key, text or f"{state}{where}: {detail}"))
        return Unfinished(state, detail)
