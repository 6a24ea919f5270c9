"""Blocks: the transformer's layers, forward and, by hand, backward, in one loop over stacked parameters; dropout.

The backward pass keeps each layer's input and the outputs of its matrix products, and computes attention, norms and
activations again: a fifth faster on a CPU than autodiff that keeps the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray, UInt32

from fintx.types import Params

EPSILON = 1e-5
N_MASKS = 4
"""Dropout masks of a layer: attention weights, attention's output, activations, feed-forward's output."""

BeforeLayer = Callable[[Array, Params], tuple[Array, Params]]
"""(B, N, D) residual stream and one layer's parameters → the same values, laid out over devices as the caller wants."""


@dataclass(frozen=True)
class Static:
    """What all layers have in common, and the program is made for."""

    n_heads: int
    dtype: str
    """Of matmul operands and of what is kept of products."""
    remat: bool
    """Keep a layer's input alone, and compute the layer again."""
    before_layer: BeforeLayer


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(
    static: Static,
    hidden_BND: Float32[Array, "B N D"],
    blocks: Params,
    masks_L4W: UInt32[Array, "L 4 W"] | None,
    rate: Float[Array, ""],
) -> Float32[Array, "B N D"]:
    """The residual stream after all layers.

    Args:
        blocks: parameters of all layers, stacked.
        masks_L4W: the words of each layer's threefry keys, one per mask; none: no dropout.
        rate: of dropout.
    """

    def body(hidden_BND: Array, layer: tuple[Params, Array | None]) -> tuple[Array, None]:
        return _forward(static, hidden_BND, *layer, rate)[0], None

    return jax.lax.scan(body, hidden_BND, (blocks, masks_L4W))[0]


def _run_forward(
    static: Static, hidden_BND: Array, blocks: Params, masks_L4W: Array | None, rate: Array
) -> tuple[Array, Any]:
    def body(hidden_BND: Array, layer: tuple[Params, Array | None]) -> tuple[Array, Any]:
        after_BND, residuals = _forward(static, hidden_BND, *layer, rate)
        return after_BND, (hidden_BND, None if static.remat else residuals)

    after_BND, residuals = jax.lax.scan(body, hidden_BND, (blocks, masks_L4W))
    return after_BND, (residuals, blocks, masks_L4W, rate)


def _run_backward(static: Static, saved: Any, grad_BND: Array) -> tuple[Array, Params, None, None]:
    (inputs, residuals), blocks, masks_L4W, rate = saved

    def body(grad_BND: Array, layer: tuple[Any, ...]) -> tuple[Array, Params]:
        hidden_BND, residuals, block, masks_4W = layer
        return _backward(static, grad_BND, hidden_BND, residuals, block, masks_4W, rate)

    grad_BND, grads = jax.lax.scan(body, grad_BND, (inputs, residuals, blocks, masks_L4W), reverse=True)
    return grad_BND, grads, None, None


run.defvjp(_run_forward, _run_backward)


# --- one layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Residuals:
    """What the backward pass of a layer needs beside its input."""

    qkv: Any
    """(Q, 3D) in the compute dtype."""
    between: Any
    """(Q, D) float32: the residual stream after attention."""
    inner: Any
    """(Q, M) in the compute dtype: what the activation is applied to."""


jax.tree_util.register_dataclass(_Residuals)


