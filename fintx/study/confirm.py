"""What does a confirmation want next, and what becomes of it? A study's best trials, each trained again with new seeds.

To the runner it is a course like a search's: it hands out jobs and hears how they end. Its memory is its folder alone:
a member with a record is done, one without is unfinished work that goes on from its last save. It needs no storage, and
runs on one machine at a time.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fintx.config import ConfirmConfig, StudySpec, TrialConfig
from fintx.data import windows
from fintx.evaluate import metrics
from fintx.study import comparison, confirmation, lock, opening, records, seeds, stopping, trial
from fintx.study.confirmation import Confirmation
from fintx.study.events import (
    ConfirmReady,
    EpochDone,
    Event,
    MemberFinished,
    Notice,
    TrialEnded,
    TrialStarted,
)
from fintx.study.job import Job
from fintx.study.records import TrialRecord
from fintx.train import loop, together
from fintx.train.state import program
from fintx.types import FintxError


@dataclass(frozen=True)
class Confirmed:
    """What a run of a confirmation leaves."""

    folder: Path
    spec: StudySpec
    confirmation: Confirmation | None
    """As far as it has come; none where it can't be told."""
    interrupted: bool
    left_aside: tuple[str, ...]
    """Members whose attempts all crashed or hung, a line each: the next run tries them again."""
    problem: FintxError | None


@dataclass(eq=False)
class Retraining:
    """A confirmation under way in this process; members are numbered seed by seed, so that any stop leaves pairs."""

    folder: Path
    spec: StudySpec
    trials: tuple[TrialRecord, ...]
    """The best, in the search's order."""
    seeds: tuple[int, ...]
    data_root: Path
    n_folds: int
    notify: Callable[[Event], None]
    requests: stopping.Requests
    """To stop."""
    on_gpu: bool = False
    """Whether the workers' trials run on one."""
    hosts: bool = False
    """Several train each member: one at a time, and the next when it is over."""
    held: dict[int, TrialRecord] = field(default_factory=dict)
    """Members that a worker trains: their place → the trial that each repeats."""
    superseded: set[int] = field(default_factory=set)
    problem: FintxError | None = None
    stop_asked: bool = False

    def __post_init__(self) -> None:
        self.members = tuple((record, seed) for seed in self.seeds for record in self.trials)
        self.done = {key for key in range(len(self.members)) if (self._where(key) / "record.json").is_file()}
        self._attempts: dict[int, int] = {}
        self._tried: Counter[int] = Counter()
        self._aside: dict[int, str] = {}
        self._failed_in_a_row = 0

    @property
    def name(self) -> str:
        """The study's."""
        return self.spec.study.name

    @property
    def over(self) -> bool:
        """Nothing is left to do."""
        return len(self.done | self._aside.keys()) == len(self.members)

    @property
    def settled(self) -> bool:
        """Nothing runs."""
        return not self.held

    @property
    def asks(self) -> bool:
        """Whether another member may be started."""
        return not (self.over or self.problem or self.stop_asked)

    @property
    def pipelines(self) -> bool:
        """Whether the next member is asked for while one trains."""
        wanted = self.spec.execution.pipeline
        return not self.hosts and (self.on_gpu if wanted is None else wanted)

    @property
    def left_aside(self) -> tuple[str, ...]:
        """Members whose attempts in this run all crashed or hung, a line each."""
        return tuple(self._aside[key] for key in sorted(self._aside))

    # --- what next ---

    def next_job(self, fits: Callable[[TrialConfig], int | None]) -> Job | None:
        """The next member to hand to a worker; none: nothing to do now.

        Args:
            fits: memory limit of a trial of that config if it were started now (0: the device's); none: no room yet.
        """
        self.tick()
        open_ = self._open()
        if not open_ or not self.asks:
            return None
        config = self._config(open_[0])
        limit = fits(config)
        if limit is None:
            return None
        tried = self._tried[open_[0]]
        # The last attempt is alone: the others may be to blame.
        alone = self.hosts or 0 < tried >= self.spec.execution.max_attempts - 1
        at_once = 1 if alone else together.at_once(config, self.spec.execution.population, on_gpu=self.on_gpu)
        return self._job(open_[0], limit or None, at_once)

    def more_like(self, first: Job, *, beside: int) -> Job | None:
        """Another member that may train together with one just handed out; none: no more of them."""
        if beside >= first.at_once or not self.asks:
            return None
        wanted = program(first.config)
        alike = [key for key in self._open() if self._tried[key] == 0 and program(self._config(key)) == wanted]
        return self._job(alike[0], first.memory_limit, first.at_once) if alike else None

    def _open(self) -> list[int]:
        return [key for key in range(len(self.members)) if key not in {*self.done, *self.held, *self._aside}]

    def _config(self, key: int) -> TrialConfig:
        record, seed = self.members[key]
        return record.config.model_copy(update={"seed": seed})

    def _job(self, key: int, limit: int | None, at_once: int) -> Job:
        record, config = self.members[key][0], self._config(key)
        attempt = self._attempts[key] = max(self._attempts.get(key, 0), _attempts_of(self._where(key))) + 1
        self.held[key] = record
        self.notify(TrialStarted(self.name, key, attempt, record.config.shape, "again", "", name=self._words(key)))
        return Job(
            spec=self.spec.model_copy(update={"queue": ()}), config=config, number=record.trial_number,
            attempt=attempt, params=record.params, entry=record.entry, note=record.note, training=record.training,
            study_folder=self.folder.resolve(), data_root=self.data_root.resolve(), memory_limit=limit, member=key,
            at_once=at_once,
        )  # fmt: skip

    # --- what came of it ---

    def heard(self, key: int, kind: str, values: dict[str, Any], *, pid: int) -> None:
        """Take what a worker said of a held member, or how its job ended (`pool.ENDS`)."""
        match kind:
            case "progress" | "loaded":
                pass
            case "epoch":
                epoch = loop.Epoch(**values["epoch"])
                self.notify(EpochDone(self.name, key, values["fold"], self.n_folds, 0, 1, epoch))
            case "warning":
                self.notify(Notice(self.name, f"{self._words(key)}: {values['text']}"))
            case "done":
                del self.held[key]
                self.done.add(key)
                self._failed_in_a_row = 0
                record = records.read(self._where(key) / "record.json")
                words, total = self._words(key), len(self.members)
                self.notify(MemberFinished(self.name, key, words, record, len(self.done), total))
            case "interrupted":
                self._release(key, "stopped on request")
            case "returned":  # it had no part in its worker's end
                self._release(key, values["text"])
            case "superseded":
                self._release(key, "taken over by another attempt")
            case "mistake":
                self.problem = self.problem or FintxError(f"{self._words(key)}: {values['text']}")
                self._release(key, values["text"])
            case _:
                self._failed(key, kind, values["text"], counts=not values["beside"])

    def _failed(self, key: int, kind: str, text: str, *, counts: bool) -> None:
        self._tried[key] += 1
        left = self.spec.execution.max_attempts - self._tried[key]
        words = f"{kind}: {text}"
        if left <= 0:
            self._aside[key] = f"{self._words(key)} {words}"
        more = f"{left} attempts left" if left > 0 else "left aside; the next run tries it again"
        self._release(key, f"attempt {self._attempts[key]} {words}; {more}")
        self._failed_in_a_row += counts  # not once for each of those who trained together
        if self._failed_in_a_row >= self.spec.execution.max_failures:
            self.problem = self.problem or FintxError(
                f"{self.name}: stopped after {self._failed_in_a_row} failures in a row, the last {words}; mend the "
                "cause (or raise execution.max_failures), and the same command continues"
            )

    def _release(self, key: int, words: str) -> None:
        del self.held[key]
        self.notify(TrialEnded(self.name, key, words))

    def tick(self) -> None:
        """Look for a request to stop."""
        if not self.stop_asked and self.requests.came():
            self.stop_asked = True
            self.notify(Notice(self.name, stopping.HEARD))

    def result(self, *, interrupted: bool) -> Confirmed:
        """Compare what has been trained so far, and write confirmation.json."""
        found = None
        try:
            found = comparison.build(self.folder, self.spec, self.trials, self.seeds, data_root=self.data_root)
            confirmation.write(self.folder, found)
        except FintxError as error:
            self.problem = self.problem or error
        stopped = (interrupted or self.stop_asked) and not self.over
        return Confirmed(self.folder, self.spec, found, stopped, self.left_aside, self.problem)

    # --- names ---

    def _where(self, key: int) -> Path:
        record, seed = self.members[key]
        return records.member_folder(self.folder, record.trial_number, seed)

    def _words(self, key: int) -> str:
        record, seed = self.members[key]
        return f"trial {record.trial_number} again, seed {self.seeds.index(seed) + 1} of {len(self.seeds)}"


