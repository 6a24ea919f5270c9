"""Opening a study: what is asked for, checked against what stands in its folder before anything is trained."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fintx
from fintx.config import load
from fintx.config.schema import ConfirmConfig, StudySpec
from fintx.config.validate import Where, spelled
from fintx.data import windows
from fintx.evaluate import metrics
from fintx.study import environment, ledger, lock, queue, records, stopping, storage, trial
from fintx.study.context import RunContext
from fintx.study.fork import TakeOver
from fintx.study.ledger import Ledger
from fintx.study.records import StudyFile
from fintx.study.space import SearchSpace
from fintx.types import FintxError

RESOLVED = "resolved.toml"


class StudyConflict(FintxError):
    """The output folder, or the storage, holds another study of this name."""


@dataclass(frozen=True)
class Order:
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
class Opened:
    """A study that may run: its folder is held, its storage open, what must be beaten is known."""

    asked: StudySpec
    """As its file says it."""
    spec: StudySpec
    """The same with its data resolved."""
    folder: Path
    space: SearchSpace
    prepared: windows.Prepared
    ledger: Ledger
    baselines: dict[str, Any]
    requests: stopping.Requests
    """To stop."""

    @property
    def minimize(self) -> bool:
        """Whether less of the study's metric is better."""
        return metrics.MINIMIZE[self.spec.study.metric]


def pinned(spec: StudySpec, folder: Path) -> StudySpec:
    """The spec on the bars that the study of a folder began with, where it names no others itself."""
    known = records.read_study(folder)
    if known is None:
        return spec
    symbols = {*spec.data.assets, *spec.data.context}
    begun = {symbol: version for symbol, version in known.spec.data.versions.items() if symbol in symbols}
    data = spec.data.model_copy(update={"versions": {**begun, **spec.data.versions}})
    return spec.model_copy(update={"data": data})


def resolve(spec: StudySpec, *, folder: Path, data_root: Path) -> tuple[StudySpec, windows.Prepared]:
    """The spec with its features and data versions named, and its data made ready.

    A study keeps the bars it began with, however many newer snapshots have come since.
    """
    spec = pinned(spec, folder)
    prepared = windows.build(spec, data_root)
    return spec.model_copy(update={"data": prepared.data}), prepared


def check_queue(order: Order, context: RunContext) -> None:
    """Whether a study could run its queue, before any study of the same command begins; nothing is written.

    Raises:
        FintxError: data that are missing, or entries that can't be run.
    """
    folder = context.study_root / order.spec.study.name
    spec, _ = resolve(order.spec, folder=folder, data_root=context.data_root)
    queue.validate(spec, n_features=len(spec.data.features), where=order.where)


@contextlib.contextmanager
def begin(order: Order, context: RunContext) -> Iterator[Opened]:
    """Hold a study's folder and open it, made where it isn't there yet.

    Raises:
        stopping.Stopped: a stop was asked for, of the run or of the study, before it stood.
        StudyConflict: the folder or the storage holds a study with another definition.
        StudyBusy: another process of this host runs it.
        FintxError: whatever in data, budget, queue or storage can't be run; no trial has been touched then.
    """
    asked, where, take_over, data_root = order.spec, order.where, order.take_over, context.data_root
    folder, warn = context.study_root / asked.study.name, functools.partial(context.notice, asked.study.name)
    known = records.read_study(folder)
    spec, prepared = resolve(asked, folder=folder, data_root=data_root)
    mine = records.definition(spec)
    if known is not None:
        check_same(folder, known.definition, mine)
    space = SearchSpace.build(spec, n_features=len(spec.data.features))
    queue.validate(spec, n_features=len(spec.data.features), where=where)
    counted = not order.queue_only and take_over is None

    with lock.hold(folder), contextlib.ExitStack() as stack:
        requests = stopping.Requests(folder)
        pause = functools.partial(requests.heed, context.should_stop)
        if known is None:
            _check_no_strangers(folder)
        try:
            minimize = metrics.MINIMIZE[spec.study.metric]
            opened = stack.enter_context(
                storage.open_study(spec.execution.storage, folder, spec.study.name, minimize=minimize, warn=warn)
            )
            book = Ledger(opened, ledger.owner_of(folder, shared=opened.shared))
            queue.check_begun(spec, space, book.claims(), counted=counted, where=where)
            check_same(folder, book.definition(mine), mine, where=opened.words)
            pending = folder / "fork-pending"  # stands until every old trial has come over
            if known is None and take_over is not None:
                records.write_atomically(pending, "trials are being taken over from another study\n")
            write(folder, kept(spec, known) if order.queue_only else spec, mine, known)
            if pending.is_file():
                if take_over is None:
                    raise FintxError(f"{folder}: its fork was cut off; give the command with --fork again")
                take_over(folder, spec, space, warn)
                pending.unlink()
            book.restore(records.read_all(folder), space.distributions, minimize=minimize)
            _check_records(folder, book)
            queue.check_begun(spec, space, book.claims(), counted=counted, where=where)  # of a journal made again too
        except storage.StorageAway as error:
            raise FintxError(
                f"{spec.study.name}: {error}; is the database running, and is its address right?"
            ) from None
        windows.store_processed(prepared, data_root)
        beaten = trial.ensure_baselines(folder, prepared.folds, spec, data_root, tell=warn, pause=pause)
        pause()
        yield Opened(asked, spec, folder, space, prepared, book, beaten, requests)


def _check_records(folder: Path, book: Ledger) -> None:
    """A trial that the journal calls finished has its record; a database holds a copy of it.

    Raises:
        FintxError: with the trials whose records are gone.
    """
    there = {record.trial_number for record in records.read_all(folder)}
    gone = sorted({claim.number for claim in book.claims() if claim.finished} - there)
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


def kept(spec: StudySpec, known: StudyFile | None) -> StudySpec:
    """What study.json holds of a study that runs another file's queue: its own queue, as far as it is known."""
    own = known.spec.queue if known else ()
    extremes = known.spec.study.queue_extremes if known else False
    study = spec.study.model_copy(update={"queue_extremes": extremes})
    return spec.model_copy(update={"queue": own, "study": study})


def write(folder: Path, spec: StudySpec, defined: dict[str, Any], known: StudyFile | None) -> None:
    """Write study.json and the resolved file, if they changed.

    Raises:
        FintxError: they can't be written.
    """
    fresh = StudyFile(
        spec=spec,
        definition=defined,
        definition_hash=records.definition_hash(defined),
        created=known.created if known else environment.now(),
        fintx_version=known.fintx_version if known else fintx.__version__,
        git_commit=known.git_commit if known else environment.git_commit(),
    )
    if fresh != known:
        records.write_study(folder, fresh)
        records.write_atomically(folder / RESOLVED, load.dump(spec))


def _check_no_strangers(folder: Path) -> None:
    strangers = sorted(path.name for path in folder.iterdir() if not path.name.startswith(("lock-", "journal.", ".")))
    if strangers:
        raise StudyConflict(
            f"{folder}: holds files but no study.json ({', '.join(strangers[:5])}); "
            "choose another study.name or --outputs, or move them away"
        )
