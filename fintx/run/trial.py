"""A trial in its worker: every fold is trained; then predictions, checkpoints and, last, the record are written.

Several trials that share a program, and the seeds of one (`study.replicates`), may be trained side by side. Each trial
holds its own run folder, writes its own record and has its own ending.
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
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from fintx.config.schema import StudySpec, config_hash
from fintx.data.datasets import Dataset
from fintx.errors import FintxError
from fintx.evaluate import metrics
from fintx.run.job import Job
from fintx.study import environment, locks, records
from fintx.study.records import FoldRecord, Replicate, TrialRecord
from fintx.train import checkpoint, compilation, multihost, resume, trainer
from fintx.train.member_run import EpochReport, FitResult, Member
from fintx.train.train_state import Timing


@dataclass(frozen=True)
class Hooks:
    """What a running trial reports, and asks."""

    on_epoch: Callable[[int, int, EpochReport], None] = lambda fold, replicate, epoch: None
    on_progress: Callable[[int, int], None] = lambda fold, step: None
    """At least every few seconds of training."""
    on_warning: Callable[[str], None] = lambda text: None
    should_stop: Callable[[], bool] = lambda: False
    """Asked between segments of steps; of trials trained together, the first one's is asked for all."""


Ending = TrialRecord | None | Exception
"""The record; none: stopped on request, its state saved; or what ended this trial alone, such as `Superseded`, or a
FintxError: the disk is full, or the study's metric is undefined on its rows."""


@dataclass(eq=False)
class _Trial:
    """A trial under way."""

    job: Job
    hooks: Hooks
    idle_since: float | None = None
    n_together: int = 1
    """Trials that are trained together, this one included."""
    started: str = field(default_factory=environment.now)
    check: Callable[[], None] = lambda: None
    """Raises `Superseded` if the run folder is another attempt's by now."""
    fits: list[list[FitResult]] = field(default_factory=list)
    """By fold, then by replicate."""
    wait_s: float | None = None
    ended: bool = False
    ending: Ending = None

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """An error within ends this trial alone."""
        try:
            yield
        except Exception as error:
            self.end(error)

    def end(self, ending: Ending) -> None:
        self.ended, self.ending = True, ending

    @property
    def failed(self) -> bool:
        """Whether a seed failed in the latest fold: then no other fold is trained."""
        return any(fit.outcome not in records.SUCCESSES for fit in self.fits[-1])

    def on_begin(self) -> None:
        if self.idle_since is not None and self.wait_s is None:
            self.wait_s = (time.perf_counter() - self.idle_since) / self.n_together


# --- training ---------------------------------------------------------------------------------------------------------


def run_trials(
    jobs: Sequence[Job], folds: tuple[Dataset, ...], hooks: Sequence[Hooks], *, idle_since: float | None = None
) -> Iterator[tuple[Job, Ending]]:
    """Train trials that share a program, going on where earlier attempts stopped, and write their records.

    Args:
        idle_since: `time.perf_counter` of when the device last had work; none: it never had.

    Returns:
        Each job with its ending, as soon as it has come to it.
    """
    _keep_programs(jobs[0])
    trials = [_Trial(job, hook, idle_since, len(jobs)) for job, hook in zip(jobs, hooks, strict=True)]
    with contextlib.ExitStack() as stack:
        for trial in trials:
            with trial.own():
                trial.check = stack.enter_context(locks.seize(trial.job.folder / "run"))
                path = trial.job.folder / "record.json"
                is_done = path.is_file()
                _gather_hosts(trial.job, folds, is_done=is_done)
                if is_done:  # an earlier attempt that lost its coordinator has finished it
                    trial.end(records.read(path))
        yield from _pop_ended(trials)
        for index, dataset in enumerate(folds):
            _fit_fold(trials, dataset, index, n_folds=len(folds))
            for trial in trials:
                if not trial.ended and (trial.failed or index + 1 == len(folds)):
                    with trial.own():
                        trial.end(_write_results(trial, folds))
            yield from _pop_ended(trials)


