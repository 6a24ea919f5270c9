"""How big is a shape, and which shapes fit a budget? Exact counts from abstract shapes; nothing is allocated."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from fintx.config import ArchitectureConfig, BudgetConfig, ModelConfig, Shape
from fintx.model import transformer
from fintx.types import FintxError, Params


class InfeasibleBudget(FintxError):
    """No candidate shape lies inside the budget's tolerance."""


@dataclass(frozen=True)
class Count:
    """Parameters per part; `total` is their sum."""

    embedding: int
    """Patch embedding, and RevIN's scales and shifts."""
    positions: int
    blocks: int
    head: int
    """Final norm and head."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.positions + self.blocks + self.head


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per sample: matmuls alone, a multiply-add is 2; backward is twice the forward.

    What is done again to save memory (rematerialisation) is not counted: this is the model's work, as MFU wants it.
    """

    forward: float

    @property
    def backward(self) -> float:
        """Gradients by weights and by inputs: two matmuls for each one of the forward pass."""
        return 2 * self.forward


_PARTS = {
    "embedding": ("revin", "embedding"),
    "positions": ("positions",),
    "blocks": ("blocks",),
    "head": ("norm", "head"),
}


def count(model: ModelConfig, shape: Shape, n_features: int) -> Count:
    """Exact parameter count, from JAX's abstract evaluation of the model."""
    d, d_ff = shape.d_model, shape.d_ff
    parts = {part: polynomial(d, d_ff) for part, polynomial in _polynomials(_geometry(model), n_features).items()}
    return Count(**{**parts, "blocks": parts["blocks"] * shape.n_layers})


@dataclass(frozen=True)
class _Polynomial:
    """n(d, f) = a + b·d + c·d² + e·f + g·d·f: every axis of a parameter is a multiple of d_model or of d_ff, or fixed.

    So five abstract evaluations fix a part's count for every shape, exactly, and counting a shape costs nothing. A
    sixth, unlike the others, catches a model that has outgrown this form.
    """

    a: int
    b: int
    c: int
    e: int
    g: int

    def __call__(self, d: int, f: int) -> int:
        return self.a + self.b * d + self.c * d * d + self.e * f + self.g * d * f


_POINTS = ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2))
_PROBE = (7, 5)


@functools.lru_cache(maxsize=64)
def _polynomials(model: ModelConfig, n_features: int) -> dict[str, _Polynomial]:
    """Each part's count; that of the blocks for one layer."""
    counts = {point: _counted(model, *point, n_features) for point in _POINTS}
    found = {}
    for part in _PARTS:
        n11, n21, n31, n12, n22 = (counts[point][part] for point in _POINTS)
        g = n22 - n21 - n12 + n11
        c = (n31 - 2 * n21 + n11) // 2
        e = n12 - n11 - g
        b = n21 - n11 - 3 * c - g
        found[part] = _Polynomial(n11 - b - c - e - g, b, c, e, g)
    probe = _counted(model, *_PROBE, n_features)
    assert probe == {part: polynomial(*_PROBE) for part, polynomial in found.items()}, "not a + bd + cd² + ef + gdf"
    return found


def _counted(model: ModelConfig, d_model: int, d_ff: int, n_features: int) -> dict[str, int]:
    one = Shape(d_model=d_model, n_layers=1, n_heads=1, d_ff=d_ff)
    params = transformer.abstract_params(model, one, n_features)
    assert params.keys() <= {name for names in _PARTS.values() for name in names}
    return {
        part: sum(_leaf_sizes({name: params[name] for name in names if name in params}))
        for part, names in _PARTS.items()
    }


def _geometry(model: ModelConfig) -> ModelConfig:
    """The model without what no parameter depends on, so that equal counts are counted once."""
    return model.model_copy(update={"dropout": 0.0, "compute_dtype": "float32"})


def _leaf_sizes(tree: Params) -> list[int]:
    return [math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)]


def flops(model: ModelConfig, shape: Shape, n_features: int) -> Flops:
    """FLOPs of one sample's forward pass: embedding, L × (qkv, scores, mix, out, feed-forward), head."""
    n, d, d_ff = transformer.n_patches(model), shape.d_model, shape.d_ff
    embedding = n * model.patch_length * n_features * d
    block = n * (4 * d * d + 2 * d * d_ff) + 2 * n * n * d
    return Flops(forward=2.0 * (embedding + shape.n_layers * block + n * d))


def state_bytes(model: ModelConfig, shape: Shape, n_features: int) -> int:
    """Training state: float32 parameters, gradients and AdamW's two moments, 16 bytes per parameter."""
    return 16 * count(model, shape, n_features).total


