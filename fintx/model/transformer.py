"""What is the model? A PatchTST-like encoder (Nie et al. 2023, https://arxiv.org/abs/2211.14730) as pure functions.

    window (T, F) → [RevIN] → patches (N, P·F) → linear + learned positions → L pre-norm blocks → norm → linear → logit

Unlike PatchTST the features of a patch are embedded together: one series' channels are the inputs of one decision.
Flax NNX declares the parameters; every transform is plain JAX over a nested dict of arrays. Blocks are stacked on a
leading axis L at init and applied by one `lax.scan`, so compile time does not grow with depth.

`compute_dtype` is that of the matmuls' operands and of what the backward pass keeps of them. All else is float32, the
residual stream too: at 192 layers a bfloat16 stream puts logits off by 4 % of their SD, a float32 one by .4 %.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
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

BeforeLayer = Callable[[Array, Params], tuple[Array, Params]]
"""(B, N, D) residual stream and one layer's parameters → the same values, laid out as its caller likes."""


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
    before_layer: BeforeLayer = lambda hidden_BND, block: (hidden_BND, block),
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
    rate = model.dropout if dropout is None else dropout
    declared = _declare(model, shape, x_BTF.shape[-1])
    edges = nnx.merge(declared.edge_graph, {name: leaf for name, leaf in params.items() if name != "blocks"})
    embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
    hidden_BND = drop(edges.embed(x_BTF), rate, embed_key)

    # Linear layers' outputs alone are saved: attention and elementwise work, cheap to compute and dear to store, is
    # done again. A scan's body needs no guard against common subexpressions: forward and backward are separate loops.
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if remat else policies.dots_with_no_batch_dims_saveable

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def layer(hidden_BND: Array, block: Params, index: Array) -> Array:
        hidden_BND, block = before_layer(hidden_BND, block)
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
        # Means as matmuls: a few per cent of a CPU step faster than reductions. HIGHEST: a GPU would round to TF32.
        average_D1 = jnp.full((x_BND.shape[-1], 1), 1 / x_BND.shape[-1], jnp.float32)
        mean = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        centred_BND = x_BND - mean(x_BND, average_D1)
        normal_BND = centred_BND * jax.lax.rsqrt(mean(jnp.square(centred_BND), average_D1) + _EPSILON)
        return normal_BND * self.scale[...][None, None, :] + self.bias[...][None, None, :]


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
        self._n_heads = shape.n_heads
        self._dtype = jnp.dtype(dtype)
        self.attention_norm = _LayerNorm(d)
        self.qkv = _Linear(d, 3 * d, dtype, rngs)
        self.attention_out = _Linear(d, d, dtype, rngs, variance=residual)
        self.feed_forward_norm = _LayerNorm(d)
        self.feed_forward_in = _Linear(d, shape.d_ff, dtype, rngs)
        self.feed_forward_out = _Linear(shape.d_ff, d, dtype, rngs, variance=residual)

    def __call__(self, x_BND: Array, rate: Any, key: PRNGKeyArray | None) -> Array:
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        mixed_BND = self._attend(self.qkv(self.attention_norm(x_BND)), rate, keys[0])
        x_BND = x_BND + drop(self.attention_out(mixed_BND), rate, keys[1])
        active_BNM = drop(_gelu(self.feed_forward_in(self.feed_forward_norm(x_BND))), rate, keys[2])
        return x_BND + drop(self.feed_forward_out(active_BNM), rate, keys[3])

    def _attend(self, qkv: Array, rate: Any, key: PRNGKeyArray | None) -> Array:
        """Multi-head attention over N tokens; the width of `qkv` is (H, 3, K): a head's query, key and value together.

        So a contiguous part of it is a number of whole heads, as in Megatron-LM (https://arxiv.org/abs/1909.08053).
        """
        B, N, D3 = qkv.shape
        heads_BNH3K = qkv.astype(self._dtype).reshape(B, N, self._n_heads, 3, -1)
        # Heads first, then plain matmuls: at ten tokens a tenth of a CPU step faster than contracting BNHK in place.
        q_BHNK, k_BHNK, v_BHNK = heads_BNH3K.transpose(3, 0, 2, 1, 4)
        scores_BHNN = jnp.matmul(q_BHNK, k_BHNK.swapaxes(-1, -2), preferred_element_type=jnp.float32)
        weights_BHNN = drop(jax.nn.softmax(scores_BHNN / math.sqrt(q_BHNK.shape[-1])), rate, key)
        mixed_BHNK = jnp.matmul(weights_BHNN.astype(self._dtype), v_BHNK)
        return mixed_BHNK.swapaxes(1, 2).reshape(B, N, D3 // 3)


def _gelu(x: Array) -> Array:
    """x·Φ(x), exact (Hendrycks & Gimpel 2016); erf rather than JAX's erfc form, which is slower on CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@dataclass(frozen=True)
class _Declared:
    """The modules without their parameters, and the parameters as abstract shapes."""

    edge_graph: Any
    edge_params: Params
    block_graph: Any
    block_params: Params


@functools.lru_cache(maxsize=4096)
def _declare(model: ModelConfig, shape: Shape, n_features: int) -> _Declared:
    edge_graph, edges = jax.eval_shape(lambda: nnx.split(_Edges(model, shape, n_features, nnx.Rngs(0))))
    block_graph, block = jax.eval_shape(lambda: nnx.split(_Block(model, shape, nnx.Rngs(0))))
    return _Declared(edge_graph, nnx.to_pure_dict(edges), block_graph, nnx.to_pure_dict(block))
