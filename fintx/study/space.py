"""What does the sampler see? Two or three ordered coordinates of shape, and the searched values; and back.

The budget is solved, not searched: a shape is the feasible one nearest to the coordinates (log2 d_model / n_layers,
log2 d_ff / d_model, log2 n_heads), so every proposal has a size inside the tolerance. The config trained is a pure
function of a trial's parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from fintx.config import Choices, FloatRange, ModelConfig, OptimConfig, Shape, StudySpec, TrainConfig, TrialConfig
from fintx.model import sizes
from fintx.sweepchecks import SECTIONS, field_kind
from fintx.types import Floats

AXES = ("shape.aspect", "shape.d_ff_ratio", "shape.heads")
_NUDGE = 1e-6
"""Shapes of equal coordinates are told apart by this much on the aspect axis, in the order of the feasible set."""


@dataclass(frozen=True)
class SearchSpace:
    """The feasible shapes of a study and their coordinates, and the distributions of everything searched."""

    spec: StudySpec
    shapes: tuple[Shape, ...]
    """The feasible set, queued shapes included."""
    coordinates: Floats
    """(n_shapes, 3) float64, in the order of `AXES`."""
    distributions: dict[str, BaseDistribution]
    """Name → distribution, for `study.ask`; a shape axis with one value is left out."""

    @staticmethod
    def build(spec: StudySpec, *, n_features: int) -> SearchSpace:
        """Solve the budget and lay out the space.

        Raises:
            InfeasibleBudget: no shape fits.
        """
        queued = [entry.shape for entry in spec.queue]
        shapes = sizes.feasible(spec.architecture, spec.budget, model_variants(spec), n_features, queued)
        coordinates = _coordinates(shapes)
        distributions: dict[str, BaseDistribution] = {}
        for axis, name in enumerate(AXES):
            low, high = float(coordinates[:, axis].min()), float(coordinates[:, axis].max())
            if high > low:
                distributions[name] = FloatDistribution(low, high)
        for path, searched in spec.space.items():
            distributions[path] = _distribution(spec, path, searched)
        return SearchSpace(spec, shapes, coordinates, distributions)

    def encode(self, shape: Shape) -> dict[str, float]:
        """Coordinates of a feasible shape; `decode` gives that very shape back."""
        found = self.coordinates[self.shapes.index(shape)]
        return {name: float(found[axis]) for axis, name in enumerate(AXES) if name in self.distributions}

    def decode(self, params: Mapping[str, Any]) -> Shape:
        """The feasible shape nearest to the coordinates, each axis measured by its range; the first of equally near."""
        distance = np.zeros(len(self.shapes))
        for axis, name in enumerate(AXES):
            if name in self.distributions:
                column = self.coordinates[:, axis]
                distance += np.square((column - params[name]) / (column.max() - column.min()))
        return self.shapes[int(np.argmin(distance))]

    def trial_config(self, spec: StudySpec, params: Mapping[str, Any], *, seed: int) -> TrialConfig:
        """The config of a trial, from the sampler's parameters alone.

        Args:
            spec: with its data resolved.
            params: every name of `distributions`.
        """
        tree: dict[str, dict[str, Any]] = {name: getattr(spec, name).model_dump() for name in SECTIONS}
        for path in spec.space:
            section, _, key = path.partition(".")
            tree[section][key] = params[path]
        return TrialConfig(
            data=spec.data,
            task=spec.task,
            split=spec.split,
            shape=self.decode(params),
            model=ModelConfig(**tree["model"]),
            optim=OptimConfig(**tree["optim"]),
            train=TrainConfig(**tree["train"]),
            seed=seed,
        )


def model_variants(spec: StudySpec) -> tuple[ModelConfig, ...]:
    """Every geometry that the search may combine with a shape: each changes the parameter count a little."""
    keys = [k for k in ("context_length", "patch_length", "stride", "revin") if f"model.{k}" in spec.space]
    lists = [spec.space[f"model.{key}"].choices for key in keys]  # type: ignore[union-attr]
    return tuple(
        spec.model.model_copy(update=dict(zip(keys, values, strict=True))) for values in itertools.product(*lists)
    )


def _coordinates(shapes: tuple[Shape, ...]) -> Floats:
    found = np.array(
        [
            (math.log2(s.d_model / s.n_layers), math.log2(s.d_ff / s.d_model), math.log2(s.n_heads))
            for s in shapes
        ]
    )  # fmt: skip
    seen: dict[tuple[float, ...], int] = {}
    for index, row in enumerate(map(tuple, found)):
        found[index, 0] += _NUDGE * seen.get(row, 0)
        seen[row] = seen.get(row, 0) + 1
    return found


def _distribution(spec: StudySpec, path: str, searched: FloatRange | Choices) -> BaseDistribution:
    if isinstance(searched, Choices):
        return CategoricalDistribution(searched.choices)
    section, _, key = path.partition(".")
    if field_kind(type(getattr(spec, section)), key) == "int":
        return IntDistribution(int(searched.low), int(searched.high), log=searched.log)
    return FloatDistribution(searched.low, searched.high, log=searched.log)