def _pop_ended(trials: list[_Trial]) -> Iterator[tuple[Job, Ending]]:
    for trial in [trial for trial in trials if trial.ended]:
        trials.remove(trial)
        yield trial.job, trial.ending


def follow_trial(job: Job, folds: tuple[Dataset, ...]) -> None:
    """The same training on the other processes of several hosts; nothing is reported or written."""
    if not _gather_hosts(job, folds, is_done=False):
        return
    _keep_programs(job)
    trial = _Trial(job, Hooks())
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
    hashes = "".join(fold.data_hash + fold.label_hash for fold in folds)
    digest = int(hashlib.sha256(hashes.encode()).hexdigest()[:15], 16)
    if multihost.least(digest) != multihost.most(digest):
        raise FintxError(f"{job.data_root}: the hosts read different data there; give --data-dir a folder they share")
    return not done


def _fit_fold(trials: list[_Trial], dataset: Dataset, fold: int, *, n_folds: int) -> None:
    """Train every seed of every trial on a fold, as many at once as may be; stopped ones end here."""
    if not trials:
        return
    pairs = [(trial, replicate) for trial in trials for replicate in range(len(trial.job.replicates))]
    job, should_stop = trials[0].job, trials[0].hooks.should_stop
    n_parts = -(-len(pairs) // job.population_size)
    n_threads = 1
    if job.on_cores and jax.device_count() == 1:  # several devices of a mesh wait for each other
        n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        n_threads = min(n_cores, n_parts)
    fits: dict[tuple[int, int], FitResult] = {}

    def train(part: int) -> None:
        open_pairs = [(trial, replicate) for trial, replicate in pairs[part::n_parts] if not trial.ended]
        if part > 0 and multihost.agree(int(should_stop()))[0]:
            for trial, _ in open_pairs:
                trial.end(None)
            return
        at_end = fold + 1 < n_folds or len(pairs) > 1
        results = trainer.fit_population(
            [
                _member(trial, replicate, fold, at_end=at_end, n_members=len(open_pairs))
                for trial, replicate in open_pairs
            ],
            dataset,
            metric=job.spec.study.metric,
            should_stop=should_stop,
            memory_limit=job.memory_limit,
            mesh=job.spec.mesh,
        )
        for (trial, replicate), result in zip(open_pairs, results, strict=True):
            if isinstance(result, Exception):
                trial.end(result)
            elif result.outcome == "interrupted":
                trial.end(trial.ending)
            else:
                timing = result.timing.share(n_threads)
                fits[trial.job.key, replicate] = dataclasses.replace(result, timing=timing)

    if n_threads == 1:
        for part in range(n_parts):
            train(part)
    else:
        with ThreadPoolExecutor(n_threads) as threads:
            list(threads.map(train, range(n_parts)))  # the list raises what they raised
    for trial in trials:
        if not trial.ended:
            trial.fits.append([fits[trial.job.key, replicate] for replicate in range(len(trial.job.replicates))])


def _member(trial: _Trial, replicate: int, fold: int, *, at_end: bool, n_members: int) -> Member:
    """One seed of a trial on a fold; its first step is logged as the one from which the attempt goes on."""
    job, hooks = trial.job, trial.hooks
    is_logged = not multihost.is_first()

    def on_progress(step: int) -> None:
        nonlocal is_logged
        if not is_logged:
            is_logged = True
            line = {
                "attempt": job.attempt, "fold": fold, "from_step": step, "host": socket.gethostname(),
                "pid": os.getpid(), "at": environment.now(),
            }  # fmt: skip
            if len(job.replicates) > 1:
                line["replicate"] = replicate
            if n_members > 1:
                line["population"] = n_members
            with (job.folder / "attempts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        hooks.on_progress(fold, step)

    name = f"fold_{fold}" if replicate == 0 else f"fold_{fold}_replicate_{replicate}"
    return Member(
        job.replicates[replicate],
        on_begin=trial.on_begin,
        on_epoch=lambda epoch: hooks.on_epoch(fold, replicate, epoch),
        on_progress=on_progress,
        on_warning=hooks.on_warning,
        saves=resume.CheckpointPolicy(
            job.folder / "run" / name, job.spec.execution.checkpoint_s, trial.check, at_end=at_end
        ),
    )


def compile_trials(jobs: Sequence[Job], folds: tuple[Dataset, ...]) -> None:
    """Compile what `run_trials` will need; from another thread, while others train."""
    first = jobs[0]
    _keep_programs(first)
    n_members = sum(len(job.replicates) for job in jobs)
    n_parts = -(-n_members // first.population_size)
    for n in {len(range(part, n_members, n_parts)) for part in range(n_parts)}:
        for dataset in folds:
            trainer.compile_ahead(
                first.config, dataset, n_members=n, memory_limit=first.memory_limit, mesh=first.spec.mesh
            )


def _keep_programs(job: Job) -> None:
    compilation.keep_programs(job.spec.execution.program_cache, outputs=job.study_folder.parent)


# --- what is kept -----------------------------------------------------------------------------------------------------


def _write_results(trial: _Trial, folds: tuple[Dataset, ...]) -> TrialRecord:
    """Write all that is kept of a trial, the record last, if the trial is still this attempt's."""
    job, folder = trial.job, trial.job.folder
    record = _record(trial, folds)
    first_fits = [fits[0] for fits in trial.fits]
    trial.check()
    records.write_predictions(folder, _predictions(first_fits, folds))
    if len(job.replicates) > 1:  # of every seed but the first, with its number as the last column
        tables = []
        for replicate in range(1, len(job.replicates)):
            table = _predictions([fits[replicate] for fits in trial.fits], folds)
            tables.append(table.append_column("replicate", pa.array(np.full(len(table), replicate, np.int32))))
        table = pa.concat_tables(tables, promote_options="permissive")
        records.write_predictions(folder, table, name="replicates.parquet")
    if record.value is not None:
        for index, (fit, dataset) in enumerate(zip(first_fits, folds, strict=True)):
            assert fit.params is not None
            meta = _checkpoint_meta(record, dataset, fold=index)
            checkpoint.save(folder / "checkpoint" / f"fold_{index}", fit.params, config=job.config, meta=meta)
    trial.check()
    records.write_record(folder, record)
    shutil.rmtree(folder / "run", ignore_errors=True)
    return record


def _record(trial: _Trial, folds: tuple[Dataset, ...]) -> TrialRecord:
    """The trial's record; its value is the mean over its seeds, with the standard error SD / √k."""
    job, fits = trial.job, [fit for of_fold in trial.fits for fit in of_fold]
    spec, config = job.spec, job.config
    folds_by_seed = [
        tuple(_fold_record(spec, of_fold[replicate], fold) for of_fold, fold in zip(trial.fits, folds, strict=False))
        for replicate in range(len(job.replicates))
    ]
    deciding = next((fit for fit in fits if fit.outcome not in records.SUCCESSES), trial.fits[-1][0])
    assert deciding.outcome != "interrupted"
    value = value_se = None
    if deciding.outcome in records.SUCCESSES:
        means = [records.mean_metrics([fold.best for fold in of_seed]) for of_seed in folds_by_seed]
        values = np.array([mean[spec.study.metric] for mean in means], float)
        value = float(values.mean())
        value_se = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return TrialRecord(
        study=spec.study.name,
        trial_number=job.number,
        config=config,
        config_hash=config_hash(config),
        budget=spec.budget,
        source=job.source,
        entry=job.entry,
        note=job.note,
        training=job.training,
        params=job.params,
        **config.shape.model_dump(),
        param_count=fits[0].param_count,
        seeds={"study": spec.study.seed, "trial": config.seed},
        metric=spec.study.metric,
        value=value,
        value_se=value_se,
        outcome=deciding.outcome,
        detail=deciding.detail,
        warnings=tuple(warning for fit in fits for warning in fit.warnings),
        attempt=job.attempt,
        host=socket.gethostname(),
        micro_batch=fits[-1].batch_layout.micro_batch,
        remat=fits[-1].batch_layout.remat,
        layout=dataclasses.asdict(fits[-1].batch_layout.layout),
        memory_bytes=max((fit.memory_bytes for fit in fits if fit.memory_bytes is not None), default=None),
        folds=folds_by_seed[0],
        replicates=tuple(
            Replicate(seed=replicate.seed, folds=of_seed)
            for replicate, of_seed in zip(job.replicates[1:], folds_by_seed[1:], strict=True)
        ),
        libraries=environment.libraries(),
        settings=environment.process_settings()
        | {name: str(value) for name, value in compilation.compiler_options(config.model, config.shape).items()},
        device=environment.device(),
        git_commit=environment.git_commit(),
        started=trial.started,
        finished=environment.now(),
        **dataclasses.asdict(sum((fit.timing for fit in fits), Timing())),
        wait_s=trial.wait_s,
    )


def _fold_record(spec: StudySpec, fit: FitResult, dataset: Dataset) -> FoldRecord:
    assert fit.outcome != "interrupted"
    part = dataset.validation
    per_asset: dict[str, dict[str, Any]] = {}
    if fit.outputs is not None and np.isfinite(fit.outputs).all():
        ids, prior = dataset.asset_ids[part.rows], _train_prior(dataset)
        per_asset = metrics.per_asset(spec.task.predicts, fit.outputs, part.labels, ids, dataset.assets, prior=prior)
    return FoldRecord(
        outcome=fit.outcome,
        best=fit.best,
        last=fit.last,
        per_asset=per_asset,
        best_epoch=fit.best_epoch,
        best_step=fit.best_step,
        epochs=fit.epochs,
        steps=fit.steps,
        curve=tuple(fit.curve),
        data_hash=dataset.data_hash,
        label_hash=dataset.label_hash,
        split_hash=dataset.split_hash,
        n_train=len(dataset.train.rows),
        n_validation=len(part.rows),
        trace_s=fit.timing.trace_s,
        compile_s=fit.timing.compile_s,
        run_s=fit.timing.run_s,
        wall_s=fit.timing.wall_s,
    )


def _checkpoint_meta(record: TrialRecord, dataset: Dataset, *, fold: int) -> dict[str, Any]:
    """What a checkpoint holds beside weights and config, so that its path alone is enough to evaluate it."""
    return {
        "study": record.study,
        "trial_number": record.trial_number,
        "fold": fold,
        "metric": record.metric,
        "best": record.folds[fold].best,
        "feature_names": list(dataset.feature_names),
        "param_count": record.param_count,
        "prior": _train_prior(dataset),
        "scaling": dataset.scaling.to_json(),
        "data_hash": dataset.data_hash,
        "label_hash": dataset.label_hash,
        "split_hash": dataset.split_hash,
        "libraries": record.libraries,
        "layout": record.layout,
    }


def _train_prior(dataset: Dataset) -> float:
    """Mean training label: the base rate, or the mean log return."""
    return float(np.mean(dataset.train.labels, dtype=np.float64))


def _predictions(fits: list[FitResult], folds: tuple[Dataset, ...]) -> pa.Table:
    """One row per validation sample of every fold that has outputs."""
    tables = [
        records.prediction_table(dataset, index, fit.outputs)
        for index, (fit, dataset) in enumerate(zip(fits, folds, strict=False))
        if fit.outputs is not None
    ]
    return pa.concat_tables(tables) if tables else pa.table({name: [] for name in records.PREDICTION_COLUMNS})
