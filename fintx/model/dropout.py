"""How are dropout masks drawn? By a counter-based hash of (key, index): far cheaper than threefry per element.

Keys are threefry (derived by `fold_in`, independent by construction); what is cheap is only the spreading of one key
over a mask. Masks need independence across elements, layers, steps and members, no cryptographic strength. Drawing
them by `jax.random.bernoulli` doubles the compile time and a third of the step time of these small models.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray

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
