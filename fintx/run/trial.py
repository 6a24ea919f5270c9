"""A trial in its worker: every fold is fitted, and what comes of it is written as its record.

Several trials that share a program, and the seeds of one (`study.replicates`), may be trained side by side. Each trial
holds its own run folder, writes its own record and has its own end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jax

from fintx.data.datasets import Dataset
from fintx.errors import FintxError
from fintx.run import results
from fintx.run.job import Job
from fintx.run.results import Trained
from fintx.study import environment, locks, records
from fintx.study.records import TrialRecord
from fintx.train import compilation, multihost, progress, resume, trainer
from fintx.train.member_run import Member
from fintx.train.progress import FitResult
from fintx.train.trainer import fit_population


@dataclass(frozen=True)
class Hooks:
    """What a running trial tells, and asks."""

    on_epoch: Callable[[int, int, progress.Epoch], None]
    """Fold, replicate, and what is known after the epoch."""
    on_progress: Callable[[int, int], None]
    """Fold and step; at least every few seconds of training."""
    on_warning: Callable[[str], None]
    should_stop: Callable[[], bool]
    """Asked between segments of steps; of trials trained together, the first one's is asked for all."""


Ending = TrialRecord | None | Exception
"""The record; none: stopped on request, its state saved; or what ended this trial alone, such as `Superseded`."""


def run_trial(job: Job, folds: tuple[Dataset, ...], hooks: Hooks) -> TrialRecord | None:
    """Train a config on every fold, going on where an earlier attempt stopped, and write its record.

    Returns:
        The record, or none if asked to stop: then the training state is saved for the next attempt.

    Raises:
        Superseded: another attempt has taken the trial over; nothing has been written since.
        FintxError: the disk is full, or the study's metric is undefined on its rows.
    """
    ((_, ending),) = run_trials([job], folds, [hooks])
    if isinstance(ending, Exception):
        raise ending
    return ending


def run_trials(
    jobs: Sequence[Job], folds: tuple[Dataset, ...], hooks: Sequence[Hooks], *, idle_since: float | None = None
) -> Iterator[tuple[Job, Ending]]:
    """As `run`, for trials that share a program: each with its ending, as soon as it has come to it.

    Args:
        idle_since: `time.perf_counter` of when the device last had work; none: it never had.
    """
    _keep_programs(jobs[0])
    trials = [_Trial(job, hook, idle_since=idle_since, beside=len(jobs)) for job, hook in zip(jobs, hooks, strict=True)]
    with contextlib.ExitStack() as stack:
        for trial in trials:
            with trial.own():
                trial.check = stack.enter_context(locks.seize(trial.job.folder / "run"))
                is_done = (trial.job.folder / "record.json").is_file()
                _gather_hosts(trial.job, folds, is_done=is_done)
                if is_done:  # an earlier attempt that lost its coordinator came to the end
                    trial.end(records.read(trial.job.folder / "record.json"))
        yield from _news(trials)
        for index, dataset in enumerate(folds):
            _fit_fold([trial for trial in trials if not trial.ended], dataset, index, n_folds=len(folds))
            for trial in trials:
                if not trial.ended and (trial.failed or index + 1 == len(folds)):
                    with trial.own():
                        trained = Trained(trial.job, trial.fits, trial.started, trial.wait_s)
                        trial.end(results.write_results(trained, folds, trial.check))
            yield from _news(trials)


def _news(trials: list[_Trial]) -> Iterator[tuple[Job, Ending]]:
    """Those that have ended since the last call."""
    for trial in trials:
        if trial.ended and not trial.told:
            trial.told = True
            yield trial.job, trial.ending


def follow_trial(job: Job, folds: tuple[Dataset, ...]) -> None:
    """What the other processes of several hosts do meanwhile: the same training; nothing is told or written."""
    if not _gather_hosts(job, folds, is_done=False):
        return
    silent = Hooks(
        on_epoch=lambda fold, replicate, epoch: None,
        on_progress=lambda fold, step: None,
        on_warning=lambda text: None,
        should_stop=lambda: False,
    )
    _keep_programs(job)
    trial = _Trial(job, silent, idle_since=None, beside=1)
    for index, dataset in enumerate(folds):
        _fit_fold([trial], dataset, index, n_folds=len(folds))
        if isinstance(trial.ending, Exception):
            raise trial.ending
        if trial.ended or trial.failed:
            return


def _gather_hosts(job: Job, folds: tuple[Dataset, ...], *, is_done: bool) -> bool:
    """Whether there is anything to train, once all hosts are known to see the same.

    Raises:
        FintxError: some don't see the study's folder, or read other data.
    """
    (done,) = multihost.agree(is_done)
    if not multihost.least(job.study_folder.is_dir()):
        raise FintxError(
            f"{job.study_folder}: not all hosts see it; give --outputs a folder on a file system they share"
        )
    data = int(
        hashlib.sha256("".join(fold.data_hash + fold.label_hash for fold in folds).encode()).hexdigest()[:15], 16
    )
    if multihost.least(data) != multihost.most(data):
        raise FintxError(f"{job.data_root}: the hosts read different data there; give --data-dir a folder they share")
    return not done


