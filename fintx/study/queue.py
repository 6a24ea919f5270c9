"""Which shapes does the user want run first? Their identities, their check, the values they run with, their states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from fintx.config.schema import FAMILIES, QueueEntry, Shape, StudySpec
from fintx.config.validate import Where, spelled
from fintx.errors import FintxError
from fintx.model import family, param_count
from fintx.study.records import TrialRecord
from fintx.study.search_space import SearchSpace, clamped, model_variants
from fintx.study.trial_table import Lease


class QueueError(FintxError):
    """Queue entries that the study can't run, one line each."""


@dataclass(frozen=True)
class Settled:
    """An entry with nothing left open: what is told to the sampler, and what is trained."""

    params: dict[str, Any]
    """Every name of the space's distributions; with training = "sampler" only what the entry fixes."""
    shape: Shape
    training: str
    """Where the values that the entry leaves open came from: "trial 7", "defaults", "sampler"; "": it leaves none."""


@dataclass(frozen=True)
class QueueState:
    """How far an entry is."""

    entry: QueueEntry
    identity: str
    state: str
    """queued, running, interrupted, done, failed n (attempts that crashed or hung), cancelled; clash: its id is that of
    a trial of another shape."""
    number: int | None
    """Its trial; none before it has one."""
    training: str
    """Where its open values came from, as settled; empty before that."""


