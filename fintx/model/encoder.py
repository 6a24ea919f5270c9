"""Encoder: a PatchTST-like transformer (Nie et al. 2023, https://arxiv.org/abs/2211.14730) as pure functions.

    window (T, F) → [RevIN] → patches (N, P·F) → linear + learned positions → L pre-norm blocks → norm → linear → logit

Unlike PatchTST the features of a patch are embedded together: one series' channels are the inputs of one decision.
Flax NNX declares the parameters; every transform is plain JAX over a nested dict of arrays. Blocks are stacked on a
leading axis L at init and applied by one `lax.scan` (`blocks`), so compile time does not grow with depth.

`compute_dtype` is that of the matmuls' operands and of what the backward pass keeps of them. All else is float32, the
residual stream too: at 192 layers a bfloat16 stream puts logits off by 4 % of their SD, a float32 one by .4 %.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from fintx.config.schema import ArchitectureConfig, BudgetConfig, ModelConfig, Shape
from fintx.model import blocks
from fintx.model.blocks import dropout as drop
from fintx.types import Params

_POSITION_STD = 0.02
_HEAD_STD = 0.1
"""SD of the logits at init: the first predictions lie near one half, and yet every input already matters."""


def n_patches(model: ModelConfig) -> int:
    """N: patches that fit into a window, counted back from the newest bar."""
    return (model.context_length - model.patch_length) // model.stride + 1


def init(model: ModelConfig, shape: Shape, n_features: int, key: PRNGKeyArray) -> Params:
    """Fresh parameters, float32; the blocks' leaves have a leading axis L."""
    edge_key, block_key = jax.random.split(key)
    edges = nnx.to_pure_dict(nnx.state(EmbeddingAndHead(model, shape, n_features, nnx.Rngs(edge_key))))

    def block(key: PRNGKeyArray) -> Params:
        return nnx.to_pure_dict(nnx.state(_Block(model, shape, nnx.Rngs(key))))

    return {**edges, "blocks": jax.vmap(block)(jax.random.split(block_key, shape.n_layers))}


def abstract_params(model: ModelConfig, shape: Shape, n_features: int) -> Params:
    """The tree of `init` as shapes and dtypes: nothing is allocated, whatever the size."""
    declared = _declare(model, shape, n_features)

    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.n_layers, *leaf.shape), leaf.dtype)

    return {**declared.edge_params, "blocks": jax.tree.map(stack, declared.block_params)}


def apply(
    model: ModelConfig,
    shape: Shape,
    params: Params,
    x_BTF: Float[Array, "B T F"],
    *,
    key: PRNGKeyArray | None = None,
    dropout: Float[Array, ""] | float | None = None,
    remat: bool = False,
    before_layer: blocks.BeforeLayer = lambda hidden_BND, block: (hidden_BND, block),
) -> Float[Array, " B"]:
    """Logits (regression: predictions) of a batch of windows.

    Args:
        params: a tree of `init`; `model` and `shape` are static, everything else may be traced or vmapped.
        x_BTF: scaled features; time runs forward, the last bar is the decision bar.
        key: none for evaluation; else the dropout masks' key.
        dropout: rate; default `model.dropout`. Pass it traced to share one program between rates.
        remat: keep of each layer its input alone for the backward pass, and compute the layer again: least memory, a
            third more work. Values and gradients are the same but for rounding.
        before_layer: called with what each layer works on, also where it is computed again.
    """
    rate = jnp.asarray(model.dropout if dropout is None else dropout, jnp.float32)
    declared = _declare(model, shape, x_BTF.shape[-1])
    edges = nnx.merge(declared.edge_graph, {name: leaf for name, leaf in params.items() if name != "blocks"})
    embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
    hidden_BND = drop(edges.embed(x_BTF), rate, embed_key)
    static = blocks.Static(shape.n_heads, model.compute_dtype, remat, before_layer)

    masks_L4W = None
    if layer_key is not None:
        # Every layer's keys at once, outside the loops: threefry within them would be a loop of its own, each time.
        masks_L4W = jax.vmap(
            lambda layer: jax.random.key_data(jax.random.split(jax.random.fold_in(layer_key, layer), blocks.N_MASKS))
        )(jnp.arange(shape.n_layers))
    return edges.read_out(blocks.run(static, hidden_BND, params["blocks"], masks_L4W, rate))


def patches(model: ModelConfig, x_BTF: Float[Array, "B T F"]) -> Float[Array, "B N PF"]:
    """Overlapping patches, right-aligned: the last ends at the newest bar, a remainder is cut from the oldest side."""
    n, length, stride = n_patches(model), model.patch_length, model.stride
    oldest = model.context_length - (length + (n - 1) * stride)
    index_NP = oldest + stride * jnp.arange(n)[:, None] + jnp.arange(length)[None, :]
    return x_BTF[:, index_NP].reshape(x_BTF.shape[0], n, length * x_BTF.shape[-1])


