"""Orders from files: the studies that a command asks for, which follow their files' edits while they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from fintx.config import load
from fintx.config.schema import ConfirmConfig, StudySpec
from fintx.study import lifecycle, study_file
from fintx.study.lifecycle import StudyRequest


def of_sweep(path: Path, overrides: Sequence[str]) -> StudyRequest:
    """The study of a sweep file.

    Raises:
        SweepFileError: all that is wrong with it.
    """

    def read() -> StudySpec:
        return load.study(path, overrides=overrides, counted=False)  # what of the queue is done, the study knows

    spec = read()
    return StudyRequest(spec, load.watch(load.files(path), read), load.where(path, overrides=overrides))


def of_fork(order: StudyRequest, name: str, *, outputs: Path) -> StudyRequest:
    """The same file as a new study, with the bars of the old one and its trials.

    Raises:
        FintxError: a name that is none, or no study to fork.
    """
    old = outputs / order.spec.study.name

    def forked(spec: StudySpec) -> StudySpec:
        return lifecycle.renamed(lifecycle.pin_versions(spec, old), name)

    def reload() -> StudySpec | None:
        fresh = order.reload()
        return None if fresh is None else forked(fresh)

    return dataclasses.replace(order, spec=forked(order.spec), reload=reload, take_over=lifecycle.take_over_from(old))


def of_confirmation(study: str, changes: dict[str, int], *, outputs: Path) -> tuple[Path, StudyRequest]:
    """A study's folder, and the request to confirm it.

    Args:
        study: its name, or its folder.
        changes: settings of `[confirm]` other than those in its file.
    """
    folder = study_file.find_study(study, outputs=outputs).resolve()
    stored = study_file.read_study(folder)
    assert stored is not None
    confirm = (stored.spec.confirm or ConfirmConfig()).model_copy(update=changes)
    # A study takes the name of its folder, which may have been renamed or copied.
    named = stored.spec.study.model_copy(update={"name": folder.name})
    return folder, StudyRequest(stored.spec.model_copy(update={"study": named}), confirm=confirm)


def of_manual(path: Path, overrides: Sequence[str]) -> list[StudyRequest]:
    """The studies of a manual file.

    Raises:
        SweepFileError: all that is wrong with it, or with the sweep files that it names.
    """
    return [_of_group(path, sweep, spec, overrides) for sweep, spec in load.manual(path, overrides=overrides).items()]


def added(path: Path, overrides: Sequence[str], made: Sequence[StudyRequest]) -> Callable[[], list[StudyRequest]]:
    """Gives the studies that a manual file has come to name since the last look, beside those that are ordered."""
    again = load.watch((path,), lambda: of_manual(path, overrides))
    names = {order.spec.study.name for order in made}

    def look() -> list[StudyRequest]:
        fresh = [order for order in again() or () if order.spec.study.name not in names]
        names.update(order.spec.study.name for order in fresh)
        return fresh

    return look


def _of_group(path: Path, sweep: Path, spec: StudySpec, overrides: Sequence[str]) -> StudyRequest:
    def read() -> StudySpec:
        emptied = spec.model_copy(update={"queue": ()})
        return load.manual(path, overrides=overrides).get(sweep, emptied)

    again = load.watch((path, *load.files(sweep)), read)
    return StudyRequest(spec, again, load.where(path, overrides=overrides, sweep=sweep), queue_only=True)
