"""Optimizer: AdamW behind a global-norm clip, with a learning rate that warms up and falls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fintx.types import Params

ScheduleKind = Literal["cosine", "constant", "linear", "inverse_sqrt"]

# (progress from 0 at the peak to 1 at the last step, t / w, final fraction) → share of the peak
_SCHEDULES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "cosine": lambda progress, _, final: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress, _, final: final + (1 - final) * (1 - progress),
    "constant": lambda progress, _, __: jnp.ones_like(progress),
    "inverse_sqrt": lambda _, warmups, __: jax.lax.rsqrt(warmups),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptimValues:
    """What the optimizer depends on: values of the compiled program, not constants in it."""

    learning_rate: Any
    weight_decay: Any
    warmup_steps: Any
    """0: no warm-up."""
    total_steps: Any
    final_fraction: Any
    clip_norm: Any
    b1: Any
    b2: Any
    eps: Any


def adamw(
    values: OptimValues, *, schedule: ScheduleKind, mask: Callable[[Params], Params]
) -> optax.GradientTransformation:
    """Clip to the global norm, scale by Adam, add the weight decay of the masked leaves, multiply by minus the rate.

    Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101: the decay is decoupled, and scaled by the rate.
    """
    return optax.chain(
        optax.stateless(lambda grads, _: clip_by_global_norm(grads, values.clip_norm)),
        optax.scale_by_adam(b1=values.b1, b2=values.b2, eps=values.eps),
        optax.add_decayed_weights(values.weight_decay, mask=mask),
        optax.scale_by_learning_rate(lambda step: learning_rate(schedule, values, step)),
    )


def learning_rate(schedule: ScheduleKind, values: OptimValues, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """The rate of a step, counted from 0.

    With t = step + 1, w warm-up steps and n steps in all, the rate is peak · t / w while t ≤ w. After that
    cosine and linear fall from the peak at t = w to final_fraction · peak at t = n, the last step; constant stays;
    inverse_sqrt is peak · √(max(w, 1) / t).
    """
    position = jnp.asarray(step + 1, jnp.float32)
    warmup = jnp.asarray(values.warmup_steps, jnp.float32)
    total = jnp.asarray(values.total_steps, jnp.float32)
    progress = jnp.clip((position - warmup) / jnp.maximum(total - warmup, 1), 0, 1)
    falling = _SCHEDULES[schedule](progress, position / jnp.maximum(warmup, 1), values.final_fraction)
    climbing = position / jnp.maximum(warmup, 1)
    return values.learning_rate * jnp.where(position <= warmup, climbing, falling)


def clip_by_global_norm(grads: Params, limit: Any) -> Params:
    """Gradients scaled down to a norm of at most `limit` (Pascanu et al. 2013, algorithm 1)."""
    norm = global_norm(grads)
    factor = jnp.where(norm < limit, jnp.float32(1), limit / norm)
    return jax.tree.map(lambda grad: grad * factor, grads)


def global_norm(tree: Params) -> Float[Array, ""]:
    """The Euclidean norm of all numbers of a tree together.

    By dot products: on a CPU, XLA makes several kernels of each leaf's reduction, a tenth of a step's compile time.
    """

    def sum_of_squares(leaf: Array) -> Float[Array, ""]:
        axes = tuple(range(leaf.ndim))
        return jax.lax.dot_general(leaf, leaf, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST)

    return jnp.sqrt(sum(map(sum_of_squares, jax.tree.leaves(tree)), start=jnp.float32(0)))
