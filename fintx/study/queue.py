"""Which shapes does the user want run first? Their identities, their check against the budget, their coordinates."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fintx.config import QueueEntry, StudySpec
from fintx.model import sizes
from fintx.study.space import SearchSpace, model_variants
from fintx.types import FintxError


class QueueError(FintxError):
    """Queue entries that the study can't run, one line each."""


def identity(entry: QueueEntry) -> str:
    """An entry's identity is its content: shape and values, however written (1 and 1.0 are the same), not its note."""
    values = {
        path: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for path, value in entry.values.items()
    }
    text = json.dumps([*entry.shape.model_dump().values(), values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def validate(spec: StudySpec, *, n_features: int) -> None:
    """Check the entries as a whole before anything runs.

    Raises:
        QueueError: every entry outside the budget, and every repeated one.
    """
    problems = []
    seen: dict[str, int] = {}
    for index, entry in enumerate(spec.queue):
        shape, budget = entry.shape, spec.budget
        for model in model_variants(spec):
            total = sizes.count(model, shape, n_features).total
            if not budget.low <= total <= budget.high:
                problems.append(
                    f"queue[{index}]: d_model {shape.d_model}, n_layers {shape.n_layers}, n_heads {shape.n_heads}, "
                    f"d_ff {shape.d_ff} holds {total:,} parameters, outside the budget {budget.low:,} … "
                    f"{budget.high:,}; change the shape, budget.parameters or budget.tolerance"
                )
                break
        first = seen.setdefault(identity(entry), index)
        if first != index:
            problems.append(f"queue[{index}]: is the same as queue[{first}]; take one out")
    if problems:
        raise QueueError("\n".join(problems))


def params_for(entry: QueueEntry, space: SearchSpace) -> dict[str, Any]:
    """What the sampler is told of an entry: its shape's coordinates and its values; the rest it samples itself."""
    values = {}
    for path, value in entry.values.items():
        # In the distribution's own type: the very choice, so that 1.0 for 1 is no other category; 4 for 4.0.
        distribution = space.distributions[path]
        values[path] = distribution.to_external_repr(distribution.to_internal_repr(value))
    return {**space.encode(entry.shape), **values}
