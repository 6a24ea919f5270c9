"""What is the model? A PatchTST-like encoder (Nie et al. 2023, https://arxiv.org/abs/2211.14730) as pure functions.

    window (T, F) → [RevIN] → patches (N, P·F) → linear + learned positions → L pre-norm blocks → norm → linear → logit

Unlike PatchTST the features of a patch are embedded together: one series' channels are the inputs of one decision.
Flax NNX declares the parameters; every transform is plain JAX over a nested dict of arrays. Blocks are stacked on a
leading axis L at init and applied by one `lax.scan` (blocks), so compile time does not grow with depth.

`compute_dtype` is that of the matmuls' operands and of what the backward pass keeps of them. All else is float32, the
residual stream too: at 192 layers a bfloat16 stream puts logits off by 4 % of their SD, a float32 one by .4 %.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from fintx.config import ModelConfig, Shape
from fintx.model import blocks
from fintx.model.dropout import dropout as drop
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
    edges = nnx.to_pure_dict(nnx.state(_Edges(model, shape, n_features, nnx.Rngs(edge_key))))

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
        before_layer: called with what each layer works on, in the forward pass and in what is computed again.
    """
    rate = jnp.asarray(model.dropout if dropout is None else dropout, jnp.float32)
    declared = _declare(model, shape, x_BTF.shape[-1])
    edges = nnx.merge(declared.edge_graph, {name: leaf for name, leaf in params.items() if name != "blocks"})
    embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
    hidden_BND = drop(edges.embed(x_BTF), rate, embed_key)
    static = blocks.Static(shape.n_heads, model.compute_dtype, remat, before_layer)
    masks_L4W = None if layer_key is None else _mask_words(layer_key, shape.n_layers)
    hidden_BND = blocks.run(static, params["blocks"], hidden_BND, rate=rate, masks_L4W=masks_L4W)
    return edges.read_out(hidden_BND)


def _mask_words(key: PRNGKeyArray, n_layers: int) -> UInt32[Array, "L 4 W"]:
    """Every layer's keys at once, outside the loops: threefry within them would be a loop of its own, each time."""

    def of_layer(index: Array) -> Array:
        return jax.random.key_data(jax.random.split(jax.random.fold_in(key, index), blocks.N_MASKS))

    return jax.vmap(of_layer)(jnp.arange(n_layers))


def patches(model: ModelConfig, x_BTF: Float[Array, "B T F"]) -> Float[Array, "B N PF"]:
    """Overlapping patches, right-aligned: the last ends at the newest bar, a remainder is cut from the oldest side."""
    n, length, stride = n_patches(model), model.patch_length, model.stride
    oldest = model.context_length - (length + (n - 1) * stride)
    index_NP = oldest + stride * jnp.arange(n)[:, None] + jnp.arange(length)[None, :]
    return x_BTF[:, index_NP].reshape(x_BTF.shape[0], n, length * x_BTF.shape[-1])


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


class _LayerNorm(nnx.Module):
    """Layer norm (Ba et al. 2016), in float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x_BND: Array) -> Array:
        return blocks.normal(x_BND)[0] * self.scale[...][None, None, :] + self.bias[...][None, None, :]


class _RevIN(nnx.Module):
    """Normalise each feature within its window, then scale and shift it by learned amounts (Kim et al. 2022)."""

    def __init__(self, n_features: int):
        self.scale = nnx.Param(jnp.ones(n_features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(n_features, jnp.float32))

    def __call__(self, x_BTF: Array) -> Array:
        mean = x_BTF.mean(axis=1, keepdims=True)
        variance = jnp.square(x_BTF - mean).mean(axis=1, keepdims=True)
        normal_BTF = (x_BTF - mean) * jax.lax.rsqrt(variance + blocks.EPSILON)
        return normal_BTF * self.scale[...][None, None, :] + self.bias[...][None, None, :]


class _Edges(nnx.Module):
    """All but the blocks: the way in and the way out."""

    def __init__(self, model: ModelConfig, shape: Shape, n_features: int, rngs: nnx.Rngs):
        n, d = n_patches(model), shape.d_model
        self._model = model
        if model.revin:
            self.revin = _RevIN(n_features)
        self.embedding = _Linear(model.patch_length * n_features, d, model.compute_dtype, rngs)
        self.positions = nnx.Param(_POSITION_STD * jax.random.normal(rngs.params(), (n, d), jnp.float32))
        self.norm = _LayerNorm(d)
        self.head = _Linear(n * d, 1, jnp.float32, rngs, variance=_HEAD_STD**2)

    def embed(self, x_BTF: Array) -> Array:
        if self._model.revin:
            x_BTF = self.revin(x_BTF)
        return self.embedding(patches(self._model, x_BTF)) + self.positions[...][None]

    def read_out(self, hidden_BND: Array) -> Array:
        flat = self.norm(hidden_BND).reshape(hidden_BND.shape[0], -1)
        return self.head(flat)[:, 0]


class _Block(nnx.Module):
    """Pre-norm attention and feed-forward (Vaswani et al. 2017; Xiong et al. 2020 for the norm's place).

    Projections back into the residual stream start smaller by 1/√(2L), so that its variance does not grow with depth
    (Radford et al. 2019, GPT-2, section 2.3).
    """

    def __init__(self, model: ModelConfig, shape: Shape, rngs: nnx.Rngs):
        d, dtype = shape.d_model, model.compute_dtype
        residual = 1 / (2 * shape.n_layers)
        self.attention_norm = _LayerNorm(d)
        self.qkv = _Linear(d, 3 * d, dtype, rngs)
        self.attention_out = _Linear(d, d, dtype, rngs, variance=residual)
        self.feed_forward_norm = _LayerNorm(d)
        self.feed_forward_in = _Linear(d, shape.d_ff, dtype, rngs)
        self.feed_forward_out = _Linear(shape.d_ff, d, dtype, rngs, variance=residual)


@dataclass(frozen=True)
class _Declared:
    """The edges' modules without their parameters, and all parameters as abstract shapes."""

    edge_graph: Any
    edge_params: Params
    block_params: Params


@functools.lru_cache(maxsize=4096)
def _declare(model: ModelConfig, shape: Shape, n_features: int) -> _Declared:
    edge_graph, edges = jax.eval_shape(lambda: nnx.split(_Edges(model, shape, n_features, nnx.Rngs(0))))
    block = jax.eval_shape(lambda: nnx.state(_Block(model, shape, nnx.Rngs(0))))
    return _Declared(edge_graph, nnx.to_pure_dict(edges), nnx.to_pure_dict(block))
