"""Lifecycle of a study: opening, resuming and forking it.

Before anything is trained, a study is checked and prepared as a whole: its definition is that of its folder and its
storage, its data are ready, its queue can run, and its baselines are fitted.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import fintx
from fintx.config import load
from fintx.config.schema import ConfirmConfig, StudyConfig, StudySpec
from fintx.config.validate import Where, spelled
from fintx.data import datasets
from fintx.errors import FintxError
from fintx.evaluate import metrics
from fintx.study import environment, locks, queue, records, storage, study_file, trial_table
from fintx.study.events import RunContext
from fintx.study.records import TrialRecord
from fintx.study.search_space import SearchSpace
from fintx.study.storage import Warn
from fintx.study.study_file import StudyFile
from fintx.study.trial_table import Lease, TrialTable

TakeOver = Callable[[Path, StudySpec, SearchSpace, Warn], None]
"""Brings trials into the folder of a new study."""


class StudyConflict(FintxError):
    """The output folder, or the storage, holds another study of this name."""


@dataclass(frozen=True)
class StudyRequest:
    """One study to run."""

    spec: StudySpec
    reload: Callable[[], StudySpec | None] = lambda: None
    """The sweep file again, if it has changed since the last call."""
    where: Where = spelled
    """Where a key of its file is, for messages."""
    queue_only: bool = False
    """Run what is queued, beyond n_trials too, and nothing else: the queue is another file's, not the study's own."""
    take_over: TakeOver | None = None
    """Brings trials into a new study (a fork)."""
    confirm: ConfirmConfig | None = None
    """Train its best trials again with fresh seeds, instead of searching."""


@dataclass(frozen=True)
class OpenStudy:
    """A study that may run: its folder is locked, its storage open, its baselines fitted."""

    requested: StudySpec
    """As its file says it."""
    spec: StudySpec
    """The same with its data resolved."""
    folder: Path
    space: SearchSpace
    prepared: datasets.PreparedData
    trial_table: TrialTable
    baselines: dict[str, Any]
    stop_requests: locks.StopRequests

    @property
    def minimize(self) -> bool:
        """Whether less of the study's metric is better."""
        return metrics.MINIMIZE[self.spec.study.metric]


def pin_versions(spec: StudySpec, folder: Path) -> StudySpec:
    """The spec on the bars that the study of a folder began with, where it names no others itself."""
    existing = study_file.read_study(folder)
    if existing is None:
        return spec
    symbols = {*spec.data.assets, *spec.data.context}
    pinned = {symbol: version for symbol, version in existing.spec.data.versions.items() if symbol in symbols}
    data = spec.data.model_copy(update={"versions": {**pinned, **spec.data.versions}})
    return spec.model_copy(update={"data": data})


def resolve_data(spec: StudySpec, *, folder: Path, data_root: Path) -> tuple[StudySpec, datasets.PreparedData]:
    """The spec with its features and data versions named, and its data made ready.

    A study keeps the bars it began with, however many newer snapshots have come since.
    """
    spec = pin_versions(spec, folder)
    prepared = datasets.build(spec, data_root)
    return spec.model_copy(update={"data": prepared.data}), prepared


def check_queue(request: StudyRequest, context: RunContext) -> None:
    """Check that a study could run its queue, before any study of the same command begins; nothing is written.

    Raises:
        FintxError: data are missing, or entries can't be run.
    """
    folder = context.study_root / request.spec.study.name
    spec, _ = resolve_data(request.spec, folder=folder, data_root=context.data_root)
    queue.check(spec, n_features=len(spec.data.features), where=request.where)


