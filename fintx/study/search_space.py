"""Search space: what the sampler sees, a few ordered coordinates of shape and the searched values; and back.

The budget is solved, not searched: a shape is the feasible one nearest to its family's coordinates (for the encoder
log2 d_model / n_layers, log2 d_ff / d_model, log2 n_heads), so every proposal has a size inside the tolerance. The
config trained is a pure function of a trial's parameters and its shape.

The space is the study's definition and nothing else, so it is the same for all of a study's life: what the queue adds
moves no bound and gives no older trial's coordinates another meaning. A queued shape off the candidates' grid keeps
its own numbers; the sampler sees it where it lies, or at the nearest bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from fintx.config.schema import (
    Choices,
    FloatRange,
    ModelConfig,
    OptimConfig,
    Shape,
    StudySpec,
    TrainConfig,
    TrialConfig,
)
from fintx.config.validate import SECTIONS, field_kind
from fintx.model import family, param_count
from fintx.model.family import Family
from fintx.types import Floats

_NUDGE = 1e-6
"""Shapes of equal coordinates are told apart by this much on the first axis, in the order of the feasible set."""


@dataclass(frozen=True)
class SearchSpace:
    """The feasible shapes of a study and their coordinates, and the distributions of everything searched."""

    spec: StudySpec
    shapes: tuple[Shape, ...]
    """The candidates inside the budget."""
    coordinates: Floats
    """(n_shapes, n_axes) float64, in the order of `axes`."""
    distributions: dict[str, BaseDistribution]
    """Name → distribution, for `study.ask`; a shape axis with one value is left out."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of a shape's coordinates."""
        return tuple(family.of(self.spec.model).coordinates)

    @staticmethod
    def build(spec: StudySpec, *, n_features: int) -> SearchSpace:
        """Solve the budget and lay out the space.

        Raises:
            InfeasibleBudget: no candidate fits.
        """
        shapes = param_count.feasible_shapes(spec.architecture, spec.budget, model_variants(spec), n_features)
        kind = family.of(spec.model)
        coordinates = _coordinates(kind, shapes)
        distributions: dict[str, BaseDistribution] = {}
        for axis, name in enumerate(kind.coordinates):
            low, high = float(coordinates[:, axis].min()), float(coordinates[:, axis].max())
            if high > low:
                distributions[name] = FloatDistribution(low, high)
        for path, searched in spec.space.items():
            distributions[path] = _distribution(spec, path, searched)
        return SearchSpace(spec, shapes, coordinates, distributions)

    def encode(self, shape: Shape) -> dict[str, float]:
        """Coordinates of a shape. Of a candidate: `decode` gives it back; of another one: clamped to the bounds."""
        kind, known = family.of(self.spec.model), shape in self.shapes
        position = self.coordinates[self.shapes.index(shape)] if known else np.array(_position(kind, shape))
        return {
            name: clamped(self.distributions[name], float(position[axis]))
            for axis, name in enumerate(self.axes)
            if name in self.distributions
        }

    def decode(self, params: Mapping[str, Any]) -> Shape:
        """The candidate nearest to the coordinates, each axis measured by its range; the first of equally near.

        It answers for the sampler's proposals. A queued trial's shape stands beside its parameters in the storage.
        """
        distance = np.zeros(len(self.shapes))
        for axis, name in enumerate(self.axes):
            if name in self.distributions:
                column = self.coordinates[:, axis]
                distance += np.square((column - params[name]) / (column.max() - column.min()))
        return self.shapes[int(np.argmin(distance))]

    def trial_config(self, spec: StudySpec, params: Mapping[str, Any], shape: Shape, *, seed: int) -> TrialConfig:
        """The config of a trial.

        Args:
            spec: with its data resolved.
            params: every searched path; the shape's coordinates are not looked at.
        """
        tree: dict[str, dict[str, Any]] = {name: getattr(spec, name).model_dump() for name in SECTIONS}
        for path in spec.space:
            section, _, key = path.partition(".")
            tree[section][key] = params[path]
        return TrialConfig(
            data=spec.data,
            task=spec.task,
            split=spec.split,
            shape=shape,
            model=ModelConfig(**tree["model"]),
            optim=OptimConfig(**tree["optim"]),
            train=TrainConfig(**tree["train"]),
            seed=seed,
        )


def model_variants(spec: StudySpec, fixed: Mapping[str, Any] = MappingProxyType({})) -> tuple[ModelConfig, ...]:
    """Every geometry that the search may combine with a shape: each changes the parameter count a little.

    Args:
        fixed: searched path → the one value of it that is wanted.
    """
    keys = [k for k in ("context_length", "patch_length", "stride", "revin") if f"model.{k}" in spec.space]
    lists = []
    for path in (f"model.{key}" for key in keys):
        choices = spec.space[path].choices  # type: ignore[union-attr]
        lists.append([choice for choice in choices if choice == fixed.get(path, choice)])
    return tuple(
        spec.model.model_copy(update=dict(zip(keys, values, strict=True))) for values in itertools.product(*lists)
    )


def clamped(distribution: BaseDistribution, value: float) -> Any:
    """The value of a range that is nearest to the given one, in the range's own type."""
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    inside = min(max(value, distribution.low), distribution.high)
    return int(inside) if isinstance(distribution, IntDistribution) else float(inside)


def _position(kind: Family, shape: Shape) -> list[float]:
    """Where a shape lies on its family's coordinates."""
    return [coordinate(shape) for coordinate in kind.coordinates.values()]


def _coordinates(kind: Family, shapes: tuple[Shape, ...]) -> Floats:
    positions = np.array([_position(kind, shape) for shape in shapes])
    seen: dict[tuple[float, ...], int] = {}
    for index, row in enumerate(map(tuple, positions)):
        positions[index, 0] += _NUDGE * seen.get(row, 0)
        seen[row] = seen.get(row, 0) + 1
    return positions


def _distribution(spec: StudySpec, path: str, searched: FloatRange | Choices) -> BaseDistribution:
    if isinstance(searched, Choices):
        return CategoricalDistribution(searched.choices)
    section, _, key = path.partition(".")
    if field_kind(type(getattr(spec, section)), key) == "int":
        return IntDistribution(int(searched.low), int(searched.high), log=searched.log)
    return FloatDistribution(searched.low, searched.high, log=searched.log)
