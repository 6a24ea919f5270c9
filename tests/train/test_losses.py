"""Losses against closed forms, scikit-learn, optax and float64 NumPy, and at logits where naive formulas break."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from fintx.errors import FintxError
from fintx.train import losses
from fintx.train.losses import LossValues

LOGITS = np.array([-4.0, -0.3, 0.0, 1.7, 6.0], np.float32)
TARGETS = np.array([0.0, 1.0, 1.0, 0.0, 1.0], np.float32)
PLAIN = LossValues(focal_gamma=0.0, huber_delta=1.0, label_smoothing=0.0, negative_weight=1.0, positive_weight=1.0)


def probabilities(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def test_cross_entropy_is_sklearns_log_loss() -> None:
    ours = losses.binary_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(TARGETS))
    assert float(ours.mean()) == pytest.approx(log_loss(TARGETS, probabilities(LOGITS)), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_is_its_equation(gamma: float) -> None:
    p = probabilities(LOGITS)
    p_true = np.where(TARGETS == 1, p, 1 - p)
    ours = losses.focal(jnp.asarray(LOGITS), jnp.asarray(TARGETS), gamma=gamma)
    np.testing.assert_allclose(ours, -((1 - p_true) ** gamma) * np.log(p_true), rtol=2e-6)


def test_focal_is_optaxs_on_soft_targets_too() -> None:
    ours = losses.focal(jnp.asarray(LOGITS), jnp.asarray(TARGETS), gamma=2.0)
    theirs = optax.losses.sigmoid_focal_loss(jnp.asarray(LOGITS), jnp.asarray(TARGETS), gamma=2.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    p, y = probabilities(LOGITS), np.full(5, 0.3)
    by_hand = -y * (1 - p) ** 2 * np.log(p) - (1 - y) * p**2 * np.log(1 - p)
    soft = losses.focal(jnp.asarray(LOGITS), jnp.asarray(y, jnp.float32), gamma=2.0)
    np.testing.assert_allclose(soft, by_hand, rtol=2e-6)


@pytest.mark.parametrize("kind", ["bce", "focal"])
@pytest.mark.parametrize("logit", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("target", [0.0, 0.05, 1.0])
def test_sure_logits_have_finite_losses_and_gradients(kind: str, logit: float, target: float) -> None:
    values = LossValues(0.5, 1.0, 0.1, 1.0, 1.0)

    def total(z: jax.Array) -> jax.Array:
        return losses.per_example(kind, z, jnp.array([target], jnp.float32), values=values).sum()

    loss, gradient = jax.value_and_grad(total)(jnp.array([logit], jnp.float32))
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    assert loss >= 0


@pytest.mark.parametrize(("logit", "target", "expected"), [(1e4, 0.0, 1e4), (-1e4, 1.0, 1e4), (1e4, 1.0, 0.0)])
def test_a_wrong_sure_logit_costs_its_size(logit: float, target: float, expected: float) -> None:
    loss = losses.binary_cross_entropy(jnp.array([logit], jnp.float32), jnp.array([target], jnp.float32))
    assert float(loss[0]) == pytest.approx(expected)


def test_a_right_sure_logit_keeps_its_small_loss() -> None:
    # ln(1 + e^−20); softplus(z) − z would round to 0.
    loss = losses.binary_cross_entropy(jnp.array([20.0]), jnp.array([1.0]))
    assert float(loss[0]) == pytest.approx(2.061153620314381e-09, rel=1e-5)


def test_huber_is_quadratic_then_linear() -> None:
    errors = np.array([-3.0, -0.5, 0.0, 0.2, 0.5, 4.0], np.float32)
    ours = losses.huber(jnp.asarray(errors), jnp.zeros(6), delta=0.5)
    np.testing.assert_allclose(ours, [1.375, 0.125, 0, 0.02, 0.125, 1.875], rtol=1e-6)
    np.testing.assert_allclose(ours, optax.losses.huber_loss(jnp.asarray(errors), delta=0.5), rtol=1e-6)


def test_squared_error_is_not_halved() -> None:
    np.testing.assert_allclose(losses.squared_error(jnp.array([3.0, -1.0]), jnp.array([1.0, 1.0])), [4.0, 4.0])


def test_smoothing_moves_both_classes_by_half_of_it() -> None:
    np.testing.assert_allclose(losses.smooth(jnp.array([0.0, 1.0]), smoothing=0.2), [0.1, 0.9], rtol=1e-6)


def test_smoothed_loss_is_the_loss_of_soft_targets() -> None:
    p, y = probabilities(LOGITS), np.where(TARGETS == 1, 0.9, 0.1)
    values = LossValues(0.0, 1.0, 0.2, 1.0, 1.0)
    ours = losses.per_example("bce", jnp.asarray(LOGITS), jnp.asarray(TARGETS), values=values)
    np.testing.assert_allclose(ours, -y * np.log(p) - (1 - y) * np.log(1 - p), rtol=2e-6)


def test_balanced_weights_are_sklearns_and_average_one() -> None:
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1], np.float32)
    negative, positive = losses.balanced_weights(labels)
    theirs = compute_class_weight("balanced", classes=np.array([0.0, 1.0]), y=labels)
    np.testing.assert_allclose([negative, positive], theirs)
    assert np.mean(np.where(labels == 1, positive, negative)) == pytest.approx(1.0)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_balancing_one_class_is_an_error_with_the_counts(label: float) -> None:
    with pytest.raises(FintxError, match="needs both classes.*got . positives and . negatives"):
        losses.balanced_weights(np.full(5, label, np.float32))


def test_class_weights_follow_the_hard_label_under_smoothing() -> None:
    plain = losses.per_example(
        "bce", jnp.asarray(LOGITS), jnp.asarray(TARGETS), values=LossValues(0.0, 1.0, 0.4, 1.0, 1.0)
    )
    weighted = losses.per_example(
        "bce", jnp.asarray(LOGITS), jnp.asarray(TARGETS), values=LossValues(0.0, 1.0, 0.4, 0.5, 3.0)
    )
    np.testing.assert_allclose(weighted / plain, np.where(TARGETS == 1, 3.0, 0.5), rtol=1e-6)


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_regression_losses_ignore_smoothing_and_class_weights(kind: str) -> None:
    odd = LossValues(2.0, 1.0, 0.4, 7.0, 9.0)
    outputs, targets = jnp.asarray(LOGITS), jnp.asarray(TARGETS)
    np.testing.assert_array_equal(
        losses.per_example(kind, outputs, targets, values=odd), losses.per_example(kind, outputs, targets, values=PLAIN)
    )