@contextlib.contextmanager
def open_study(request: StudyRequest, context: RunContext) -> Iterator[OpenStudy]:
    """Lock a study's folder and open the study, creating what isn't there yet.

    Raises:
        locks.Stopped: the run or the study was asked to stop before the study was open.
        StudyConflict: the folder or the storage holds a study with another definition.
        StudyBusy: another process of this host runs it.
        FintxError: data, budget, queue or storage can't be used; no trial has been touched then.
    """
    take_over, data_root, name = request.take_over, context.data_root, request.spec.study.name
    folder, warn = context.study_root / name, functools.partial(context.notice, name)
    spec, prepared = resolve_data(request.spec, folder=folder, data_root=data_root)
    existing, definition = study_file.read_study(folder), study_file.definition(spec)
    if existing is not None:
        check_same(folder, existing.definition, definition)
    n_features, minimize = len(spec.data.features), metrics.MINIMIZE[spec.study.metric]
    space = SearchSpace.build(spec, n_features=n_features, where=request.where)
    queue.check(spec, n_features=n_features, where=request.where)
    counted = not request.queue_only and take_over is None

    with locks.hold(folder), contextlib.ExitStack() as stack:
        stop_requests = locks.StopRequests(folder)
        check_stop = functools.partial(stop_requests.check, context.should_stop)
        if existing is None:
            _check_no_strangers(folder)
        try:
            opened = stack.enter_context(
                storage.open_storage(spec.execution.storage, folder, name, minimize=minimize, warn=warn)
            )
            table = TrialTable(opened, trial_table.owner_of(folder, shared=opened.shared))
            queue.check_against_trials(spec, space, table.leases(), counted=counted, where=request.where)
            check_same(folder, table.definition(definition), definition, where=opened.name)
            pending = folder / "fork-pending"  # there until every old trial has been taken over
            if existing is None and take_over is not None:
                records.write_atomically(pending, "trials are being taken over from another study\n")
            write_definition(folder, spec, queue_only=request.queue_only)
            if pending.is_file():
                if take_over is None:
                    raise FintxError(f"{folder}: its fork was cut off; give the command with --fork again")
                take_over(folder, spec, space, warn)
                pending.unlink()
            table.restore(records.read_all(folder), space.distributions, minimize=minimize)
            leases = table.leases()
            if not opened.shared:  # a database holds a copy of every record
                _check_records(folder, leases)
            queue.check_against_trials(spec, space, leases, counted=counted, where=request.where)  # a restored journal
        except storage.StorageAway as error:
            raise FintxError(f"{name}: {error}; is the database running, and is its address right?") from None
        datasets.store_processed(prepared, data_root)
        baselines = study_file.ensure_baselines(
            folder, prepared.folds, spec, data_root, notify=warn, check_stop=check_stop
        )
        check_stop()
        yield OpenStudy(request.spec, spec, folder, space, prepared, table, baselines, stop_requests)


def _check_records(folder: Path, leases: tuple[Lease, ...]) -> None:
    """A trial that the journal calls finished has its record.

    Raises:
        FintxError: with the trials whose records are gone.
    """
    present = {record.trial_number for record in records.read_all(folder)}
    missing = sorted({lease.number for lease in leases if lease.finished} - present)
    if missing:
        raise FintxError(
            f"{folder}: the records of trials {', '.join(map(str, missing))} are gone, which the journal calls "
            "finished; restore them from a copy, or move journal.log away: the same command then makes it again from "
            "the records that are there, and trains what is missing"
        )


def check_same(folder: Path, before: dict[str, Any], after: dict[str, Any], *, where: str = "") -> None:
    """A study's definition never changes under its name.

    Raises:
        StudyConflict: with every field that differs, a line each, and what can be done.
    """
    differing = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if not differing:
        return
    finished = len(records.read_all(folder)) if folder.is_dir() else 0
    changes = "".join(f"\n  {key}: {before.get(key)!r} there, {after.get(key)!r} here;" for key in differing)
    raise StudyConflict(
        f"{where or folder}: holds another study of this name ({finished} trials finished); nothing was run:{changes}\n"
        "undo the edit to continue it, or add --fork NAME: a new study of that name, which takes over every trial that "
        "is still valid"
    )


def write_definition(folder: Path, spec: StudySpec, *, queue_only: bool) -> None:
    """Write study.json and the resolved file, if they changed.

    Args:
        queue_only: the queue is another file's: the study keeps its own, if it has one.

    Raises:
        FintxError: they can't be written.
    """
    existing = study_file.read_study(folder)
    if queue_only:
        extremes = existing.spec.study.queue_extremes if existing else False
        study = spec.study.model_copy(update={"queue_extremes": extremes})
        spec = spec.model_copy(update={"queue": existing.spec.queue if existing else (), "study": study})
    if existing is not None:
        new = existing.model_copy(update={"spec": spec})
    else:
        definition = study_file.definition(spec)
        new = StudyFile(
            spec=spec,
            definition=definition,
            definition_hash=study_file.definition_hash(definition),
            created=environment.now(),
            fintx_version=fintx.__version__,
            git_commit=environment.git_commit(),
        )
    if new != existing:
        study_file.write_study(folder, new)
        records.write_atomically(folder / "resolved.toml", load.dump(spec))


