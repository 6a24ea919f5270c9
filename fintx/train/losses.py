"""Training losses of single samples, written on logits: finite and exact however sure the model is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fintx.errors import FintxError
from fintx.types import Floats

LossKind = Literal["bce", "focal", "mse", "huber"]
ScalarLike = Float[Array, ""] | float
"""A traced value, or a plain number."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossValues:
    """What the losses depend on beyond their kind: values of the compiled program, not constants in it."""

    focal_gamma: Any
    huber_delta: Any
    """In SDs of the training target."""
    label_smoothing: Any
    negative_weight: Any
    positive_weight: Any


def per_example(
    kind: LossKind, outputs_B: Float[Array, " B"], targets_B: Float[Array, " B"], *, values: LossValues
) -> Float[Array, " B"]:
    """The training loss of each sample.

    Args:
        kind: bce, focal (outputs are logits, targets 0 or 1); mse, huber (both in SDs of the training target).
        values: label smoothing and class weights are for bce and focal alone.
    """
    if kind == "mse":
        return squared_error(outputs_B, targets_B)
    if kind == "huber":
        return huber(outputs_B, targets_B, delta=values.huber_delta)
    weights_B = jnp.where(targets_B > 0.5, values.positive_weight, values.negative_weight)
    smooth_B = smooth(targets_B, smoothing=values.label_smoothing)
    if kind == "bce":
        return weights_B * binary_cross_entropy(outputs_B, smooth_B)
    return weights_B * focal(outputs_B, smooth_B, gamma=values.focal_gamma)


def binary_cross_entropy(logits_B: Float[Array, " B"], targets_B: Float[Array, " B"]) -> Float[Array, " B"]:
    """−y ln p − (1 − y) ln(1 − p) with p = sigmoid(logit), in nats; targets may be soft (0 ≤ y ≤ 1)."""
    # Not softplus(z) − z·y: that subtracts two large numbers where the model is sure and right.
    return targets_B * jax.nn.softplus(-logits_B) + (1 - targets_B) * jax.nn.softplus(logits_B)


def focal(logits_B: Float[Array, " B"], targets_B: Float[Array, " B"], *, gamma: ScalarLike) -> Float[Array, " B"]:
    """−y (1 − p)^γ ln p − (1 − y) p^γ ln(1 − p), in nats; γ = 0 is the cross-entropy.

    Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 4 (without its class weight), for soft targets too.
    """
    minus_log_p_B = jax.nn.softplus(-logits_B)
    minus_log_q_B = jax.nn.softplus(logits_B)
    # (1 − p)^γ = exp(−γ · −ln(1 − p)): a power of a rounded 1 − p would have an infinite gradient at p = 1, γ < 1.
    positive_B = jnp.exp(-gamma * minus_log_q_B) * minus_log_p_B
    negative_B = jnp.exp(-gamma * minus_log_p_B) * minus_log_q_B
    return targets_B * positive_B + (1 - targets_B) * negative_B


def squared_error(outputs_B: Float[Array, " B"], targets_B: Float[Array, " B"]) -> Float[Array, " B"]:
    """(output − target)², in the square of the target's unit."""
    return jnp.square(outputs_B - targets_B)


def huber(outputs_B: Float[Array, " B"], targets_B: Float[Array, " B"], *, delta: ScalarLike) -> Float[Array, " B"]:
    """½ e² while |e| ≤ δ, then δ (|e| − ½ δ), with e = output − target (Huber 1964)."""
    absolute_B = jnp.abs(outputs_B - targets_B)
    quadratic_B = jnp.minimum(absolute_B, delta)
    return 0.5 * jnp.square(quadratic_B) + delta * (absolute_B - quadratic_B)


def smooth(targets_B: Float[Array, " B"], *, smoothing: ScalarLike) -> Float[Array, " B"]:
    """Targets 0 and 1 become smoothing / 2 and 1 − smoothing / 2 (Szegedy et al. 2016)."""
    return targets_B * (1 - smoothing) + 0.5 * smoothing


def balanced_weights(labels: Floats) -> tuple[float, float]:
    """The weights n / (2 n_class) of class 0 and class 1; over `labels` they average 1.

    Raises:
        FintxError: one of the two classes is absent.
    """
    positives = int(np.count_nonzero(labels == 1))
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        raise FintxError(
            f'train.class_weight = "balanced" needs both classes in the training part, got {positives} positives and '
            f"{negatives} negatives; widen the training dates or choose another threshold"
        )
    return len(labels) / (2 * negatives), len(labels) / (2 * positives)
