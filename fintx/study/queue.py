"""Queue: the shapes that you want run first; their identities, checks, the values they run with, and their states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution

from fintx.config.schema import FAMILY_CONFIGS, QueueEntry, Shape, StudySpec
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
    """An entry with nothing left open: what the sampler sees, and what is trained."""

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
    """What runs first, in order: the file's entries, and the extremes if `queue_extremes` is set."""
    return tuple(entry for entry in spec.queue if not entry.cancelled) + unlisted_extremes(spec, space)


def unlisted_extremes(spec: StudySpec, space: SearchSpace) -> tuple[QueueEntry, ...]:
    """The extremes if `queue_extremes` is set, without the shapes that the file lists, cancelled ones included."""
    listed = {entry.shape for entry in spec.queue}
    return tuple(entry for entry in extremes(space) if entry.shape not in listed) if spec.study.queue_extremes else ()


def extremes(space: SearchSpace) -> tuple[QueueEntry, ...]:
    """The smallest and the largest feasible value of each shape axis, each in a shape ordinary in all else.

    Of the shapes with that value it is the one nearest to the median of the other axes, on a log scale, each measured
    by its range.
    """
    extents, entry = family.of(space.spec.model).extents, FAMILY_CONFIGS[space.spec.model.family].queue_entry
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
    return tuple(entry(**shape.model_dump(), note=", ".join(parts)) for shape, parts in notes.items())


def check(spec: StudySpec, *, n_features: int, where: Where = spelled) -> None:
    """Check the entries as a whole before anything runs.

    Args:
        where: where a key of the file is, for messages.

    Raises:
        QueueError: every entry outside the budget (unless it is cancelled), and every repeated one.
    """
    problems = []
    budget = spec.budget
    first_index: dict[str, int] = {}
    for index, entry in enumerate(spec.queue):
        variants = () if entry.cancelled else model_variants(spec, entry.values)
        totals = (param_count.count_params(model, entry.shape, n_features).total for model in variants)
        outside = next((total for total in totals if not budget.low <= total <= budget.high), None)
        if outside is not None:
            numbers = ", ".join(f"{name} {number}" for name, number in entry.shape.model_dump().items())
            problems.append(
                f"{where(('queue', index))}: {numbers} holds {outside:,} parameters, outside the budget {budget.low:,} "
                f"… {budget.high:,}; change the shape, budget.parameters or budget.tolerance"
            )
        first = first_index.setdefault(entry_id(entry), index)
        if first != index:
            repeats = "is the same as" if entry.id is None else f'has the id "{entry.id}", which is that of'
            problems.append(f"{where(('queue', index))}: {repeats} {where(('queue', first))}; take one out")
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
    problems, waiting, by_entry = [], 0, _latest(leases)
    for index, entry in enumerate(spec.queue):
        if entry.cancelled:
            continue
        lease = by_entry.get(entry_id(entry))
        waiting += lease is None or not lease.finished
        if lease is not None and (
            lease.shape != entry.shape
            or any(lease.params.get(path) != _typed(space, path, value) for path, value in entry.values.items())
        ):
            problems.append(
                f"{where(('queue', index))}: its id {entry.id} is that of trial {lease.number}, which has another "
                "shape or other values; give the entry another id"
            )
    if counted and waiting > spec.study.n_trials:
        problems.append(
            f"{where(('study', 'n_trials'))}: {spec.study.n_trials} is fewer than the {waiting} queue entries to run, "
            "which count toward it; raise it"
        )
    if problems:
        raise QueueError("\n".join(problems))


def _latest(leases: Sequence[Lease]) -> dict[str | None, Lease]:
    """Identity → its trial, the latest of several."""
    return {lease.entry: lease for lease in sorted(leases, key=lambda lease: lease.number)}


def settle(entry: QueueEntry, space: SearchSpace, *, best: TrialRecord | None) -> Settled:
    """Give an entry the values that it leaves open, as its `training` says.

    Args:
        best: the study's best finished trial so far.
    """
    params: dict[str, Any] = dict(space.encode(entry.shape))
    params.update({path: _typed(space, path, value) for path, value in entry.values.items()})
    left_open = [path for path in space.spec.space if path not in entry.values]
    if not left_open or entry.training == "sampler":
        return Settled(params, entry.shape, "sampler" if left_open else "")
    model = best if entry.training == "best" else None
    for path in left_open:
        section, _, key = path.partition(".")
        value = getattr(getattr(space.spec, section), key)
        if model is not None:
            value = model.params.get(path, value)
        distribution = space.distributions[path]
        if isinstance(distribution, CategoricalDistribution):
            same_type = [
                choice for choice in distribution.choices if isinstance(choice, bool) == isinstance(value, bool)
            ]
            params[path] = next((choice for choice in same_type if choice == value), distribution.choices[0])
        else:
            params[path] = clamped(distribution, value)
    return Settled(params, entry.shape, "defaults" if model is None else f"trial {model.trial_number}")


def _typed(space: SearchSpace, path: str, value: Any) -> Any:
    """A value in its distribution's own type: the very choice, so that 1.0 for 1 is no other category; 4 for 4.0."""
    distribution = space.distributions[path]
    return distribution.to_external_repr(distribution.to_internal_repr(value))


def states(
    entries: Sequence[QueueEntry], leases: Sequence[Lease], records: Sequence[TrialRecord] = ()
) -> tuple[QueueState, ...]:
    """The state of each entry, in order.

    Args:
        entries: cancelled ones included.
        leases: of the study, from its storage.
        records: of the study; the storage may not know them all yet.
    """
    by_entry, recorded = _latest(leases), {record.entry: record for record in records}
    result = []
    for entry in entries:
        lease = by_entry.get(entry_id(entry))
        state: str = "queued" if lease is None else lease.state
        if lease is not None and lease.shape != entry.shape and not entry.cancelled:
            state = "clash"
        elif lease is not None and lease.finished:
            state = "done"
        elif entry.cancelled and state != "running":  # what runs goes on; what doesn't is not taken up again
            state = "cancelled"
        elif lease is not None and state == "failed":
            state = f"failed {lease.failures}"
        number, training = (None, "") if lease is None else (lease.number, lease.training)
        record = recorded.get(entry_id(entry))
        if record is not None and state != "done" and record.config.shape == entry.shape:
            state, number, training = "done", record.trial_number, record.training
        result.append(QueueState(entry, entry_id(entry), state, number, training))
    return tuple(result)