# --- counts: nothing is allocated -------------------------------------------------------------------------------------

_PARTS = {
    "embedding": ("revin", "embedding"),
    "positions": ("positions",),
    "blocks": ("blocks",),
    "head": ("norm", "head"),
}


def param_count(model: ModelConfig, shape: Shape, n_features: int) -> dict[str, int]:
    """Exact number of parameters by part: embedding (with RevIN), positions, blocks, head (with the final norm)."""
    # Equal counts are counted once: without what no parameter depends on.
    geometry = model.model_copy(update={"dropout": 0.0, "compute_dtype": "float32"})
    terms = _terms(shape.d_model, shape.d_ff)
    counts = {
        part: sum(coefficient * term for coefficient, term in zip(coefficients, terms, strict=True))
        for part, coefficients in _count_coefficients(geometry, n_features).items()
    }
    return {**counts, "blocks": counts["blocks"] * shape.n_layers}


def _terms(d: int, f: int) -> tuple[int, ...]:
    """What a count is linear in: every axis of a parameter is a multiple of d_model or of d_ff, or fixed."""
    return 1, d, d * d, f, d * f


@functools.lru_cache(maxsize=64)
def _count_coefficients(model: ModelConfig, n_features: int) -> dict[str, tuple[int, ...]]:
    """Each part's count in `_terms`, that of the blocks for one layer; exact, by five abstract evaluations.

    So counting another shape costs nothing. A sixth evaluation, unlike the others, catches a model that has outgrown
    this form.
    """

    def count(d_model: int, d_ff: int) -> list[int]:
        params = abstract_params(model, Shape(d_model=d_model, n_layers=1, n_heads=1, d_ff=d_ff), n_features)
        assert params.keys() <= {name for names in _PARTS.values() for name in names}
        leaves = [jax.tree.leaves([params.get(name, {}) for name in names]) for names in _PARTS.values()]
        return [sum(math.prod(leaf.shape) for leaf in part) for part in leaves]

    points = ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2))
    solution = np.linalg.solve([_terms(*point) for point in points], [count(*point) for point in points])
    coefficients = np.rint(solution).astype(int)
    assert count(7, 5) == list(_terms(7, 5) @ coefficients), "a parameter count is not linear in `_terms`"
    return {part: tuple(column) for part, column in zip(_PARTS, coefficients.T.tolist(), strict=True)}


def flops(model: ModelConfig, shape: Shape, n_features: int) -> float:
    """FLOPs of one sample's forward pass: embedding, L × (qkv, scores, mix, out, feed-forward), head."""
    n, d, d_ff = n_patches(model), shape.d_model, shape.d_ff
    embedding = n * model.patch_length * n_features * d
    block = n * (4 * d * d + 2 * d * d_ff) + 2 * n * n * d
    return 2.0 * (embedding + shape.n_layers * block + n * d)


def activation_bytes(model: ModelConfig, shape: Shape, *, windows: int, remat: bool = False, parts: int = 1) -> int:
    """Roughly what a pass forward and back holds beside parameters and gradients.

    Kept per layer and token: the residual stream (float32), and unless layers are computed again the stream between its
    halves, qkv and the inner products (3d + d_ff, in the compute dtype); the block at work holds about twice all that
    again, and its attention weights three times over.

    Args:
        windows: in the pass.
        remat: layers are computed again, each from its input.
        parts: devices that heads and d_ff are cut over.
    """
    n, width = n_patches(model), 2 if model.compute_dtype == "bfloat16" else 4
    tokens = windows * n
    stream = tokens * 4 * shape.d_model
    whole = 2 * stream + tokens * width * (3 * shape.d_model + shape.d_ff) // parts
    weights = 3 * windows * shape.n_heads // parts * n * n * 4
    return shape.n_layers * (stream if remat else whole) + 2 * whole + weights