@dataclass
class _Trial:
    """One of those that are trained together."""

    job: Job
    hooks: Hooks
    idle_since: float | None
    beside: int
    """Trials that are trained together, this one included."""
    started: str = field(default_factory=environment.now)
    check: Callable[[], None] = lambda: None
    fits: list[list[FitResult]] = field(default_factory=list)
    """By fold, then by replicate."""
    wait_s: float | None = None
    ended: bool = False
    ending: Ending = None
    told: bool = False

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """What goes wrong within ends this trial alone."""
        try:
            yield
        except Exception as error:
            self.end(error)

    def end(self, ending: Ending) -> None:
        self.ended, self.ending = True, ending

    @property
    def failed(self) -> bool:
        """Whether a seed came to no good end in the latest fold: then no other fold is trained."""
        return any(fit.outcome not in records.SUCCESSES for fit in self.fits[-1])

    def on_begin(self) -> None:
        if self.idle_since is not None and self.wait_s is None:
            self.wait_s = (time.perf_counter() - self.idle_since) / self.beside


def _fit_fold(trials: list[_Trial], dataset: Dataset, fold: int, *, n_folds: int) -> None:
    """Train every seed of every trial on a fold, as many at once as may be; stopped ones end here."""
    if not trials:
        return
    pairs = [(trial, replicate) for trial in trials for replicate in range(len(trial.job.replicates))]
    job, should_stop = trials[0].job, trials[0].hooks.should_stop
    n_parts = -(-len(pairs) // job.at_once)
    n_threads = _threads(job, n_parts)
    fits: dict[tuple[int, int], FitResult] = {}

    def train(part: int) -> None:
        going = [pair for pair in pairs[part::n_parts] if not pair[0].ended]
        if part > 0 and multihost.agree(int(should_stop()))[0]:
            for trial, _ in going:
                trial.end(None)
            return
        at_end = fold + 1 < n_folds or len(pairs) > 1
        found = fit_population(
            [_member(trial, replicate, fold, at_end=at_end, beside=len(going)) for trial, replicate in going],
            dataset,
            metric=job.spec.study.metric,
            should_stop=should_stop,
            memory_limit=job.memory_limit,
            mesh=job.spec.mesh,
        )
        for (trial, replicate), result in zip(going, found, strict=True):
            if isinstance(result, Exception):
                trial.end(result)
            elif result.outcome == "interrupted":
                trial.end(trial.ending)
            else:
                shared = result.timing.share(n_threads)
                fits[trial.job.key, replicate] = dataclasses.replace(result, timing=shared)

    if n_threads == 1:
        for part in range(n_parts):
            train(part)
    else:
        with ThreadPoolExecutor(n_threads) as threads:
            list(threads.map(train, range(n_parts)))  # the list asks for what they raised
    for trial in trials:
        if not trial.ended:
            trial.fits.append([fits[trial.job.key, replicate] for replicate in range(len(trial.job.replicates))])


def _threads(job: Job, n_parts: int) -> int:
    """Parts that train at once, each by a thread: where the job allows it, one for each of this process's cores."""
    if not job.on_cores or jax.device_count() > 1:  # several devices of a mesh wait for each other
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, n_parts)


def _member(trial: _Trial, replicate: int, fold: int, *, at_end: bool, beside: int) -> Member:
    job = trial.job
    hook = _FoldHooks(job, fold, replicate, beside, trial.hooks, begun=not multihost.is_first())
    name = f"fold_{fold}" if replicate == 0 else f"fold_{fold}_replicate_{replicate}"
    return Member(
        job.replicates[replicate],
        on_begin=trial.on_begin,
        on_epoch=hook.on_epoch,
        on_progress=hook.on_progress,
        on_warning=trial.hooks.on_warning,
        saves=resume.CheckpointPolicy(
            job.folder / "run" / name, job.spec.execution.checkpoint_s, trial.check, at_end=at_end
        ),
    )


@dataclass
class _FoldHooks:
    """One training's calls, with its fold; its first step is logged as the one that the attempt went on from."""

    job: Job
    fold: int
    replicate: int
    beside: int
    hooks: Hooks
    begun: bool = False

    def on_epoch(self, epoch: progress.Epoch) -> None:
        self.hooks.on_epoch(self.fold, self.replicate, epoch)

    def on_progress(self, step: int) -> None:
        if not self.begun:
            self.begun = True
            line = {
                "attempt": self.job.attempt, "fold": self.fold, "from_step": step, "host": socket.gethostname(),
                "pid": os.getpid(), "at": environment.now(),
            }  # fmt: skip
            if len(self.job.replicates) > 1:
                line["replicate"] = self.replicate
            if self.beside > 1:
                line["population"] = self.beside
            with (self.job.folder / "attempts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.hooks.on_progress(self.fold, step)


def compile_trials(jobs: Sequence[Job], folds: tuple[Dataset, ...]) -> None:
    """Compile what `run_together` will ask for; from another thread, while others train."""
    first = jobs[0]
    _keep_programs(first)
    n_members = sum(len(job.replicates) for job in jobs)
    n_parts = -(-n_members // first.at_once)
    for n in {len(range(part, n_members, n_parts)) for part in range(n_parts)}:
        for dataset in folds:
            trainer.compile_ahead(
                first.config, dataset, n_members=n, memory_limit=first.memory_limit, mesh=first.spec.mesh
            )


def _keep_programs(job: Job) -> None:
    compilation.keep_programs(job.spec.execution.program_cache, outputs=job.study_folder.parent)


def drop_checkpoint(study_folder: Path, number: int) -> None:
    """A trial that is no longer among the best keeps its record alone."""
    shutil.rmtree(records.trial_folder(study_folder, number) / "checkpoint", ignore_errors=True)
