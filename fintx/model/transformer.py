"""What is the model? A PatchTST-like encoder (Nie et al. 2023, https://arxiv.org/abs/2211.14730) as pure functions.

    window (T, F) → [RevIN] → patches (N, P·F) → linear + learned positions → L pre-norm blocks → norm → linear → logit

Unlike PatchTST the features of a patch are embedded together: one series' channels are the inputs of one decision.
Flax NNX declares the parameters; every transform is plain JAX over a nested dict of arrays. Blocks are stacked on a
leading axis L at init and applied by one `lax.scan`, so compile time does not grow with depth.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from fintx.config import ModelConfig, Shape
from fintx.model.dropout import dropout as drop
from fintx.types import Params

_EPSILON = 1e-5
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

    return {**declared.edges, "blocks": jax.tree.map(stack, declared.block)}


def apply(
    model: ModelConfig,
    shape: Shape,
    params: Params,
    x_BTF: Float[Array, "B T F"],
    *,
    key: PRNGKeyArray | None = None,
    dropout: Float[Array, ""] | float | None = None,
) -> Float[Array, " B"]:
    """Logits (regression: predictions) of a batch of windows.

    Args:
        params: a tree of `init`; `model` and `shape` are static, everything else may be traced or vmapped.
        x_BTF: scaled features; time runs forward, the last bar is the decision bar.
        key: none for evaluation; else the dropout masks' key.
        dropout: rate; default `model.dropout`. Pass it traced to share one program between rates.
    """
    rate = model.dropout if dropout is None else dropout
    declared = _declare(model, shape, x_BTF.shape[-1])
    edges = nnx.merge(declared.edge_graph, {name: leaf for name, leaf in params.items() if name != "blocks"})
    embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
    hidden_BND = drop(edges.embed(x_BTF), rate, embed_key)

    # Saving matmul outputs alone: attention and elementwise work, cheap to compute, dear to store, is done again.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    def layer(hidden_BND: Array, block: Params, index: Array) -> Array:
        block_key = None if layer_key is None else jax.random.fold_in(layer_key, index)
        return nnx.merge(declared.block_graph, block)(hidden_BND, rate, block_key)

    def body(hidden_BND: Array, stacked: tuple[Params, Array]) -> tuple[Array, None]:
        return layer(hidden_BND, *stacked), None

    layers = (params["blocks"], jnp.arange(shape.n_layers))
    hidden_BND, _ = jax.lax.scan(body, hidden_BND, layers)
    return edges.read_out(hidden_BND)


def patches(model: ModelConfig, x_BTF: Float[Array, "B T F"]) -> Float[Array, "B N PF"]:
    """Overlapping patches, right-aligned: the last ends at the newest bar, a remainder is cut from the oldest side."""
    n, length, stride = n_patches(model), model.patch_length, model.stride
    oldest = model.context_length - (length + (n - 1) * stride)
    index_NP = oldest + stride * jnp.arange(n)[:, None] + jnp.arange(length)[None, :]
    return x_BTF[:, index_NP].reshape(x_BTF.shape[0], n, length * x_BTF.shape[-1])


# --- modules: they declare parameters and never leave this file -------------------------------------------------------


def _kernel(variance: float = 1.0) -> Any:
    """Truncated normal of the given variance over the fan-in (LeCun et al. 1998)."""
    return nnx.initializers.variance_scaling(variance, "fan_in", "truncated_normal")


def _linear(inputs: int, outputs: int, model: ModelConfig, rngs: nnx.Rngs, *, variance: float = 1.0) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, dtype=jnp.dtype(model.compute_dtype), kernel_init=_kernel(variance), rngs=rngs)


def _norm(shape: Shape, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(shape.d_model, epsilon=_EPSILON, dtype=jnp.float32, rngs=rngs)


class _RevIN(nnx.Module):
    """Normalise each feature within its window, then scale and shift it by learned amounts (Kim et al. 2022)."""

    def __init__(self, n_features: int):
        self.scale = nnx.Param(jnp.ones(n_features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(n_features, jnp.float32))

    def __call__(self, x_BTF: Array) -> Array:
        mean = x_BTF.mean(axis=1, keepdims=True)
        variance = jnp.square(x_BTF - mean).mean(axis=1, keepdims=True)
        normal_BTF = (x_BTF - mean) * jax.lax.rsqrt(variance + _EPSILON)
        return normal_BTF * self.scale[...][None, None, :] + self.bias[...][None, None, :]


class _Edges(nnx.Module):
    """All but the blocks: the way in and the way out."""

    def __init__(self, model: ModelConfig, shape: Shape, n_features: int, rngs: nnx.Rngs):
        n, d = n_patches(model), shape.d_model
        self._model = model
        if model.revin:
            self.revin = _RevIN(n_features)
        self.embedding = _linear(model.patch_length * n_features, d, model, rngs)
        self.positions = nnx.Param(_POSITION_STD * jax.random.normal(rngs.params(), (n, d), jnp.float32))
        self.norm = _norm(shape, rngs)
        self.head = nnx.Linear(n * d, 1, dtype=jnp.float32, kernel_init=_kernel(_HEAD_STD**2), rngs=rngs)

    def embed(self, x_BTF: Array) -> Array:
        if self._model.revin:
            x_BTF = self.revin(x_BTF)
        embedded_BND = self.embedding(patches(self._model, x_BTF))
        return embedded_BND + self.positions[...][None].astype(embedded_BND.dtype)

    def read_out(self, hidden_BND: Array) -> Array:
        flat = self.norm(hidden_BND).reshape(hidden_BND.shape[0], -1)
        return self.head(flat)[:, 0]


class _Block(nnx.Module):
    """Pre-norm attention and feed-forward (Vaswani et al. 2017; Xiong et al. 2020 for the norm's place).

    Projections back into the residual stream start smaller by 1/√(2L), so that its variance does not grow with depth
    (Radford et al. 2019, GPT-2, section 2.3).
    """

    def __init__(self, model: ModelConfig, shape: Shape, rngs: nnx.Rngs):
        d, residual = shape.d_model, 1 / (2 * shape.n_layers)
        self._n_heads = shape.n_heads
        self._dtype = jnp.dtype(model.compute_dtype)
        self.attention_norm = _norm(shape, rngs)
        self.qkv = _linear(d, 3 * d, model, rngs)
        self.attention_out = _linear(d, d, model, rngs, variance=residual)
        self.feed_forward_norm = _norm(shape, rngs)
        self.feed_forward_in = _linear(d, shape.d_ff, model, rngs)
        self.feed_forward_out = _linear(shape.d_ff, d, model, rngs, variance=residual)

    def __call__(self, x_BND: Array, rate: Any, key: PRNGKeyArray | None) -> Array:
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        normal_BND = self.attention_norm(x_BND).astype(self._dtype)
        attended_BND = self.attention_out(self._attend(self.qkv(normal_BND), rate, keys[0]))
        x_BND = x_BND + drop(attended_BND, rate, keys[1])
        normal_BND = self.feed_forward_norm(x_BND).astype(self._dtype)
        active_BNM = drop(_gelu(self.feed_forward_in(normal_BND)), rate, keys[2])
        return x_BND + drop(self.feed_forward_out(active_BNM), rate, keys[3])

    def _attend(self, qkv: Array, rate: Any, key: PRNGKeyArray | None) -> Array:
        B, N, D3 = qkv.shape
        q_BNHK, k_BNHK, v_BNHK = jnp.moveaxis(qkv.reshape(B, N, 3, self._n_heads, -1), 2, 0)
        scale = 1 / math.sqrt(q_BNHK.shape[-1])
        scores_BHNN = jnp.einsum("BNHK,BSHK->BHNS", q_BNHK, k_BNHK, preferred_element_type=jnp.float32) * scale
        weights_BHNN = drop(jax.nn.softmax(scores_BHNN), rate, key).astype(self._dtype)
        return jnp.einsum("BHNS,BSHK->BNHK", weights_BHNN, v_BNHK).reshape(B, N, D3 // 3)


def _gelu(x: Array) -> Array:
    """x·Φ(x), exact (Hendrycks & Gimpel 2016); erf rather than JAX's erfc form, which is slower on CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@dataclass(frozen=True)
class _Declared:
    """The modules without their parameters, and the parameters as abstract shapes."""

    edge_graph: Any
    block_graph: Any
    edges: Params
    block: Params


@functools.lru_cache(maxsize=4096)
def _declare(model: ModelConfig, shape: Shape, n_features: int) -> _Declared:
    edges = nnx.eval_shape(lambda: _Edges(model, shape, n_features, nnx.Rngs(0)))
    block = nnx.eval_shape(lambda: _Block(model, shape, nnx.Rngs(0)))
    return _Declared(
        edge_graph=nnx.graphdef(edges),
        block_graph=nnx.graphdef(block),
        edges=nnx.to_pure_dict(nnx.state(edges)),
        block=nnx.to_pure_dict(nnx.state(block)),
    )