def _forward(
    static: Static, hidden_BND: Array, block: Params, masks_4W: Array | None, rate: Array
) -> tuple[Array, _Residuals]:
    hidden_BND, block = static.before_layer(hidden_BND, block)
    masks, dtype = _keys(masks_4W), jnp.dtype(static.dtype)
    x_QD = hidden_BND.reshape(-1, hidden_BND.shape[-1])
    qkv = _linear(block["qkv"], _scaled(block["attention_norm"], normal(x_QD)[0]), dtype).astype(dtype)
    q_BHNK, k_BHNK, v_BHNK = _heads(static, qkv, n=hidden_BND.shape[1])
    weights_BHNN = dropout(_attention(q_BHNK, k_BHNK), rate, masks[0])
    mixed_QD = _rows(jnp.matmul(weights_BHNN.astype(dtype), v_BHNK))
    between_QD = x_QD + dropout(_linear(block["attention_out"], mixed_QD, dtype), rate, masks[1])
    inner = _linear(block["feed_forward_in"], _scaled(block["feed_forward_norm"], normal(between_QD)[0]), dtype)
    inner = inner.astype(dtype)
    u_QM = inner.astype(jnp.float32)
    active_QM = dropout(u_QM * _phi(u_QM), rate, masks[2])
    out_QD = dropout(_linear(block["feed_forward_out"], active_QM, dtype), rate, masks[3])
    return (between_QD + out_QD).reshape(hidden_BND.shape), _Residuals(qkv, between_QD, inner)


def _backward(
    static: Static,
    grad_BND: Array,
    hidden_BND: Array,
    residuals: _Residuals | None,
    block: Params,
    masks_4W: Array | None,
    rate: Array,
) -> tuple[Array, Params]:
    """Gradients of the layer's input and parameters, from that of its output."""
    if residuals is None:
        residuals = _forward(static, hidden_BND, block, masks_4W, rate)[1]
    (hidden_BND, block), before_layer_vjp = jax.vjp(static.before_layer, hidden_BND, block)
    masks, dtype = _keys(masks_4W), jnp.dtype(static.dtype)
    grads: Params = {}

    # feed-forward: between + drop(W₂ · drop(u · Φ(u))), u = W₁ · norm(between)
    grad_QD = grad_BND.reshape(-1, grad_BND.shape[-1])
    u_QM = residuals.inner.astype(jnp.float32)
    phi_QM = _phi(u_QM)
    active_QM = dropout(u_QM * phi_QM, rate, masks[2])
    d_active_QM, grads["feed_forward_out"] = _linear_backward(
        block["feed_forward_out"], active_QM, dropout(grad_QD, rate, masks[3]), dtype
    )
    d_u_QM = dropout(d_active_QM, rate, masks[2]) * (phi_QM + u_QM * _density(u_QM))
    d_between_QD, grads["feed_forward_in"], grads["feed_forward_norm"] = _norm_linear_backward(
        block["feed_forward_norm"], block["feed_forward_in"], residuals.between, d_u_QM, dtype
    )
    d_between_QD += grad_QD

    # attention: x + drop(Wₒ · (drop(softmax(q·kᵀ)) · v)), qkv = W · norm(x)
    q_BHNK, k_BHNK, v_BHNK = _heads(static, residuals.qkv, n=hidden_BND.shape[1])
    weights_BHNN = _attention(q_BHNK, k_BHNK)
    used_BHNN = dropout(weights_BHNN, rate, masks[0]).astype(dtype)
    mixed_QD = _rows(jnp.matmul(used_BHNN, v_BHNK))
    d_mixed_QD, grads["attention_out"] = _linear_backward(
        block["attention_out"], mixed_QD, dropout(d_between_QD, rate, masks[1]), dtype
    )
    d_mixed_BHNK = _split(d_mixed_QD.astype(dtype), n=hidden_BND.shape[1], heads=static.n_heads)
    d_used_BHNN = jnp.matmul(d_mixed_BHNK, _swap(v_BHNK), preferred_element_type=jnp.float32)
    d_weights_BHNN = dropout(d_used_BHNN, rate, masks[0])
    delta_BHN1 = jnp.sum(d_weights_BHNN * weights_BHNN, axis=-1, keepdims=True)
    d_scores_BHNN = weights_BHNN * (d_weights_BHNN - delta_BHN1) / math.sqrt(q_BHNK.shape[-1])
    d_scores_BHNN = d_scores_BHNN.astype(dtype)
    d_q_BHNK = jnp.matmul(d_scores_BHNN, k_BHNK)
    d_k_BHNK = jnp.matmul(_swap(d_scores_BHNN), q_BHNK)
    d_v_BHNK = jnp.matmul(_swap(used_BHNN), d_mixed_BHNK)
    d_qkv = _join(d_q_BHNK, d_k_BHNK, d_v_BHNK)
    x_QD = hidden_BND.reshape(-1, hidden_BND.shape[-1])
    d_x_QD, grads["qkv"], grads["attention_norm"] = _norm_linear_backward(
        block["attention_norm"], block["qkv"], x_QD, d_qkv.astype(jnp.float32), dtype
    )
    return before_layer_vjp(((d_between_QD + d_x_QD).reshape(grad_BND.shape), grads))