@contextlib.contextmanager
def begin(
    folder: Path,
    wanted: ConfirmConfig,
    *,
    data_root: Path,
    notify: Callable[[Event], None],
    on_gpu: bool = False,
    hosts: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Retraining]:
    """Hold a study's folder and choose its best trials so far.

    Args:
        should_stop: asked while what must be beaten is fitted, and at the end; so is the folder.

    Raises:
        stopping.Stopped: one of them said so.
        StudyBusy: another process of this host runs the study.
        FintxError: no trial to confirm, or data that are missing or not those of the study.
    """
    known = records.read_study(folder)
    if known is None:
        raise FintxError(f"{folder}: holds no study (no study.json)")
    with lock.hold(folder), lock.hold(folder / "confirm", alone=True):
        requests = stopping.Requests(folder)
        pause = functools.partial(requests.heed, should_stop)
        finished = records.read_all(folder)
        best = records.ranked(finished, minimize=metrics.MINIMIZE[known.spec.study.metric])[: wanted.top_k]
        if not best:
            raise FintxError(
                f"{folder}: has no successful trial yet ({len(finished)} finished), so there is nothing to confirm; "
                "run the study first"
            )
        spec, prepared = opening.resolve(known.spec, folder=folder, data_root=data_root)
        _check_data(folder, best[0], prepared)
        trial.ensure_baselines(folder, prepared.folds, spec, data_root, tell=lambda words: None, pause=pause)
        pause()
        fresh = fresh_seeds(spec.study.seed, wanted.n_seeds, used={record.config.seed for record in finished})
        n_folds = len(prepared.folds)
        course = Retraining(folder, spec, tuple(best), fresh, data_root, n_folds, notify, requests, on_gpu, hosts)
        notify(
            ConfirmReady(
                spec.study.name,
                spec,
                prepared,
                tuple(record.trial_number for record in best),
                len(fresh),
                len(finished),
                len(course.done),
            )  # fmt: skip
        )
        yield course


def fresh_seeds(seed: int, n: int, *, used: set[int]) -> tuple[int, ...]:
    """The first n seeds of the study's stream for confirmations, without those that the search has used.

    More seeds begin with the fewer: a confirmation that is widened keeps what it has.
    """
    found: list[int] = []
    number = 0
    while len(found) < n:
        fresh = seeds.derive_seed(seed, seeds.CONFIRM, number)
        if fresh not in used and fresh not in found:
            found.append(fresh)
        number += 1
    return tuple(found)


def _check_data(folder: Path, best: TrialRecord, prepared: windows.Prepared) -> None:
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
