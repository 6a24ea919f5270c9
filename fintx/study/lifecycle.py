"""Opening a study: what is asked for, checked against what stands in its folder before anything is trained."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from pydantic import ValidationError

import fintx
from fintx.config import load
from fintx.config.schema import ConfirmConfig, StudyConfig, StudySpec
from fintx.config.validate import Where, spelled
from fintx.data import datasets
from fintx.errors import FintxError
from fintx.evaluate import metrics
from fintx.study import baseline_store, environment, locks, queue, records, storage, study_file, trial_table
from fintx.study.events import RunContext
from fintx.study.records import TrialRecord
from fintx.study.search_space import SearchSpace
from fintx.study.study_file import StudyFile
from fintx.study.trial_table import TrialTable

RESOLVED = "resolved.toml"


class StudyConflict(FintxError):
    """The output folder, or the storage, holds another study of this name."""


@dataclass(frozen=True)
class StudyRequest:
    """One study to run."""

    spec: StudySpec
    reload: Callable[[], StudySpec | None] = lambda: None
    """The sweep file again, if it has changed since the last call."""
    where: Where = spelled
    """Tells where a key of its file stands."""
    queue_only: bool = False
    """Run what is queued, beyond n_trials too, and nothing else: the queue is another file's, not the study's own."""
    take_over: TakeOver | None = None
    """Brings trials into a study that is new (a fork)."""
    confirm: ConfirmConfig | None = None
    """Train its best trials again with fresh seeds, instead of searching."""


@dataclass(frozen=True)
class OpenStudy:
    """A study that may run: its folder is held, its storage open, what must be beaten is known."""

    asked: StudySpec
    """As its file says it."""
    spec: StudySpec
    """The same with its data resolved."""
    folder: Path
    space: SearchSpace
    prepared: datasets.PreparedData
    trial_table: TrialTable
    baselines: dict[str, Any]
    stop_requests: locks.StopRequests
    """To stop."""

    @property
    def minimize(self) -> bool:
        """Whether less of the study's metric is better."""
        return metrics.MINIMIZE[self.spec.study.metric]


def pin_versions(spec: StudySpec, folder: Path) -> StudySpec:
    """The spec on the bars that the study of a folder began with, where it names no others itself."""
    known = study_file.read_study(folder)
    if known is None:
        return spec
    symbols = {*spec.data.assets, *spec.data.context}
    begun = {symbol: version for symbol, version in known.spec.data.versions.items() if symbol in symbols}
    data = spec.data.model_copy(update={"versions": {**begun, **spec.data.versions}})
    return spec.model_copy(update={"data": data})


def resolve_data(spec: StudySpec, *, folder: Path, data_root: Path) -> tuple[StudySpec, datasets.PreparedData]:
    """The spec with its features and data versions named, and its data made ready.

    A study keeps the bars it began with, however many newer snapshots have come since.
    """
    spec = pin_versions(spec, folder)
    prepared = datasets.build(spec, data_root)
    return spec.model_copy(update={"data": prepared.data}), prepared


def check_queue(order: StudyRequest, context: RunContext) -> None:
    """Whether a study could run its queue, before any study of the same command begins; nothing is written.

    Raises:
        FintxError: data that are missing, or entries that can't be run.
    """
    folder = context.study_root / order.spec.study.name
    spec, _ = resolve_data(order.spec, folder=folder, data_root=context.data_root)
    queue.validate(spec, n_features=len(spec.data.features), where=order.where)


@contextlib.contextmanager
def open_study(order: StudyRequest, context: RunContext) -> Iterator[OpenStudy]:
    """Hold a study's folder and open it, made where it isn't there yet.

    Raises:
        stopping.Stopped: a stop was asked for, of the run or of the study, before it stood.
        StudyConflict: the folder or the storage holds a study with another definition.
        StudyBusy: another process of this host runs it.
        FintxError: whatever in data, budget, queue or storage can't be run; no trial has been touched then.
    """
    asked, where, take_over, data_root = order.spec, order.where, order.take_over, context.data_root
    folder, warn = context.study_root / asked.study.name, functools.partial(context.notice, asked.study.name)
    known = study_file.read_study(folder)
    spec, prepared = resolve_data(asked, folder=folder, data_root=data_root)
    mine = study_file.definition(spec)
    if known is not None:
        check_same(folder, known.definition, mine)
    space = SearchSpace.build(spec, n_features=len(spec.data.features))
    queue.validate(spec, n_features=len(spec.data.features), where=where)
    counted = not order.queue_only and take_over is None

    with locks.hold(folder), contextlib.ExitStack() as stack:
        requests = locks.StopRequests(folder)
        pause = functools.partial(requests.heed, context.should_stop)
        if known is None:
            _check_no_strangers(folder)
        try:
            minimize = metrics.MINIMIZE[spec.study.metric]
            opened = stack.enter_context(
                storage.open_storage(spec.execution.storage, folder, spec.study.name, minimize=minimize, warn=warn)
            )
            book = TrialTable(opened, trial_table.owner_of(folder, shared=opened.shared))
            queue.check_against_trials(spec, space, book.leases(), counted=counted, where=where)
            check_same(folder, book.definition(mine), mine, where=opened.name)
            pending = folder / "fork-pending"  # stands until every old trial has come over
            if known is None and take_over is not None:
                records.write_atomically(pending, "trials are being taken over from another study\n")
            write_definition(folder, kept_spec(spec, known) if order.queue_only else spec, mine, known)
            if pending.is_file():
                if take_over is None:
                    raise FintxError(f"{folder}: its fork was cut off; give the command with --fork again")
                take_over(folder, spec, space, warn)
                pending.unlink()
            book.restore(records.read_all(folder), space.distributions, minimize=minimize)
            _check_records(folder, book)
            queue.check_against_trials(
                spec, space, book.leases(), counted=counted, where=where
            )  # of a journal made again too
        except storage.StorageAway as error:
            raise FintxError(
                f"{spec.study.name}: {error}; is the database running, and is its address right?"
            ) from None
        datasets.store_processed(prepared, data_root)
        beaten = baseline_store.ensure_baselines(folder, prepared.folds, spec, data_root, tell=warn, pause=pause)
        pause()
        yield OpenStudy(asked, spec, folder, space, prepared, book, beaten, requests)


