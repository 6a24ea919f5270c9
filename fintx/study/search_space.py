"""Search space: what the sampler sees of a trial, a config from what it proposes, proposals, and seeds.

The budget is solved, not searched: a shape is the feasible one nearest to its family's coordinates (for the encoder
log2 d_model / n_layers, log2 d_ff / d_model, log2 n_heads), so every proposal has a size inside the tolerance. The
config trained is a pure function of a trial's parameters and its shape.

The space is the study's definition and nothing else, so it stays the same for the study's whole life: the queue moves
no bound and gives no older trial's coordinates another meaning. A queued shape off the candidates' grid keeps its own
numbers; the sampler sees it at its true coordinates, or at the nearest bound.

The sampler works on a copy of the study in memory: a proposal that is refused, because its config was trained already,
leaves no trace. It is made anew for each trial, seeded by the trial's number: a stopped study proposes what an
uninterrupted one would have, instead of replaying its first samples. Running trials count as bad ones (constant liar),
so that workers don't crowd together.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fintx.config.schema import (
    Choices,
    ModelConfig,
    OptimConfig,
    Shape,
    StudySpec,
    TrainConfig,
    TrialConfig,
    config_hash,
)
from fintx.config.validate import SECTIONS, Where, field_kind, spelled
from fintx.errors import FintxError
from fintx.evaluate import metrics
from fintx.model import family, param_count
from fintx.types import Floats

_NUDGE = 1e-6
"""Shapes of equal coordinates are moved apart by this much on the first axis, in the order of the feasible set."""
_TRIES = 20
"""Proposals of a sampler before a finite space is walked through instead."""
_ENUMERABLE = 200_000


class SpaceExhausted(FintxError):
    """Every config of a finite space has been trained, or is being trained."""


@dataclass(frozen=True)
class SearchSpace:
    """The feasible shapes of a study and their coordinates, and the distributions of everything searched."""

    spec: StudySpec
    """With its data resolved."""
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
    def build(spec: StudySpec, *, n_features: int, where: Where = spelled) -> SearchSpace:
        """Solve the budget and build the space.

        Args:
            where: where a key of the file is, for messages.

        Raises:
            InfeasibleBudget: no candidate fits.
        """
        try:
            shapes = param_count.feasible_shapes(spec.architecture, spec.budget, model_variants(spec), n_features)
        except param_count.InfeasibleBudget as error:
            raise param_count.InfeasibleBudget(f"{where(('budget', 'parameters'))}: {error}") from None
        axes = family.of(spec.model).coordinates
        coordinates = np.array([[coordinate(shape) for coordinate in axes.values()] for shape in shapes])
        counts: dict[tuple[float, ...], int] = {}
        for index, position in enumerate(map(tuple, coordinates)):
            coordinates[index, 0] += _NUDGE * counts.get(position, 0)
            counts[position] = counts.get(position, 0) + 1
        distributions: dict[str, BaseDistribution] = {}
        for name, low, high in zip(
            axes, coordinates.min(axis=0).tolist(), coordinates.max(axis=0).tolist(), strict=True
        ):
            if high > low:
                distributions[name] = FloatDistribution(low, high)
        for path, searched in spec.space.items():
            if isinstance(searched, Choices):
                distributions[path] = CategoricalDistribution(searched.choices)
            elif field_kind(path) == "int":
                distributions[path] = IntDistribution(int(searched.low), int(searched.high), log=searched.log)
            else:
                distributions[path] = FloatDistribution(searched.low, searched.high, log=searched.log)
        return SearchSpace(spec, shapes, coordinates, distributions)

    def encode(self, shape: Shape) -> dict[str, float]:
        """Coordinates of a shape. Of a candidate: `decode` gives it back; of another one: clamped to the bounds."""
        if shape in self.shapes:
            position = self.coordinates[self.shapes.index(shape)].tolist()
        else:
            position = [float(coordinate(shape)) for coordinate in family.of(self.spec.model).coordinates.values()]
        return {
            name: clamped(self.distributions[name], value)
            for name, value in zip(self.axes, position, strict=True)
            if name in self.distributions
        }

    def decode(self, params: Mapping[str, Any]) -> Shape:
        """The candidate nearest to the coordinates, each axis measured by its range; the first of equally near.

        For the sampler's proposals alone: the storage keeps a queued trial's shape beside its parameters.
        """
        distance = np.zeros(len(self.shapes))
        for axis, name in enumerate(self.axes):
            if name in self.distributions:
                column = self.coordinates[:, axis]
                distance += np.square((column - params[name]) / (column.max() - column.min()))
        return self.shapes[int(np.argmin(distance))]

    def trial_config(self, params: Mapping[str, Any], shape: Shape, *, seed: int) -> TrialConfig:
        """The config of a trial.

        Args:
            params: every searched path; the shape's coordinates are not looked at.
        """
        spec = self.spec
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

    def points(self, fixed: Mapping[str, Any], shape: Shape | None) -> Sequence[dict[str, Any]] | None:
        """Parameters of every point of a finite space; none where it is infinite, or too large to be walked through.

        Args:
            fixed, shape: as for `propose`.
        """
        axes = set(self.axes)
        free: dict[str, Sequence[Any]] = {}
        for name, distribution in self.distributions.items():
            if name in axes or name in fixed:
                continue
            if isinstance(distribution, CategoricalDistribution):
                free[name] = distribution.choices
            elif isinstance(distribution, IntDistribution):
                free[name] = range(distribution.low, distribution.high + 1, distribution.step)
            else:
                return None
        positions: Sequence[Mapping[str, Any]] = [fixed] if shape else list(map(self.encode, self.shapes))
        if len(positions) * np.prod([len(values) for values in free.values()], dtype=float) > _ENUMERABLE:
            return None
        combinations = [dict(zip(free, values, strict=True)) for values in itertools.product(*free.values())]
        return [{**fixed, **position, **rest} for position, rest in itertools.product(positions, combinations)]


def model_variants(spec: StudySpec, fixed: Mapping[str, Any] = MappingProxyType({})) -> tuple[ModelConfig, ...]:
    """Every geometry that the search may combine with a shape: each changes the parameter count a little.

    Args:
        fixed: searched path → its only value.
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