def activation_bytes(model: ModelConfig, shape: Shape, *, windows: int, remat: bool = False, parts: int = 1) -> int:
    """Roughly what a pass forward and back holds beside parameters and gradients.

    Kept per layer and token: the residual stream (float32), and unless layers are computed again the stream between its
    halves, qkv and the inner products (3d + d_ff, in the compute dtype); the block at work holds about twice all that
    again, and its attention weights three times over.

    Args:
        windows: in the pass.
        remat: layers are computed again, each from its input.
        parts: devices that share out heads and d_ff.
    """
    n, width = transformer.n_patches(model), 2 if model.compute_dtype == "bfloat16" else 4
    tokens = windows * n
    stream = tokens * 4 * shape.d_model
    whole = 2 * stream + tokens * width * (3 * shape.d_model + shape.d_ff) // parts
    weights = 3 * windows * shape.n_heads // parts * n * n * 4
    return shape.n_layers * (stream if remat else whole) + 2 * whole + weights


def head_counts(d_model: int) -> tuple[int, ...]:
    """Every valid n_heads: the divisors of d_model."""
    return tuple(heads for heads in range(1, d_model + 1) if d_model % heads == 0)


def depths_for(
    budget: BudgetConfig, models: Sequence[ModelConfig], n_features: int, *, d_model: int, d_ff: int
) -> range:
    """The depths, from 1 up, at which a width fits the budget with every model variant; maybe none.

    A count is linear in depth, so they are an interval. Heads don't matter.
    """
    low, high = 1, budget.high
    for model in models:
        one = count(model, Shape(d_model=d_model, n_layers=1, n_heads=1, d_ff=d_ff), n_features)
        rest = one.total - one.blocks
        low = max(low, -((rest - budget.low) // one.blocks))
        high = min(high, (budget.high - rest) // one.blocks)
    return range(low, max(low, high + 1))


def feasible(
    architecture: ArchitectureConfig,
    budget: BudgetConfig,
    models: Sequence[ModelConfig],
    n_features: int,
) -> tuple[Shape, ...]:
    """Every candidate shape inside the budget's tolerance, sorted by (d_model, d_ff, n_layers, n_heads).

    Args:
        models: the variants that a search may combine with a shape (a searched context_length changes the count a
            little); a shape must fit with each of them.

    Raises:
        InfeasibleBudget: none fits; says which bound to change.
    """
    found: set[tuple[int, int, int, int]] = set()
    for d_model, d_ff in _widths(architecture):
        fitting = depths_for(budget, models, n_features, d_model=d_model, d_ff=d_ff)
        low, high = max(fitting.start, architecture.n_layers.low), min(fitting.stop, architecture.n_layers.high + 1)
        heads = [n_heads for n_heads in architecture.n_heads if d_model % n_heads == 0]
        found.update((d_model, d_ff, n_layers, n_heads) for n_layers in range(low, high) for n_heads in heads)
    if not found:
        raise InfeasibleBudget(_why_infeasible(architecture, budget, models, n_features))
    # `model_construct`: what pydantic would check of each holds by construction.
    return tuple(
        Shape.model_construct(d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_ff=d_ff)
        for d_model, d_ff, n_layers, n_heads in sorted(found)
    )


def _widths(architecture: ArchitectureConfig) -> list[tuple[int, int]]:
    """(d_model, d_ff) of all candidates; a ratio that rounds to no feed-forward at all makes none."""
    pairs = [(d_model, round(ratio * d_model)) for d_model in architecture.d_model for ratio in architecture.d_ff_ratio]
    return [(d_model, d_ff) for d_model, d_ff in pairs if d_ff >= 1]


def _why_infeasible(
    architecture: ArchitectureConfig, budget: BudgetConfig, models: Sequence[ModelConfig], n_features: int
) -> str:
    """One line: how far off the candidates are, and the bound that would mend it."""
    where = f"no candidate shape holds {budget.low:,} … {budget.high:,} parameters (budget.parameters ± tolerance)"
    widths = [(d, f) for d, f in _widths(architecture) if any(d % heads == 0 for heads in architecture.n_heads)]
    if not widths:
        return f"{where}: no architecture.n_heads divides an architecture.d_model; add 1 or 2 to n_heads"
    ends = [
        [
            count(model, Shape(d_model=d_model, n_layers=n_layers, n_heads=1, d_ff=d_ff), n_features).total
            for model in models
        ]
        for n_layers in (architecture.n_layers.low, architecture.n_layers.high)
        for d_model, d_ff in widths
    ]
    smallest, largest = min(max(totals) for totals in ends), max(min(totals) for totals in ends)
    if smallest > budget.high:
        mend = "lower architecture.d_model or n_layers.low, or raise budget.parameters"
        return f"{where}: the smallest candidate holds {smallest:,}; {mend}"
    if largest < budget.low:
        mend = "raise architecture.n_layers.high or d_model, or lower budget.parameters"
        return f"{where}: the largest candidate holds {largest:,}; {mend}"
    variants = f" with each of the {len(models)} searched model variants" if len(models) > 1 else ""
    mend = "add d_model values or raise budget.tolerance"
    return f"{where}: candidates hold {smallest:,} … {largest:,} but none lies inside{variants}; {mend}"
