"""Batches, order, padding and populations: what an epoch computes, against a plain loop in NumPy and optax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fintx.config.schema import TrialConfig
from fintx.data.datasets import Dataset
from fintx.model import encoder
from fintx.train import losses, optimizer, train_step
from fintx.train.train_state import Hyperparameters, TargetScale, hyperparameters, init_state, static_config

Trials = Callable[..., TrialConfig]
Datasets = Callable[..., Dataset]
PLAIN = TargetScale(mean=0.0, sd=1.0)
# With the usual 1e-8 Adam turns a gradient that is 0 but for rounding (that of a key's bias) into ± the rate.
LARGE_EPS = {"optim.eps": 1e-3}


def order(values: Hyperparameters, *, epoch: int, n: int = 75, capacity: int = 256) -> np.ndarray:
    return np.asarray(train_step.epoch_order(values, epoch=epoch, n=n, capacity=capacity))


@pytest.fixture
def values(make_trial: Trials, make_dataset: Datasets) -> Hyperparameters:
    return hyperparameters(make_trial(), labels=make_dataset().train.labels, scale=PLAIN)


def test_order_is_a_permutation_with_the_padding_last(values: Hyperparameters) -> None:
    samples = order(values, epoch=0)
    assert sorted(samples[:75]) == list(range(75))
    assert list(samples[:75]) != list(range(75))
    assert sorted(samples[75:]) == list(range(75, 256))


def test_order_depends_on_seed_and_epoch_alone(values: Hyperparameters, make_trial: Trials) -> None:
    again = hyperparameters(make_trial({"optim.learning_rate": 1.0}), labels=np.zeros(75, np.float32), scale=PLAIN)
    other = hyperparameters(make_trial({"seed": 1}), labels=np.zeros(75, np.float32), scale=PLAIN)
    np.testing.assert_array_equal(order(values, epoch=4), order(again, epoch=4))
    np.testing.assert_array_equal(order(values, epoch=4)[:75], order(values, epoch=4, capacity=1024)[:75])
    assert list(order(values, epoch=4)) != list(order(values, epoch=5))
    assert list(order(values, epoch=4)) != list(order(other, epoch=4))


def test_order_is_uniform(values: Hyperparameters) -> None:
    """Where sample 0 lands over 2,000 epochs: 5 places, each 400 ± 5 SD."""
    orders = jax.vmap(lambda e: train_step.epoch_order(values, epoch=e, n=5, capacity=8))(jnp.arange(2000))
    counts = np.bincount(np.argmax(np.asarray(orders)[:, :5] == 0, axis=1), minlength=5)
    assert np.abs(counts - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)


def test_windows_end_at_their_decision_bar(make_trial: Trials, make_dataset: Datasets) -> None:
    config, data = make_trial(), make_dataset()
    windows = train_step.place(data.features, data.train.rows, data.train.labels)
    batch = train_step.gather_batch(static_config(config), windows, jnp.arange(256, dtype=jnp.int32), first=64)
    for i, row in enumerate(data.train.rows[64:]):
        np.testing.assert_array_equal(batch.x[i], data.features[row - 11 : row + 1])
    np.testing.assert_array_equal(batch.weights, [1.0] * 11 + [0.0] * 5)
    np.testing.assert_array_equal(batch.targets[:11], data.train.labels[64:])


def test_epoch_equals_a_plain_loop(make_trial: Trials, make_dataset: Datasets) -> None:
    """Two epochs of 75 samples in batches of 16, the last of 11, against optax.adamw on exactly sized batches.

    The dropout rate is one that drops nothing here, in the program that drops: 0 would compile another.
    """
    config = make_trial(LARGE_EPS | {"model.dropout": 1e-9, "optim.weight_decay": 0.1, "optim.clip_norm": 0.3})
    data, static = make_dataset(), static_config(config)
    values = hyperparameters(config, labels=data.train.labels, scale=PLAIN)
    windows = train_step.place(data.features, data.train.rows, data.train.labels)
    training = train_step.compile_training(static, n_features=3, n_rows=256, n_samples=256)
    state = training.start(values)
    params = jax.tree.map(np.array, state.params)
    rate = partial(optimizer.learning_rate, "cosine", values.optim)
    adamw = optax.chain(
        optax.clip_by_global_norm(0.3),
        optax.adamw(rate, eps=1e-3, weight_decay=0.1, mask=encoder.weight_decay_mask(params)),
    )

    def mean_loss(params: dict, x_BTF: jax.Array, labels_B: jax.Array) -> jax.Array:
        outputs_B = encoder.apply(static.model, static.shape, params, x_BTF)
        return losses.binary_cross_entropy(outputs_B, labels_B).mean()

    @jax.jit
    def plain_step(params: dict, moments: tuple, x_BTF: jax.Array, labels_B: jax.Array) -> tuple:
        loss, gradients = jax.value_and_grad(mean_loss)(params, x_BTF, labels_B)
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = adamw.update(gradients, moments, params)
            return loss, optax.apply_updates(params, updates), moments

    moments = adamw.init(params)
    for epoch in range(2):
        state, sums = training.segment(values, state, train_step.EpochSums(), windows, np.int32(5))
        picked = order(values, epoch=epoch)[:75]
        total = 0.0
        for first in range(0, 75, 16):
            batch = picked[first : first + 16]
            x_BTF = np.stack([data.features[r - 11 : r + 1] for r in data.train.rows[batch]])
            loss, params, moments = plain_step(params, moments, x_BTF, data.train.labels[batch])
            total += float(loss) * len(batch)
        assert float(sums.loss_sum) == pytest.approx(total, rel=1e-5)
    assert int(state.step) == 10 and int(sums.bad_step) == -1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.params, params)


@pytest.mark.slow
def test_population_equals_single_runs(make_trial: Trials, make_dataset: Datasets) -> None:
    """Two members under vmap, each with its own seed, rate, decay and dropout."""
    data = make_dataset()
    other = {"seed": 7, "optim.learning_rate": 1e-3, "optim.weight_decay": 0.2, "model.dropout": 0.4}
    configs = [make_trial(LARGE_EPS), make_trial(LARGE_EPS | other)]
    members = [hyperparameters(config, labels=data.train.labels, scale=PLAIN) for config in configs]
    static = static_config(configs[0])
    assert static == static_config(configs[1])
    windows = train_step.place(data.features, data.train.rows, data.train.labels)

    def epoch(values: Hyperparameters) -> tuple:
        state = init_state(static, values, n_features=3)
        return train_step.train_segment(static, values, state, train_step.EpochSums(), windows, 5)

    together, epoch_sums = jax.jit(jax.vmap(epoch))(jax.tree.map(lambda *leaves: np.stack(leaves), *members))
    training = train_step.compile_training(static, n_features=3, n_rows=256, n_samples=256)
    for r, values in enumerate(members):
        alone, sums = training.segment(values, training.start(values), train_step.EpochSums(), windows, np.int32(5))
        assert float(epoch_sums.loss_sum[r]) == pytest.approx(float(sums.loss_sum), rel=1e-6)
        jax.tree.map(lambda a, b, r=r: np.testing.assert_allclose(a[r], b, atol=1e-6), together.params, alone.params)


def test_bad_step_is_the_first_one(make_trial: Trials, make_dataset: Datasets) -> None:
    """A NaN in the window of one sample: its step is named, and later steps are not."""
    config, data = make_trial(), make_dataset()
    values = hyperparameters(config, labels=data.train.labels, scale=PLAIN)
    training = train_step.compile_training(static_config(config), n_features=3, n_rows=256, n_samples=256)
    targets = data.train.labels.copy()
    targets[order(values, epoch=0)[40]] = np.nan
    windows = train_step.place(data.features, data.train.rows, targets)
    _, sums = training.segment(values, training.start(values), train_step.EpochSums(), windows, np.int32(5))
    assert int(sums.bad_step) == 40 // 16


@pytest.mark.parametrize(("n", "capacity"), [(1, 256), (256, 256), (257, 512), (5000, 8192)])
def test_capacity_is_the_next_power_of_two(n: int, capacity: int) -> None:
    assert train_step.capacity(n) == capacity