# --- proposals --------------------------------------------------------------------------------------------------------


def trial_identity(config: TrialConfig) -> str:
    """Hash of a config apart from its seed: two trials of one identity would answer the same question."""
    return config_hash(config.model_copy(update={"seed": 0}))


def propose(
    spec: StudySpec,
    space: SearchSpace,
    trials: Sequence[FrozenTrial],
    *,
    number: int,
    fixed: Mapping[str, Any],
    shape: Shape | None,
    trained: Container[str],
) -> dict[str, Any]:
    """Parameters of the number-th trial.

    Args:
        trials: of the study so far, in whatever state.
        fixed: parameters that a queue entry has settled.
        shape: the entry's; none: the parameters' own.
        trained: identities of configs that must not come again.

    Raises:
        SpaceExhausted: there is no other config.
    """
    seed = derive_seed(spec.study.seed, SAMPLER, number)
    direction = StudyDirection.MINIMIZE if metrics.MINIMIZE[spec.study.metric] else StudyDirection.MAXIMIZE
    counted = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.RUNNING)]

    def ask(attempt: int) -> dict[str, Any]:
        sampler = optuna.samplers.TPESampler(
            seed=seed if attempt == 0 else derive_seed(seed, SAMPLER, attempt),
            n_startup_trials=spec.study.n_startup_trials,
        )
        copy = optuna.create_study(sampler=sampler, direction=direction)
        copy.add_trials(counted)
        if fixed:
            copy.enqueue_trial(dict(fixed))
        return dict(copy.ask(space.distributions).params)

    def is_new(params: Mapping[str, Any]) -> bool:
        config = space.trial_config(params, shape or space.decode(params), seed=0)
        return trial_identity(config) not in trained

    for attempt in itertools.count():
        if is_new(params := ask(attempt)):
            return params
        if attempt == _TRIES and (points := space.points(fixed, shape)) is not None:
            break
    remaining = [params for params in points or () if is_new(params)]
    if not remaining:
        raise SpaceExhausted(
            f"{spec.study.name}: every config of its space is trained already, before study.n_trials = "
            f"{spec.study.n_trials}; lower n_trials, or widen [space] or [architecture] in a study of another name"
        )
    return remaining[seed % len(remaining)]


# --- seeds ------------------------------------------------------------------------------------------------------------

SAMPLER, TRIAL, CONFIRM, REPLICATE = 0, 1, 2, 3
"""Streams: of a study's seed, the sampler's, the trials' and the confirmation's; of a trial's seed, its replicates'."""


def derive_seed(seed: int, stream: int, number: int) -> int:
    """The number-th seed of one of a seed's streams: 31 bits, spread by NumPy's SeedSequence."""
    return int(np.random.SeedSequence([seed, stream, number]).generate_state(1)[0] >> 1)


def replicate_seed(trial_seed: int, replicate: int) -> int:
    """The seed of a trial's replicate; the first is the trial's own."""
    return trial_seed if replicate == 0 else derive_seed(trial_seed, REPLICATE, replicate)
