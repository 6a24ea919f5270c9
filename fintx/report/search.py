"""How did the search go? Outcomes and run times, trials that repeat each other, and how much of the space was seen."""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass

import numpy as np

from fintx.config.schema import Shape
from fintx.report.evidence import Evidence
from fintx.report.patterns import DEPTHS, depth_bucket
from fintx.study import records, sampler
from fintx.study.records import TrialRecord
from fintx.study.space import SearchSpace


@dataclass(frozen=True)
class OutcomeRow:
    """Trials that came to one end."""

    outcome: str
    n: int
    succeeded: bool
    mean_s: float
    total_s: float
    compile_s: float
    """Mean; part of mean_s."""
    detail: str
    """Of the newest one, where it failed."""


@dataclass(frozen=True)
class Coverage:
    """How much of the feasible set was trained, for one width."""

    d_model: int
    feasible: int
    trained: int
    """Feasible shapes that were trained, each counted once."""
    depths: str
    """Feasible depths."""
    trained_depths: str
    unseen: str
    """Depth buckets with feasible shapes, none of which was trained."""


@dataclass(frozen=True)
class Search:
    """The search as a whole."""

    outcomes: tuple[OutcomeRow, ...]
    finished: int
    wanted: int
    repeated_configs: tuple[tuple[int, ...], ...]
    """Trials that differ in nothing but their seed."""
    repeated_shapes: tuple[tuple[Shape, tuple[int, ...]], ...]
    """Shapes trained with several training values, most often first."""
    coverage: tuple[Coverage, ...]
    feasible: int
    trained: int
    queued_off_grid: int
    """Trained shapes outside the candidates: they came from the queue."""
    wall_s: float
    """From the first start to the last end."""
    busy_s: float
    """Sum over trials."""
    machines: tuple[str, ...]
    """Host: device, n trials."""


def read(evidence: Evidence, space: SearchSpace) -> Search:
    """Describe the search.

    Args:
        space: the study's own.
    """
    found = evidence.records
    trained = {record.config.shape for record in found}
    feasible = set(space.shapes)
    starts, ends = zip(*((_time(r.started), _time(r.finished)) for r in found), strict=True)
    hosts = Counter(f"{record.host or 'unknown host'}: {record.device}" for record in found)
    return Search(
        outcomes=_outcomes(found),
        finished=len(found),
        wanted=evidence.spec.study.n_trials,
        repeated_configs=_repeated(found),
        repeated_shapes=_repeated_shapes(found),
        coverage=_coverage(feasible, trained),
        feasible=len(feasible),
        trained=len(feasible & trained),
        queued_off_grid=len(trained - feasible),
        wall_s=(max(ends) - min(starts)).total_seconds(),
        busy_s=sum(record.wall_s for record in found),
        machines=tuple(f"{place}, {n} trials" for place, n in hosts.most_common()),
    )


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


def _outcomes(found: tuple[TrialRecord, ...]) -> tuple[OutcomeRow, ...]:
    rows = []
    for outcome, n in Counter(record.outcome for record in found).most_common():
        members = [record for record in found if record.outcome == outcome]
        times = [record.wall_s for record in members]
        rows.append(
            OutcomeRow(
                outcome=outcome.replace("_", " "),
                n=n,
                succeeded=outcome in records.SUCCESSES,
                mean_s=float(np.mean(times)),
                total_s=float(np.sum(times)),
                compile_s=float(np.mean([record.compile_s for record in members])),
                detail=members[-1].detail,
            )
        )
    return tuple(rows)


def _repeated(found: tuple[TrialRecord, ...]) -> tuple[tuple[int, ...], ...]:
    groups: dict[str, list[int]] = {}
    for record in found:
        groups.setdefault(sampler.identity(record.config), []).append(record.trial_number)
    return tuple(tuple(numbers) for numbers in groups.values() if len(numbers) > 1)


def _repeated_shapes(found: tuple[TrialRecord, ...]) -> tuple[tuple[Shape, tuple[int, ...]], ...]:
    groups: dict[Shape, list[int]] = {}
    for record in found:
        groups.setdefault(record.config.shape, []).append(record.trial_number)
    several = [(shape, tuple(numbers)) for shape, numbers in groups.items() if len(numbers) > 1]
    return tuple(sorted(several, key=lambda pair: -len(pair[1])))


def _coverage(feasible: set[Shape], trained: set[Shape]) -> tuple[Coverage, ...]:
    rows = []
    for width in sorted({shape.d_model for shape in feasible}):
        here = [shape for shape in feasible if shape.d_model == width]
        seen = [shape for shape in here if shape in trained]
        buckets = {depth_bucket(shape.n_layers) for shape in here} - {depth_bucket(shape.n_layers) for shape in seen}
        rows.append(
            Coverage(
                d_model=width,
                feasible=len(here),
                trained=len(seen),
                depths=_span([shape.n_layers for shape in here]),
                trained_depths=_span([shape.n_layers for shape in seen]),
                unseen=", ".join(DEPTHS[i][1] for i in sorted(buckets)) or "–",
            )
        )
    return tuple(rows)


def _span(values: list[int]) -> str:
    if not values:
        return "–"
    return f"{min(values)} … {max(values)}" if min(values) < max(values) else str(min(values))