def entry_id(entry: QueueEntry) -> str:
    """An entry's `id`; without one its content, however written (1 and 1.0 are the same): shape, values, training."""
    if entry.id is not None:
        return entry.id
    values = {
        path: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for path, value in entry.values.items()
    }
    training = [] if entry.training == "best" else [entry.training]
    text = json.dumps([*entry.shape.model_dump().values(), values, *training], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# --- what is queued ---------------------------------------------------------------------------------------------------


def entries(spec: StudySpec, space: SearchSpace) -> tuple[QueueEntry, ...]:
    """What is to be run first, in order: the file's entries, and the extremes where the study asks for them."""
    return tuple(entry for entry in spec.queue if not entry.cancelled) + unlisted_extremes(spec, space)


def unlisted_extremes(spec: StudySpec, space: SearchSpace) -> tuple[QueueEntry, ...]:
    """The extremes where the study asks for them, without the shapes that its file holds already, if cancelled."""
    known = {entry.shape for entry in spec.queue}
    found = extremes(space) if spec.study.queue_extremes else ()
    return tuple(entry for entry in found if entry.shape not in known)


def extremes(space: SearchSpace) -> tuple[QueueEntry, ...]:
    """The smallest and the largest feasible value of each shape axis, each in a shape ordinary in all else.

    Of the shapes that have the value it is the one nearest to the median of the other axes, on a log scale, each
    measured by its range.
    """
    extents, entry = family.of(space.spec.model).extents, FAMILIES[space.spec.model.family].queue_entry
    values = np.array([[extent(shape) for extent in extents.values()] for shape in space.shapes], dtype=float)
    logs = np.log2(values)
    spans = np.ptp(logs, axis=0)
    offsets = np.square((logs - np.median(logs, axis=0)) / np.where(spans > 0, spans, 1))
    notes: dict[Shape, list[str]] = {}
    for axis, name in enumerate(extents):
        if spans[axis] == 0:
            continue
        distances = np.delete(offsets, axis, axis=1).sum(axis=1).round(9)  # so that equal ones tie on any machine
        for word, end in (("smallest", values[:, axis].min()), ("largest", values[:, axis].max())):
            members = np.flatnonzero(values[:, axis] == end)
            nearest = space.shapes[members[np.argmin(distances[members])]]
            notes.setdefault(nearest, []).append(f"{word} {name}")
    return tuple(entry(**shape.model_dump(), note=", ".join(words)) for shape, words in notes.items())


def validate(spec: StudySpec, *, n_features: int, where: Where = spelled) -> None:
    """Check the entries as a whole before anything runs.

    Args:
        where: tells where a key stands; asked where something is wrong.

    Raises:
        QueueError: every entry outside the budget (unless it is cancelled), and every repeated one.
    """
    problems = []
    seen: dict[str, int] = {}
    for index, entry in enumerate(spec.queue):
        if not entry.cancelled:
            problems += [f"{where(('queue', index))}: {words}" for words in _outside(spec, entry, n_features)]
        first = seen.setdefault(entry_id(entry), index)
        if first != index:
            what = "is the same as" if entry.id is None else f'has the id "{entry.id}", which is that of'
            problems.append(f"{where(('queue', index))}: {what} {where(('queue', first))}; take one out")
    if problems:
        raise QueueError("\n".join(problems))


def check_against_trials(
    spec: StudySpec, space: SearchSpace, leases: Sequence[Lease], *, counted: bool, where: Where = spelled
) -> None:
    """Check the entries against the trials that the study has.

    Args:
        counted: whether what is queued and not done must fit into n_trials.

    Raises:
        QueueError: an entry whose `id` is that of a trial of another content; more entries than trials.
    """
    problems, held = [], _latest(leases)
    listed = [(index, entry, held.get(entry_id(entry))) for index, entry in enumerate(spec.queue)]
    listed = [(index, entry, lease) for index, entry, lease in listed if not entry.cancelled]
    for index, entry, lease in listed:
        if lease is not None and not _is_of(lease, entry, space):
            problems.append(
                f"{where(('queue', index))}: its id {entry.id} is that of trial {lease.number}, which has another "
                "shape or other values; give the entry another id"
            )
    waiting = sum(lease is None or not lease.finished for _, _, lease in listed)
    if counted and waiting > spec.study.n_trials:
        problems.append(
            f"{where(('study', 'n_trials'))}: {spec.study.n_trials} is fewer than the {waiting} queue entries to run, "
            "which count toward it; raise it"
        )
    if problems:
        raise QueueError("\n".join(problems))


def _is_of(lease: Lease, entry: QueueEntry, space: SearchSpace) -> bool:
    """Whether a trial is what the entry of its identity asks for now."""
    asked = {path: _told(space, path, value) for path, value in entry.values.items()}
    return lease.shape == entry.shape and all(lease.params.get(path) == value for path, value in asked.items())


def _latest(leases: Sequence[Lease]) -> dict[str | None, Lease]:
    """Identity → the trial that counts: of several the latest."""
    return {lease.entry: lease for lease in sorted(leases, key=lambda lease: lease.number)}


def _outside(spec: StudySpec, entry: QueueEntry, n_features: int) -> list[str]:
    """What is wrong with an entry's size, in the first geometry it may run with that leaves the budget."""
    budget, shape = spec.budget, entry.shape
    for model in model_variants(spec, entry.values):
        total = param_count.count_params(model, shape, n_features).total
        if not budget.low <= total <= budget.high:
            numbers = ", ".join(f"{name} {number}" for name, number in shape.model_dump().items())
            return [
                f"{numbers} holds {total:,} parameters, outside the budget {budget.low:,} … {budget.high:,}; "
                "change the shape, budget.parameters or budget.tolerance"
            ]
    return []


# --- what an entry runs with ------------------------------------------------------------------------------------------


def settle(entry: QueueEntry, spec: StudySpec, space: SearchSpace, *, best: TrialRecord | None) -> Settled:
    """Give an entry the values that it leaves open, as its `training` says.

    Args:
        best: the study's best finished trial so far.
    """
    params: dict[str, Any] = dict(space.encode(entry.shape))
    for path, value in entry.values.items():
        params[path] = _told(space, path, value)
    left_open = [path for path in spec.space if path not in entry.values]
    if not left_open:
        return Settled(params, entry.shape, "")
    if entry.training == "sampler":
        return Settled(params, entry.shape, "sampler")
    model = best if entry.training == "best" else None
    for path in left_open:
        section, _, key = path.partition(".")
        default = getattr(getattr(spec, section), key)
        value = default if model is None else model.params.get(path, default)
        params[path] = _inside(space.distributions[path], value)
    return Settled(params, entry.shape, "defaults" if model is None else f"trial {model.trial_number}")


def _told(space: SearchSpace, path: str, value: Any) -> Any:
    """In the distribution's own type: the very choice, so that 1.0 for 1 is no other category; 4 for 4.0."""
    distribution = space.distributions[path]
    return distribution.to_external_repr(distribution.to_internal_repr(value))


def _inside(distribution: BaseDistribution, value: Any) -> Any:
    """The value, or what of the distribution comes nearest to it: a bound, or the first choice."""
    if not isinstance(distribution, CategoricalDistribution):
        return clamped(distribution, value)
    same_kind = [each for each in distribution.choices if isinstance(each, bool) == isinstance(value, bool)]
    return next((each for each in same_kind if each == value), distribution.choices[0])


# --- how far an entry is ----------------------------------------------------------------------------------------------


def states(entries: Sequence[QueueEntry], leases: Sequence[Lease]) -> tuple[QueueState, ...]:
    """The state of each entry, in order.

    Args:
        entries: cancelled ones included.
        leases: of the study, from its storage.
    """
    held = _latest(leases)
    return tuple(_state(entry, held.get(entry_id(entry))) for entry in entries)


def _state(entry: QueueEntry, lease: Lease | None) -> QueueState:
    words: str = "queued" if lease is None else lease.state
    if lease is not None and lease.shape != entry.shape and not entry.cancelled:
        words = "clash"
    elif lease is not None and lease.finished:
        words = "done"
    elif entry.cancelled and words != "running":  # what is at work goes on; what isn't is not taken up again
        words = "cancelled"
    elif lease is not None and words == "failed":
        words = f"failed {lease.failures}"
    number, training = (None, "") if lease is None else (lease.number, lease.training)
    return QueueState(entry, entry_id(entry), words, number, training)
