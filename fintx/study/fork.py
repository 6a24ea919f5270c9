"""Which trials of an old study hold under a new definition? A fork takes them over, with records and predictions.

A trial holds if the new study could have trained it and would have got the same: its shape and searched values lie in
the new space, and all else (task, data, split, fixed values, metric, software) is what the new definition says.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from pydantic import ValidationError

from fintx.config.schema import StudyConfig, StudySpec
from fintx.study import records
from fintx.study.records import TrialRecord
from fintx.study.space import SearchSpace
from fintx.types import FintxError

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


def taking_over(old: Path) -> TakeOver:
    """What brings the trials of a study in the folder `old` into a new one: `opening.begin` calls it.

    Raises:
        FintxError: there is no study to fork.
    """
    known = records.read_study(old)
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
    after = records.definition(spec)
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
    again = space.trial_config(spec, _params(record, space), record.config.shape, seed=record.config.seed)
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
