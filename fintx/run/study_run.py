"""The run of one study: the attempts that workers hold, what they say of them, and what failures lead to.

A search (course) and a confirmation (confirm) each have one; they differ in what they ask for next and in where they
keep what came of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, Literal

from fintx.config.schema import ExecutionConfig, StudySpec, TrialConfig
from fintx.errors import FintxError
from fintx.run.job import Job
from fintx.study import locks, records
from fintx.study.events import EpochDone, RunContext, TrialEnded, TrialStarted
from fintx.study.records import TrialRecord
from fintx.train import memory, progress


class FailurePolicy:
    """What failures lead to, in a search and in a confirmation alike.

    A failed attempt is made again, under the same number, until `max_attempts` have failed in this run; then the trial
    is set aside for the next run. The last attempt trains alone: those beside it may be to blame. `max_failures` in a
    row of the same kind stop the study; a success, or another kind, begins a new count.
    """

    def __init__(self) -> None:
        self._failed: Counter[int] = Counter()
        self._reasons: dict[int, str] = {}
        self._streak: tuple[str, int] = ("", 0)

    def attempts_left(self, key: int, limits: ExecutionConfig) -> int:
        """How often it may still be tried in this run."""
        return max(0, limits.max_attempts - self._failed[key])

    def trains_alone(self, key: int, limits: ExecutionConfig) -> bool:
        """Whether the next attempt is the last, after failures."""
        return self._failed[key] > 0 and self.attempts_left(key, limits) <= 1

    def add_failed_attempt(self, key: int, reason: str) -> None:
        """One more attempt failed."""
        self._failed[key] += 1
        self._reasons[key] = reason

    def set_aside(self, limits: ExecutionConfig) -> dict[int, str]:
        """Those with no attempt left, in order, and why the last one failed."""
        return {
            key: reason for key, reason in sorted(self._reasons.items()) if not self.attempts_left(key, limits)
        }  # fmt: skip

    def too_many(self, kind: str, limits: ExecutionConfig) -> bool:
        """Count an ending of this kind ("": a success); whether the study is to stop now."""
        before, count = self._streak
        self._streak = (kind, count + 1 if kind == before else 1)
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
    """As its file says it now."""
    context: RunContext
    stop_requests: locks.StopRequests
    """To stop."""
    n_folds: int
    label: Callable[[int], str] = "trial {}".format
    """What a job of that key is called in messages."""
    held: dict[int, Job] = field(default_factory=dict)
    """Jobs that workers have, by key."""
    superseded: set[int] = field(default_factory=set)
    """Keys of held jobs that another machine has taken: their workers are to be killed."""
    failures: FailurePolicy = field(default_factory=FailurePolicy)
    problem: FintxError | None = None
    """What ends the study before its end; the first is kept."""
    stop_asked: bool = False

    def __post_init__(self) -> None:
        self._steps: dict[int, int] = {}

    @property
    def name(self) -> str:
        """The study's."""
        return self.spec.study.name

    @property
    def goes_on(self) -> bool:
        """Whether another job may be handed out."""
        return self.problem is None and not self.stop_asked

    def left_aside(self, finished: Container[int]) -> tuple[str, ...]:
        """Jobs whose attempts in this run all crashed or hung, a line each, less those that somebody finished."""
        reasons = self.failures.set_aside(self.spec.execution)
        return tuple(f"{self.label(key)} {why}" for key, why in reasons.items() if key not in finished)

    def population_size(self, key: int, config: TrialConfig) -> int:
        """Members that may train side by side with it, itself included."""
        if self.context.hosts or self.failures.trains_alone(key, self.spec.execution):
            return 1
        return memory.population_size(config, self.spec.execution.population, on_gpu=self.context.on_gpu)

    def begin(self, job: Job, *, step: int | None = None) -> Job:
        """A worker gets a job; `step`: from which it is known to go on."""
        self.held[job.key] = job
        if step is not None:
            self._steps[job.key] = step
        of_search = job.rerun is None
        self.context.notify(
            TrialStarted(
                self.name,
                job.key,
                job.attempt,
                job.config.shape,
                job.source if of_search else "again",
                job.note if of_search else "",
                name="" if of_search else self.label(job.key),
            )  # fmt: skip
        )
        return job

    def step(self, key: int) -> int:
        """The last that a held job is known to have done."""
        return self._steps[key]

    def hear(self, key: int, kind: str, values: dict[str, Any]) -> TrialRecord | Unfinished | None:
        """Take what a worker said of a held job, or how it ended (`job.ENDS`).

        Returns:
            None while the job goes on; else what it came to, and it is held no more.
        """
        match kind:
            case "loaded":  # from which step it goes on is not known yet
                return None
            case "progress":
                self._steps[key] = values["step"]
                return None
            case "epoch":
                epoch, of_seeds = progress.Epoch(**values["epoch"]), len(self.held[key].replicates)
                seed = values["replicate"]
                self.context.notify(EpochDone(self.name, key, values["fold"], self.n_folds, seed, of_seeds, epoch))
                return None
            case "warning":
                self.context.notice(self.name, f"{self.label(key)}: {values['text']}")
                return None
            case "done":
                record = records.read(self.held.pop(key).folder / "record.json")
                self._count("" if record.value is not None else record.outcome, record.detail)
                return record
            case "interrupted":
                return self._ended(key, "interrupted", "stopped on request")
            case "returned":  # it had no part in its worker's end
                return self._ended(key, "interrupted", values["text"])
            case "superseded":
                return self._ended(key, "superseded", "taken over by another attempt")
            case "mistake":
                self.fail(FintxError(f"{self.label(key)}: {values['text']}"))
                return self._ended(key, "interrupted", values["text"])
            case _:
                return self._failed(key, kind, values["text"], counts=not values["beside"])

    def fail(self, problem: FintxError) -> None:
        """Something ends the study before its end."""
        self.problem = self.problem or problem

    def hear_stop(self) -> None:
        """Look for a request to stop."""
        if not self.stop_asked and self.stop_requests.pending():
            self.stop_asked = True
            self.context.notice(self.name, locks.STOP_HEARD)

    def _failed(self, key: int, kind: str, text: str, *, counts: bool) -> Unfinished:
        job = self.held[key]
        log = job.folder / "run" / f"attempt-{job.attempt}.log"
        words = f"{kind}: {text}" + (f" (log: {log})" if log.is_file() and log.stat().st_size else "")
        self.failures.add_failed_attempt(key, words)
        left = self.failures.attempts_left(key, self.spec.execution)
        more = f"{left} attempts left" if left else "left aside; the next run tries it again"
        if counts:  # not once for each of those who trained together
            # Of one kind whatever path or number its text names: an exception's type, a signal, an exit code.
            what = "" if kind == "hung" else f" ({text.partition(':')[0].partition(' (')[0]})"
            self._count(f"{kind}{what}", words)
        return self._ended(key, "failed", words, said=f"attempt {job.attempt} {words}; {more}")

    def _count(self, kind: str, detail: str) -> None:
        limits = self.spec.execution
        if self.failures.too_many(kind, limits):
            self.fail(
                FintxError(
                    f"{self.name}: stopped after {limits.max_failures} failures in a row of the same kind, {kind}: "
                    f"{detail}; mend the cause (or raise execution.max_failures), and the same command continues"
                )
            )

    def _ended(
        self, key: int, state: Literal["interrupted", "failed", "superseded"], detail: str, *, said: str = ""
    ) -> Unfinished:
        del self.held[key]
        step = self._steps.get(key)
        at = "" if step is None else f" at step {step}"
        self.context.notify(TrialEnded(self.name, key, said or f"{state}{at}: {detail}"))
        return Unfinished(state, detail)