# --- shapes that fit a budget -----------------------------------------------------------------------------------------


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
        one = param_count(model, Shape(d_model=d_model, n_layers=1, n_heads=1, d_ff=d_ff), n_features)
        block = one.pop("blocks")
        rest = sum(one.values())
        low = max(low, -((rest - budget.low) // block))
        high = min(high, (budget.high - rest) // block)
    return range(low, max(low, high + 1))


def feasible(
    architecture: ArchitectureConfig, budget: BudgetConfig, models: Sequence[ModelConfig], n_features: int
) -> tuple[Shape, ...]:
    """Every candidate inside the budget with each of the models, by (d_model, d_ff, n_layers, n_heads); maybe none."""
    fitting: set[tuple[int, int, int, int]] = set()
    for d_model, d_ff in _widths(architecture):
        depths = depths_for(budget, models, n_features, d_model=d_model, d_ff=d_ff)
        low, high = max(depths.start, architecture.n_layers.low), min(depths.stop, architecture.n_layers.high + 1)
        heads = [n_heads for n_heads in architecture.n_heads if d_model % n_heads == 0]
        fitting.update((d_model, d_ff, n_layers, n_heads) for n_layers in range(low, high) for n_heads in heads)
    # `model_construct`: what pydantic would check of each holds by construction.
    return tuple(
        Shape.model_construct(d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_ff=d_ff)
        for d_model, d_ff, n_layers, n_heads in sorted(fitting)
    )


def _widths(architecture: ArchitectureConfig) -> list[tuple[int, int]]:
    """(d_model, d_ff) of all candidates; a ratio that rounds to no feed-forward at all makes none."""
    pairs = [(d_model, round(ratio * d_model)) for d_model in architecture.d_model for ratio in architecture.d_ff_ratio]
    return [(d_model, d_ff) for d_model, d_ff in pairs if d_ff >= 1]


def why_infeasible(
    architecture: ArchitectureConfig, budget: BudgetConfig, models: Sequence[ModelConfig], n_features: int
) -> str:
    """How far off the candidates are, and the bound that would fix it."""
    widths = [(d, f) for d, f in _widths(architecture) if any(d % heads == 0 for heads in architecture.n_heads)]
    if not widths:
        return "no architecture.n_heads divides an architecture.d_model; add 1 or 2 to n_heads"
    ends = [
        [
            sum(
                param_count(model, Shape(d_model=d_model, n_layers=n_layers, n_heads=1, d_ff=d_ff), n_features).values()
            )
            for model in models
        ]
        for n_layers in (architecture.n_layers.low, architecture.n_layers.high)
        for d_model, d_ff in widths
    ]
    smallest, largest = min(max(totals) for totals in ends), max(min(totals) for totals in ends)
    if smallest > budget.high:
        fix = "lower architecture.d_model or n_layers.low, or raise budget.parameters"
        return f"the smallest candidate holds {smallest:,}; {fix}"
    if largest < budget.low:
        fix = "raise architecture.n_layers.high or d_model, or lower budget.parameters"
        return f"the largest candidate holds {largest:,}; {fix}"
    variants = f" with each of the {len(models)} searched model variants" if len(models) > 1 else ""
    fix = "add d_model values or raise budget.tolerance"
    return f"candidates hold {smallest:,} … {largest:,} but none lies inside{variants}; {fix}"


COORDINATES: dict[str, Callable[[Shape], float]] = {
    "shape.aspect": lambda shape: math.log2(shape.d_model / shape.n_layers),
    "shape.d_ff_ratio": lambda shape: math.log2(shape.d_ff / shape.d_model),
    "shape.heads": lambda shape: math.log2(shape.n_heads),
}

EXTENTS: dict[str, Callable[[Shape], float]] = {
    "d_model": lambda shape: shape.d_model,
    "n_layers": lambda shape: shape.n_layers,
    "d_ff ratio": lambda shape: shape.d_ff / shape.d_model,
    "n_heads": lambda shape: shape.n_heads,
}


# --- for training: devices, weight decay, output scale ----------------------------------------------------------------

PARTITION_RULES = {
    "blocks/qkv/kernel": PartitionSpec(None, None, "model"),  # (L, D, H·3·K): whole heads
    "blocks/qkv/bias": PartitionSpec(None, "model"),
    "blocks/attention_out/kernel": PartitionSpec(None, "model", None),  # (L, H·K, D)
    "blocks/feed_forward_in/kernel": PartitionSpec(None, None, "model"),  # (L, D, M)
    "blocks/feed_forward_in/bias": PartitionSpec(None, "model"),
    "blocks/feed_forward_out/kernel": PartitionSpec(None, "model", None),  # (L, M, D)
}
"""Heads and feed-forward width are cut over the devices (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053)."""


def model_parts(shape: Shape) -> int:
    """What `PARTITION_RULES` may cut: each device has whole heads, and an equal part of the feed-forward width."""
    return math.gcd(shape.n_heads, shape.d_ff)


_NEVER_DECAYED = frozenset({"bias", "scale", "positions"})


def weight_decay_mask(params: Params) -> Params:
    """Whether each leaf is a matrix, and so subject to weight decay: no bias, norm, position or scale of RevIN.

    The leading axis of a stacked layer does not count: (L, D) is L vectors.
    """

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        names = [str(part.key) for part in path]
        return names[-1] not in _NEVER_DECAYED and leaf.ndim - ("blocks" in names) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def rescale_output(params: Params, mean: float, sd: float) -> Params:
    """The parameters whose output is mean + sd · output: the head is linear, so it is a head again."""
    head = params["head"]
    return params | {"head": {"kernel": head["kernel"] * sd, "bias": head["bias"] * sd + mean}}


# --- modules: they declare parameters and never leave this file -------------------------------------------------------


class _Linear(nnx.Module):
    """x·W + b; operands in `dtype`, result float32. W: truncated normal of variance / fan-in (LeCun et al. 1998)."""

    def __init__(self, inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs, *, variance: float = 1.0):
        self._dtype = jnp.dtype(dtype)
        kernel_init = nnx.initializers.variance_scaling(variance, "fan_in", "truncated_normal")
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, x: Array) -> Array:
        # One flat matmul, whose weight gradient is one too: contracting two axes costs a sixth of a CPU step more.
        rows = x.reshape(-1, x.shape[-1]).astype(self._dtype)
        out = (rows @ self.kernel[...].astype(self._dtype)).astype(jnp.float32) + self.bias[...][None, :]
        return out.reshape(*x.shape[:-1], -1)


class _ScaleAndShift(nnx.Module):
    """What follows a normalisation: a learned scale and shift of the last axis."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x_BTF: Array) -> Array:
        return x_BTF * self.scale[...][None, None, :] + self.bias[...][None, None, :]


class EmbeddingAndHead(nnx.Module):
    """All but the blocks."""

    def __init__(self, model: ModelConfig, shape: Shape, n_features: int, rngs: nnx.Rngs):
        n, d = n_patches(model), shape.d_model
        self._model = model
        if model.revin:
            self.revin = _ScaleAndShift(n_features)
        self.embedding = _Linear(model.patch_length * n_features, d, model.compute_dtype, rngs)
        self.positions = nnx.Param(_POSITION_STD * jax.random.normal(rngs.params(), (n, d), jnp.float32))
        self.norm = _ScaleAndShift(d)
        self.head = _Linear(n * d, 1, jnp.float32, rngs, variance=_HEAD_STD**2)

    def embed(self, x_BTF: Array) -> Array:
        if self._model.revin:  # each feature within its window (Kim et al. 2022)
            mean = x_BTF.mean(axis=1, keepdims=True)
            variance = jnp.square(x_BTF - mean).mean(axis=1, keepdims=True)
            x_BTF = self.revin((x_BTF - mean) * jax.lax.rsqrt(variance + blocks.EPSILON))
        return self.embedding(patches(self._model, x_BTF)) + self.positions[...][None]

    def read_out(self, hidden_BND: Array) -> Array:
        flat = self.norm(blocks.normal(hidden_BND)[0]).reshape(hidden_BND.shape[0], -1)
        return self.head(flat)[:, 0]


class _Block(nnx.Module):
    """Pre-norm attention and feed-forward (Vaswani et al. 2017; Xiong et al. 2020 for the norm's place).

    Projections back into the residual stream start smaller by 1/√(2L), so that its variance does not grow with depth
    (Radford et al. 2019, GPT-2, section 2.3).
    """

    def __init__(self, model: ModelConfig, shape: Shape, rngs: nnx.Rngs):
        d, dtype = shape.d_model, model.compute_dtype
        residual = 1 / (2 * shape.n_layers)
        self.attention_norm = _ScaleAndShift(d)
        self.qkv = _Linear(d, 3 * d, dtype, rngs)
        self.attention_out = _Linear(d, d, dtype, rngs, variance=residual)
        self.feed_forward_norm = _ScaleAndShift(d)
        self.feed_forward_in = _Linear(d, shape.d_ff, dtype, rngs)
        self.feed_forward_out = _Linear(shape.d_ff, d, dtype, rngs, variance=residual)


@dataclass(frozen=True)
class _Declared:
    """The modules of embedding and head without their parameters, and all parameters as abstract shapes."""

    edge_graph: Any
    edge_params: Params
    block_params: Params


@functools.lru_cache(maxsize=4096)
def _declare(model: ModelConfig, shape: Shape, n_features: int) -> _Declared:
    edge_graph, edges = jax.eval_shape(lambda: nnx.split(EmbeddingAndHead(model, shape, n_features, nnx.Rngs(0))))
    block = jax.eval_shape(lambda: nnx.state(_Block(model, shape, nnx.Rngs(0))))
    return _Declared(edge_graph, nnx.to_pure_dict(edges), nnx.to_pure_dict(block))