def _check_no_strangers(folder: Path) -> None:
    strangers = sorted(path.name for path in folder.iterdir() if not path.name.startswith(("lock-", "journal.", ".")))
    if strangers:
        raise StudyConflict(
            f"{folder}: holds files but no study.json ({', '.join(strangers[:5])}); "
            "choose another study.name or --outputs, or move them away"
        )


# --- forks ------------------------------------------------------------------------------------------------------------


def renamed(spec: StudySpec, name: str) -> StudySpec:
    """The spec as a study of another name.

    Raises:
        FintxError: no name for a study, or the old one.
    """
    try:
        study = StudyConfig.model_validate({**spec.study.model_dump(), "name": name})
    except ValidationError:
        raise FintxError(
            f'--fork {name[:60]!r}: wanted a name of letters, digits, ".", "_" and "-" (64 at most)'
        ) from None
    if name == spec.study.name:
        raise FintxError(f"--fork {name}: is the study's own name; give the fork another")
    return spec.model_copy(update={"study": study})


def take_over_from(old: Path) -> TakeOver:
    """What brings the trials of the study in `old` into a new one; `open_study` calls it.

    Raises:
        FintxError: there is no study to fork.
    """
    forked = study_file.read_study(old)
    if forked is None:
        raise FintxError(f"--fork: {old} holds no study to take trials from")

    def take_over(folder: Path, spec: StudySpec, space: SearchSpace, warn: Warn) -> None:
        reasons: Counter[str] = Counter()
        number = 0
        for record in records.read_all(old):
            searched = {}
            for path in spec.space:
                section, _, key = path.partition(".")
                searched[path] = getattr(getattr(record.config, section), key)
            if reason := _misfit(record, searched, forked.definition, spec, space):
                reasons[reason] += 1
                continue
            changes = {
                "study": spec.study.name,
                "trial_number": number,
                "budget": spec.budget,
                "params": {**space.encode(record.config.shape), **searched},
                "origin": record.origin or f"{record.study}/{record.trial_number}",
            }
            _copy(record, old, folder, record.model_copy(update=changes))
            number += 1
        left = "".join(f"; {n} not: {reason}" for reason, n in reasons.items())
        warn(f"{number} trials taken over from {forked.spec.study.name}{left}")

    return take_over


def _misfit(
    record: TrialRecord, searched: dict[str, Any], before: dict[str, Any], spec: StudySpec, space: SearchSpace
) -> str:
    """Why a trial does not hold under the new definition; empty: it does.

    Args:
        searched: the trial's values of what the new study searches.
        before: the definition that it was trained under.
    """
    after = study_file.definition(spec)
    for key in sorted({key for key in {**before, **after} if key.startswith("software.")}):
        if before.get(key) != after.get(key):
            return f"{key} is {after.get(key)}, they ran on {before.get(key)}"
    if record.metric != spec.study.metric:
        return f"study.metric is {spec.study.metric}, their best step was chosen by {record.metric}"
    if 1 + len(record.replicates) != spec.study.replicates:
        return f"study.replicates is {spec.study.replicates}, they have {1 + len(record.replicates)}"
    if record.config.shape not in space.shapes and record.source == "sampler":
        return "their shape is no candidate any more"
    if not spec.budget.low <= record.param_count <= spec.budget.high:
        return "their size is outside the budget"
    for path, value in searched.items():
        distribution = space.distributions[path]
        try:
            is_inside = distribution._contains(distribution.to_internal_repr(value))
        except ValueError:  # no choice of the distribution
            is_inside = False
        if not is_inside:
            return f"their {path} lies outside its range"
    again = space.trial_config(searched, record.config.shape, seed=record.config.seed)
    new, old = again.model_dump(), record.config.model_dump()
    return next((f"another {section}" for section in new if new[section] != old[section]), "")


def _copy(record: TrialRecord, old: Path, folder: Path, new: TrialRecord) -> None:
    """Predictions and checkpoint first, the record last: a trial is there once its record is."""
    source, target = records.trial_folder(old, record.trial_number), records.trial_folder(folder, new.trial_number)
    if (target / "record.json").is_file():  # of a fork that was cut off
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("predictions.parquet", "replicates.parquet"):
        if (source / name).is_file():
            shutil.copy2(source / name, target)
    if (source / "checkpoint").is_dir():
        shutil.copytree(source / "checkpoint", target / "checkpoint", dirs_exist_ok=True)
    records.append(folder, new)