# --- parts ------------------------------------------------------------------------------------------------------------


def _keys(masks_4W: Array | None) -> Any:
    return (None,) * N_MASKS if masks_4W is None else jax.random.wrap_key_data(masks_4W, impl="threefry2x32")


def _linear(layer: Params, x_QD: Array, dtype: Any) -> Array:
    """x·W + b; operands in `dtype`, result float32."""
    product = x_QD.astype(dtype) @ layer["kernel"].astype(dtype)
    return product.astype(jnp.float32) + layer["bias"][None, :]


def _linear_backward(layer: Params, x_QD: Array, grad_QE: Array, dtype: Any) -> tuple[Array, Params]:
    """Gradients of x and of the parameters; all float32."""
    x_QD, grad = x_QD.astype(dtype), grad_QE.astype(dtype)
    d_kernel_DE = jax.lax.dot_general(x_QD, grad, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    d_x_QD = jax.lax.dot_general(grad, layer["kernel"].astype(dtype), (((1,), (1,)), ((), ()))).astype(jnp.float32)
    return d_x_QD, {"kernel": d_kernel_DE, "bias": jnp.sum(grad_QE, axis=0)}


def normal(x: Float32[Array, "*rows D"]) -> tuple[Float32[Array, "*rows D"], Float32[Array, "*rows 1"]]:
    """Layer norm (Ba et al. 2016) before scale and shift, and 1 / SD."""
    centred = x - _mean(x)
    over_sd = jax.lax.rsqrt(_mean(jnp.square(centred)) + EPSILON)
    return centred * over_sd, over_sd


def _mean(x: Array) -> Array:
    # As a matmul: a few per cent of a CPU step faster than a reduction. HIGHEST: a GPU would round to TF32.
    average_D1 = jnp.full((x.shape[-1], 1), 1 / x.shape[-1], jnp.float32)
    return jnp.matmul(x, average_D1, precision=jax.lax.Precision.HIGHEST)


def _scaled(norm: Params, normal_QD: Array) -> Array:
    return normal_QD * norm["scale"][None, :] + norm["bias"][None, :]


def _norm_linear_backward(
    norm: Params, linear: Params, x_QD: Array, grad_QE: Array, dtype: Any
) -> tuple[Array, Params, Params]:
    """Gradients of linear(norm(x)): of x, of the linear layer's parameters and of the norm's."""
    normal_QD, over_sd_Q1 = normal(x_QD)
    d_scaled_QD, d_linear = _linear_backward(linear, _scaled(norm, normal_QD), grad_QE, dtype)
    d_norm = {"scale": jnp.sum(d_scaled_QD * normal_QD, axis=0), "bias": jnp.sum(d_scaled_QD, axis=0)}
    d_normal_QD = d_scaled_QD * norm["scale"][None, :]
    # Of (x − mean) / SD: what moves all of a row alike, or along the row itself, moves nothing.
    along_Q1 = _mean(d_normal_QD * normal_QD)
    d_x_QD = over_sd_Q1 * (d_normal_QD - _mean(d_normal_QD) - normal_QD * along_Q1)
    return d_x_QD, d_linear, d_norm


def _heads(static: Static, qkv: Array, *, n: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values, (B, H, N, K) each; the width of `qkv` is (H, 3, K): a head's three together.

    So a contiguous part of it is a number of whole heads, as in Megatron-LM (https://arxiv.org/abs/1909.08053).
    """
    # Heads first, then plain matmuls: at ten tokens a tenth of a CPU step faster than contracting BNHK in place.
    parts_3BHNK = qkv.reshape(-1, n, static.n_heads, 3, qkv.shape[-1] // (3 * static.n_heads)).transpose(3, 0, 2, 1, 4)
    return parts_3BHNK[0], parts_3BHNK[1], parts_3BHNK[2]


def _join(q_BHNK: Array, k_BHNK: Array, v_BHNK: Array) -> Array:
    """The reverse of `_heads`."""
    B, H, N, K = q_BHNK.shape
    return jnp.stack([q_BHNK, k_BHNK, v_BHNK]).transpose(1, 3, 2, 0, 4).reshape(B * N, H * 3 * K)


def _split(x_QD: Array, *, n: int, heads: int) -> Array:
    return x_QD.reshape(-1, n, heads, x_QD.shape[-1] // heads).swapaxes(1, 2)


def _rows(x_BHNK: Array) -> Array:
    """The reverse of `_split`."""
    B, H, N, K = x_BHNK.shape
    return x_BHNK.swapaxes(1, 2).reshape(B * N, H * K)


def _swap(x_BHNK: Array) -> Array:
    return x_BHNK.swapaxes(-1, -2)


def _attention(q_BHNK: Array, k_BHNK: Array) -> Array:
    """Attention weights, float32."""
    scores_BHNN = jnp.matmul(q_BHNK, _swap(k_BHNK), preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores_BHNN / math.sqrt(q_BHNK.shape[-1]))


def _phi(x: Array) -> Array:
    """Φ of the normal distribution; GELU is x·Φ(x) (Hendrycks & Gimpel 2016), exact. By erfc it is slower on CPU."""
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _density(x: Array) -> Array:
    """Φ's derivative."""
    return jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)


# --- dropout ----------------------------------------------------------------------------------------------------------
# Masks come from a counter-based hash of (key, index). Keys are threefry, derived by `fold_in` and so independent; the
# hash only spreads one key over a mask, which needs independence across elements, layers, steps and members, but no
# cryptographic strength. `jax.random.bernoulli` doubles compile time and takes a third of a small model's step time.

_GOLDEN = 0x9E3779B9
"""2³² / golden ratio, odd: neighbouring indices land far apart (Knuth, TAOCP vol. 3, 6.4: Fibonacci hashing)."""


def dropout(
    x: Float32[Array, "..."], rate: Float[Array, ""] | float, key: PRNGKeyArray | None
) -> Float32[Array, "..."]:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 − rate) (Srivastava et al. 2014).

    Args:
        rate: in [0, 1); may be traced, so that trials of different rates share one program.
        key: none: x as it is (evaluation).
    """
    if key is None:
        return x
    rate = jnp.asarray(rate, jnp.float32)
    scale = 1 / (1 - rate)
    return jnp.where(keep_mask(key, x.shape, rate), x * scale, jnp.float32(0))


def keep_mask(key: PRNGKeyArray, shape: tuple[int, ...], rate: Float[Array, ""]) -> Bool[Array, "..."]:
    """True with probability 1 − rate, to a resolution of 2⁻³²; a pure function of key and index."""
    low, high = jax.random.key_data(key)[..., 0], jax.random.key_data(key)[..., -1]
    # The index times the golden constant, as a sum over the two last axes: the same bits, and a loop that vectorises.
    width, n_rows = shape[-1], math.prod(shape[:-1])
    row = jax.lax.iota(jnp.uint32, n_rows).reshape(*shape[:-1], 1) * jnp.uint32(_GOLDEN * width % 2**32)
    column = jax.lax.iota(jnp.uint32, width).reshape(*[1] * (len(shape) - 1), width) * jnp.uint32(_GOLDEN)
    bits = _mix((row + column + low) ^ high)
    return bits >= (rate * 4294967296.0).astype(jnp.uint32)


def _mix(x: Array) -> Array:
    """Two multiply–xorshift rounds that avalanche 32 bits: lowbias32 of C. Wellons, "Prospecting for hash functions".

    https://nullprogram.com/blog/2018/07/31/
    """
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))
