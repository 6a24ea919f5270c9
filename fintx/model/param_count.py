"""Model sizes: exact parameter counts, FLOPs, and the shapes that fit a budget. Nothing is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fintx.config.schema import BudgetConfig, ModelConfig, Shape
from fintx.errors import FintxError
from fintx.model import family


class InfeasibleBudget(FintxError):
    """No candidate shape lies inside the budget's tolerance."""


@dataclass(frozen=True)
class ParamCount:
    """Parameters per part; `total` is their sum."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per sample: matmuls alone, a multiply-add is 2; backward is twice the forward.

    Rematerialisation isn't counted: this is the model's work, as MFU (model FLOPs utilisation) takes it.
    """

    forward: float

    @property
    def backward(self) -> float:
        """Gradients by weights and by inputs: two matmuls for each one of the forward pass."""
        return 2 * self.forward


def count_params(model: ModelConfig, shape: Shape, n_features: int) -> ParamCount:
    """Exact parameter count by part."""
    return ParamCount(family.of(model).param_count(model, shape, n_features))


def flops(model: ModelConfig, shape: Shape, n_features: int) -> Flops:
    """FLOPs of one sample."""
    return Flops(forward=family.of(model).flops(model, shape, n_features))


def state_bytes(model: ModelConfig, shape: Shape, n_features: int) -> int:
    """Training state: float32 parameters, gradients and AdamW's two moments, 16 bytes per parameter."""
    return 16 * count_params(model, shape, n_features).total


def feasible_shapes(
    architecture: Any, budget: BudgetConfig, models: Sequence[ModelConfig], n_features: int
) -> tuple[Shape, ...]:
    """Every candidate shape inside the budget's tolerance, in the family's order.

    Args:
        architecture: the candidates, as the family's [architecture] holds them.
        models: the variants, of one family, that a search may combine with a shape (a searched context_length changes
            the count a little). A shape must fit with each of them.

    Raises:
        InfeasibleBudget: none fits; says which bound to change.
    """
    kind = family.of(models[0])
    shapes = kind.feasible(architecture, budget, models, n_features)
    if not shapes:
        where = f"no candidate shape holds {budget.low:,} … {budget.high:,} parameters (the budget ± its tolerance)"
        raise InfeasibleBudget(f"{where}: {kind.why_infeasible(architecture, budget, models, n_features)}")
    return shapes
