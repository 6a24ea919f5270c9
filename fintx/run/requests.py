"""Study requests: the studies that a command's files ask for; they follow edits of their files while they run."""

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
        return load.study(path, overrides=overrides, counted=False)  # the study knows which queue entries are done

    spec = read()
    return StudyRequest(spec, load.watch(load.file_and_base(path), read), load.where(path, overrides=overrides))


def of_fork(request: StudyRequest, name: str, *, outputs: Path) -> StudyRequest:
    """The same file as a new study, with the bars of the old one and its trials.

    Raises:
        FintxError: no valid name, or no study to fork.
    """
    old = outputs / request.spec.study.name

    def forked(spec: StudySpec) -> StudySpec:
        return lifecycle.renamed(lifecycle.pin_versions(spec, old), name)

    def reload() -> StudySpec | None:
        fresh = request.reload()
        return None if fresh is None else forked(fresh)

    return dataclasses.replace(
        request, spec=forked(request.spec), reload=reload, take_over=lifecycle.take_over_from(old)
    )


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


def added(path: Path, overrides: Sequence[str], studies: Sequence[StudyRequest]) -> Callable[[], list[StudyRequest]]:
    """A function that returns the studies that were added to a manual file since the last call."""
    reload = load.watch((path,), lambda: of_manual(path, overrides))
    names = {request.spec.study.name for request in studies}

    def look() -> list[StudyRequest]:
        fresh = [request for request in reload() or () if request.spec.study.name not in names]
        names.update(request.spec.study.name for request in fresh)
        return fresh

    return look


def _of_group(path: Path, sweep: Path, spec: StudySpec, overrides: Sequence[str]) -> StudyRequest:
    def read() -> StudySpec:
        without_queue = spec.model_copy(update={"queue": ()})
        return load.manual(path, overrides=overrides).get(sweep, without_queue)

    reload = load.watch((path, *load.file_and_base(sweep)), read)
    return StudyRequest(spec, reload, load.where(path, overrides=overrides, sweep=sweep), queue_only=True)