def _check_records(folder: Path, book: TrialTable) -> None:
    """A trial that the journal calls finished has its record; a database holds a copy of it.

    Raises:
        FintxError: with the trials whose records are gone.
    """
    there = {record.trial_number for record in records.read_all(folder)}
    gone = sorted({lease.number for lease in book.leases() if lease.finished} - there)
    if gone and not book.storage.shared:
        raise FintxError(
            f"{folder}: the records of trials {', '.join(map(str, gone))} are gone, which the journal calls finished; "
            "restore them from a copy, or move journal.log away: the same command then makes it again from the records "
            "that are there, and trains what is missing"
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


def kept_spec(spec: StudySpec, known: StudyFile | None) -> StudySpec:
    """What study.json holds of a study that runs another file's queue: its own queue, as far as it is known."""
    own = known.spec.queue if known else ()
    extremes = known.spec.study.queue_extremes if known else False
    study = spec.study.model_copy(update={"queue_extremes": extremes})
    return spec.model_copy(update={"queue": own, "study": study})


def write_definition(folder: Path, spec: StudySpec, defined: dict[str, Any], known: StudyFile | None) -> None:
    """Write study.json and the resolved file, if they changed.

    Raises:
        FintxError: they can't be written.
    """
    fresh = StudyFile(
        spec=spec,
        definition=defined,
        definition_hash=study_file.definition_hash(defined),
        created=known.created if known else environment.now(),
        fintx_version=known.fintx_version if known else fintx.__version__,
        git_commit=known.git_commit if known else environment.git_commit(),
    )
    if fresh != known:
        study_file.write_study(folder, fresh)
        records.write_atomically(folder / RESOLVED, load.dump(spec))


def _check_no_strangers(folder: Path) -> None:
    strangers = sorted(path.name for path in folder.iterdir() if not path.name.startswith(("lock-", "journal.", ".")))
    if strangers:
        raise StudyConflict(
            f"{folder}: holds files but no study.json ({', '.join(strangers[:5])}); "
            "choose another study.name or --outputs, or move them away"
        )


TakeOver = Callable[[Path, StudySpec, SearchSpace, Callable[[str], None]], None]


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
    """What brings the trials of a study in the folder `old` into a new one: `lifecycle.open_study` calls it.

    Raises:
        FintxError: there is no study to fork.
    """
    known = study_file.read_study(old)
    if known is None:
        raise FintxError(f"--fork: {old} holds no study to take trials from")

    def take_over(folder: Path, spec: StudySpec, space: SearchSpace, say: Callable[[str], None]) -> None:
        reasons: Counter[str] = Counter()
        number = 0
        for record in records.read_all(old):
            if reason := _misfit(record, known.definition, spec, space):
                reasons[reason] += 1
                continue
            _copy(record, old, folder, _as_of(record, spec, space, number))
            number += 1
        left = "".join(f"; {n} not: {reason}" for reason, n in reasons.items())
        say(f"{number} trials taken over from {known.spec.study.name}{left}")

    return take_over


def _misfit(record: TrialRecord, before: dict[str, Any], spec: StudySpec, space: SearchSpace) -> str:
    """Why a trial does not hold under the new definition; empty: it does."""
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
    for name, distribution in _searched(space).items():
        section, _, key = name.partition(".")
        if not _contains(distribution, getattr(getattr(record.config, section), key)):
            return f"their {name} lies outside its range"
    again = space.trial_config(_params(record, space), record.config.shape, seed=record.config.seed)
    ours, theirs = again.model_dump(), record.config.model_dump()
    for section in ours:
        if ours[section] != theirs[section]:
            return f"another {section}"
    return ""


def _searched(space: SearchSpace) -> dict[str, BaseDistribution]:
    return {name: each for name, each in space.distributions.items() if not name.startswith("shape.")}


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except ValueError:  # no choice of the distribution
        return False


def _params(record: TrialRecord, space: SearchSpace) -> dict[str, Any]:
    """The trial's parameters in the coordinates of the new space."""
    values = {}
    for name in _searched(space):
        section, _, key = name.partition(".")
        values[name] = getattr(getattr(record.config, section), key)
    return {**space.encode(record.config.shape), **values}


def _as_of(record: TrialRecord, spec: StudySpec, space: SearchSpace, number: int) -> TrialRecord:
    changes = {
        "study": spec.study.name,
        "trial_number": number,
        "budget": spec.budget,
        "params": _params(record, space),
        "origin": record.origin or f"{record.study}/{record.trial_number}",
    }
    return record.model_copy(update=changes)


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
